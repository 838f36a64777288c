"""Was a setting made by hand for a trainer mode that is not the one that runs?

`trainer.v1.stale_k.staleness_updates=256` with the mode forgotten would train on-policy, and be published as stale.
"""

from collections.abc import Iterator

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import TRAINER_MODE, overridden_keys, read
from verl_m2po.staleness.config import MODES

SECTION = "trainer.v1"


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield every setting on the command line that stands under another of our modes than the chosen one."""
    chosen = read(config, TRAINER_MODE)
    for key in dict.fromkeys(overridden_keys(config)):
        mode = key.removeprefix(f"{SECTION}.").partition(".")[0]
        if key.startswith(f"{SECTION}.") and mode in MODES and mode != chosen:
            yield Problem(
                key,
                read(config, key),
                f"{TRAINER_MODE}={chosen} does not read it, so it would be without effect",
                f"Add {TRAINER_MODE}={mode}, or leave it out",
            )
