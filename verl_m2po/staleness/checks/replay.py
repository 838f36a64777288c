"""Can a rollout be trained as often as asked, and does the chosen mode train any more than once?"""

import math
from collections.abc import Iterator
from fractions import Fraction

from omegaconf import DictConfig, OmegaConf

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.settings import Number
from verl_m2po.ground.verl_config import TRAINER_MODE, read
from verl_m2po.staleness.checks.numbers import mode_and_settings, staleness_steps
from verl_m2po.staleness.config import ReplayConfig, ReplayModeConfig, first_uses
from verl_m2po.staleness.rule.reuse import SAMPLING

MODE = "replay"
KEY = "trainer.v1.replay.replay"
NUMBERS = (
    Number("max_uses", 1, may_be_null=True, meaning="trainer steps that train on a rollout"),
    Number("baseline_groups", 0, meaning="groups whose mean scores make a baseline"),
    Number("ramp_steps", 0, meaning="trainer steps"),
    Number("fresh_share", 0, 1, is_whole=False, excludes_least=True, meaning="a share of the prompts of a batch"),
)
OFF = "replay=off trains each rollout once"


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield settings of the mode `replay` that no run can honour."""
    _, settings = mode_and_settings(config)
    if not isinstance(settings, ReplayModeConfig):
        return
    replay = settings.replay
    if settings.journal:
        why = "the journal knows when a rollout was generated, not how often it was trained since"
        yield Problem(f"trainer.v1.{MODE}.journal", True, why, "Set it to false; checkpoints hold all rollouts")
    yield from [*_ranges(replay)] or [*_share(config, replay)] or _uses(config, settings)


def in_another_mode(config: DictConfig) -> Iterator[Problem]:
    """Yield replay that was asked for in a mode that trains each rollout once."""
    mode = read(config, TRAINER_MODE)
    asked = OmegaConf.select(config, KEY)
    if mode == MODE or asked is None or asked == OmegaConf.structured(ReplayConfig()):
        return
    why = f"trainer.v1.trainer_mode={mode} trains each rollout once, and the exact modes promise one age"
    yield Problem(f"{KEY}.max_uses", asked.get("max_uses"), why, f"Set staleness=replay beside it; {OFF}")


def _ranges(replay: ReplayConfig) -> Iterator[Problem]:
    for number in NUMBERS:
        problem = number.problem_of(getattr(replay, number.key))
        if problem is not None:
            yield problem._replace(key=f"{KEY}.{number.key}")
    if replay.sampling not in SAMPLING:
        remedy = f"Set it to {', '.join(SAMPLING[:-1])} or {SAMPLING[-1]}"
        yield Problem(f"{KEY}.sampling", replay.sampling, "there is no such choice", remedy)
    elif replay.sampling != "positive":
        for key in ("baseline_groups", "ramp_steps"):
            if (value := getattr(replay, key)) > 0:
                why = f"it changes nothing with sampling={replay.sampling}, under which advantages stay as they are"
                yield Problem(f"{KEY}.{key}", value, why, f"Set it to 0, or {KEY}.sampling to positive")


def _share(config: DictConfig, replay: ReplayConfig) -> Iterator[Problem]:
    batch = staleness_steps(config)[0].train_batch_size
    if first_uses(replay.fresh_share, batch) is not None:
        return
    below = int(replay.fresh_share * batch)
    near = " or ".join(str(float(Fraction(n, batch))) for n in (below, below + 1) if n)
    why = f"it is {replay.fresh_share * batch:g} of the {batch} prompts of a batch, which is no whole number"
    yield Problem(f"{KEY}.fresh_share", replay.fresh_share, why, f"Set it to {near}, or change data.train_batch_size")


def _uses(config: DictConfig, settings: ReplayModeConfig) -> Iterator[Problem]:
    replay, (clock, bound_steps) = settings.replay, staleness_steps(config)
    uses, share, mean = replay.max_uses, replay.fresh_share, 1 / replay.fresh_share
    window = f"trainer.v1.replay.staleness_updates={settings.staleness_updates}"
    once_a_step = f"a rollout is trained once a trainer step, in at most {bound_steps + 1} of {window}"

    def wider(least_uses: float) -> str:
        return f"Set trainer.v1.replay.staleness_updates to {clock.updates(math.ceil(least_uses) - 1)} or more"

    if uses == 1:
        if share < 1:
            why = "max_uses=1 trains each rollout once, so every prompt of a batch is new"
            yield Problem(f"{KEY}.fresh_share", share, why, f"Set it to 1, or {KEY}.max_uses to 2 or more")
        return
    if share == 1:
        why = "it is never reached: fresh_share=1 leaves no place in a batch for a rollout that was trained before"
        yield Problem(f"{KEY}.max_uses", uses, why, f"Lower {KEY}.fresh_share, such as to {1 / (uses or 4):g}")
    if uses is not None and uses > bound_steps + 1:
        yield Problem(f"{KEY}.max_uses", uses, f"it is never reached: {once_a_step}", wider(uses))
    elif uses is None and mean > bound_steps + 1:
        why = f"each rollout would have to be trained {mean:g} times, but {once_a_step}"
        yield Problem(f"{KEY}.fresh_share", share, why, wider(mean))
    elif uses is not None and uses < mean:
        why = f"with max_uses={uses} rollouts run out, and about {1 / uses:g} of the prompts will be new"
        yield Problem(f"{KEY}.fresh_share", share, why, f"Set it to {1 / uses:g}, or raise max_uses", is_fatal=False)
    elif uses == mean and uses < bound_steps:
        why = f"they are used up after about {uses} trainer steps, so the {bound_steps} of {window} are never filled"
        remedy = "Set it to null, or well above 1 / fresh_share, to train on older rollouts"
        yield Problem(f"{KEY}.max_uses", uses, why, remedy, is_fatal=False)
