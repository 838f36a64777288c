"""What this package changes in verl, Ray and vLLM where they have no extension point: one file for each of the three.

Guarantee: each patch says what goes wrong without it, why, and when to delete it, and is applied only where it says so.
Each may be applied twice. docs/plugin.md has the table, made from these records.
"""

from verl_m2po.patches import ray, verl, vllm
from verl_m2po.patches.record import Patch, Scope

PATCHES: tuple[Patch, ...] = (*verl.PATCHES, *vllm.PATCHES, *ray.PATCHES)


def install(on_cpu: bool) -> None:
    """Arrange what concerns a whole process; the others are applied by the code that they serve.

    Args:
        on_cpu: Whether this process runs verl without a GPU.
    """
    for patch in PATCHES:
        if on_cpu and patch.scope is Scope.CPU:
            patch.arrange()
