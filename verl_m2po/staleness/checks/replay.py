"""Can a rollout be trained as often as asked, and does the chosen mode train any more than once?"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from omegaconf import DictConfig, OmegaConf

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.settings import Number
from verl_m2po.ground.verl_config import TRAINER_MODE, read
from verl_m2po.staleness.checks.numbers import mode_and_settings, staleness_steps
from verl_m2po.staleness.config import AHEAD, BoundedAsyncConfig, ReplayConfig, ReplayModeConfig, first_uses
from verl_m2po.staleness.rule.reuse import SAMPLING
from verl_m2po.staleness.rule.units import UpdateClock

MODES = ("replay", "bounded_async")
NUMBERS = (
    Number("max_uses", 1, may_be_null=True, meaning="trainer steps that train on a rollout"),
    Number("baseline_groups", 0, meaning="groups whose mean scores make a baseline"),
    Number("ramp_steps", 0, meaning="trainer steps"),
    Number("fresh_share", 0, 1, is_whole=False, excludes_least=True, meaning="a share of the prompts of a batch"),
)
OFF = "replay=off trains each rollout once"


def key_of(mode: str) -> str:
    """The section of `mode` that says how often a rollout is trained."""
    return f"trainer.v1.{mode}.replay"


@dataclass(frozen=True)
class Asked:
    """What a run asks of replay, and what it is checked against.

    Args:
        mode: trainer mode.
        replay: settings.
        clock: converts optimizer updates and trainer steps.
        window: the key of the bound with its value.
        bound_steps: the bound, in trainer steps.
    """

    mode: str
    replay: ReplayConfig
    clock: UpdateClock
    window: str
    bound_steps: int

    def problem(self, setting: str, why: str, remedy: str, is_fatal: bool = True) -> Problem:
        """About one of the settings."""
        return Problem(self.key(setting), getattr(self.replay, setting), why, remedy, is_fatal=is_fatal)

    def key(self, setting: str) -> str:
        """Full name of one of the settings."""
        return f"{key_of(self.mode)}.{setting}"

    def wider(self, least_uses: float) -> str:
        """The remedy of a window without room for so many uses."""
        updates = self.clock.updates(math.ceil(least_uses) - 1)
        return f"Set trainer.v1.{self.mode}.staleness_updates to {updates} or more"

    @property
    def once_a_step(self) -> str:
        """Why more uses than the bound has trainer steps are never reached."""
        return f"a rollout is trained once a trainer step, in at most {self.bound_steps + 1} of {self.window}"


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield settings of replay that no run can honour."""
    mode, settings = mode_and_settings(config)
    if not isinstance(settings, ReplayModeConfig | BoundedAsyncConfig):
        return
    clock, bound_steps = staleness_steps(config)
    window = f"trainer.v1.{mode}.staleness_updates={settings.staleness_updates}"
    asked = Asked(mode, settings.replay, clock, window, bound_steps)
    if isinstance(settings, BoundedAsyncConfig):
        yield from _ahead(settings, clock)
    if isinstance(settings, BoundedAsyncConfig) and settings.adaptive.enable and settings.reuses:
        why = "what is kept for another use has the age of a bound that stays"
        remedy = f"Leave out staleness=adaptive or replay=: set {asked.key('max_uses')} to 1"
        yield asked.problem("max_uses", why, remedy)
    found = [*_ranges(asked)] or [*_share(asked)] or [*_uses(asked)]
    yield from found or (_mean_uses(asked) if mode == "replay" else ())


def in_another_mode(config: DictConfig) -> Iterator[Problem]:
    """Yield replay that was asked for in a mode that trains each rollout once."""
    mode = read(config, TRAINER_MODE)
    if mode in MODES:
        return
    for key in map(key_of, MODES):
        asked = OmegaConf.select(config, key)
        if asked is not None and asked != OmegaConf.structured(ReplayConfig()):
            why = f"trainer.v1.trainer_mode={mode} trains each rollout once, and the exact modes promise one age"
            remedy = f"Set staleness=replay or staleness=bounded_async beside it; {OFF}"
            yield Problem(f"{key}.max_uses", asked.get("max_uses"), why, remedy)
            return


def _ahead(settings: BoundedAsyncConfig, clock: UpdateClock) -> Iterator[Problem]:
    """Yield how far generation should run ahead where the window, or the lack of replay, forbids it."""
    updates = settings.ahead_updates
    window = f"trainer.v1.bounded_async.staleness_updates={settings.staleness_updates}"
    if updates is not None and not settings.reuses:
        why = f"it is of replay; without it {window} says how far"
        yield Problem(AHEAD, updates, why, "Set it to null, or replay=x4 beside it")
    elif settings.ahead_steps(clock) > clock.steps(settings.staleness_updates):
        why = f"what runs ahead that far would be too old: {window}"
        yield Problem(AHEAD, updates, why, "Lower it to that, or set it to null")


def _ranges(asked: Asked) -> Iterator[Problem]:
    replay = asked.replay
    for number in NUMBERS:
        problem = number.problem_of(getattr(replay, number.key))
        if problem is not None:
            yield problem._replace(key=asked.key(number.key))
    if replay.sampling not in SAMPLING:
        remedy = f"Set it to {', '.join(SAMPLING[:-1])} or {SAMPLING[-1]}"
        yield asked.problem("sampling", "there is no such choice", remedy)
    elif replay.sampling != "positive":
        for setting in ("baseline_groups", "ramp_steps"):
            if getattr(replay, setting) > 0:
                why = f"it changes nothing with sampling={replay.sampling}, under which advantages stay as they are"
                yield asked.problem(setting, why, f"Set it to 0, or {asked.key('sampling')} to positive")


def _share(asked: Asked) -> Iterator[Problem]:
    batch, share = asked.clock.train_batch_size, asked.replay.fresh_share
    if first_uses(share, batch) is not None:
        return
    below = int(share * batch)
    near = " or ".join(str(float(Fraction(n, batch))) for n in (below, below + 1) if n)
    why = f"it is {share * batch:g} of the {batch} prompts of a batch, which is no whole number"
    yield asked.problem("fresh_share", why, f"Set it to {near}, or change data.train_batch_size")


def _uses(asked: Asked) -> Iterator[Problem]:
    uses, share = asked.replay.max_uses, asked.replay.fresh_share
    if uses == 1 and share < 1:
        why = "max_uses=1 trains each rollout once, so every prompt of a batch is new"
        yield asked.problem("fresh_share", why, f"Set it to 1, or {asked.key('max_uses')} to 2 or more")
    if uses != 1 and share == 1:
        why = "it is never reached: fresh_share=1 leaves no place in a batch for a rollout that was trained before"
        remedy = f"Lower {asked.key('fresh_share')}, such as to {1 / (uses or 4):g}"
        yield asked.problem("max_uses", why, remedy)
    if uses is not None and uses > asked.bound_steps + 1:
        yield asked.problem("max_uses", f"it is never reached: {asked.once_a_step}", asked.wider(uses))


def _mean_uses(asked: Asked) -> Iterator[Problem]:
    """Of the mode in which `fresh_share` decides how often a rollout is trained; a limit below that is odd."""
    uses, mean = asked.replay.max_uses, 1 / asked.replay.fresh_share
    if uses is None:
        if mean > asked.bound_steps + 1:
            why = f"each rollout would have to be trained {mean:g} times, but {asked.once_a_step}"
            yield asked.problem("fresh_share", why, asked.wider(mean))
    elif uses == 1:
        return
    elif uses < mean:
        why = f"with max_uses={uses} rollouts run out, and about {1 / uses:g} of the prompts will be new"
        yield asked.problem("fresh_share", why, f"Set it to {1 / uses:g}, or raise max_uses", is_fatal=False)
    elif uses == mean and uses < asked.bound_steps:
        why = (
            f"they are used up after about {uses} trainer steps, so {asked.bound_steps} of {asked.window} are never "
            "filled"
        )
        remedy = "Set it to null, or well above 1 / fresh_share, to train on older rollouts"
        yield asked.problem("max_uses", why, remedy, is_fatal=False)
