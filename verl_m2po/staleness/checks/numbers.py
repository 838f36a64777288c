"""Are the numbers of the mode, and those of verl's that the checks of a mode read, numbers that mean something?"""

from collections.abc import Iterator

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem, WrongValue
from verl_m2po.ground.settings import Number
from verl_m2po.ground.verl_config import TRAINER_MODE, read
from verl_m2po.staleness.config import StaleKConfig, load_mode_config
from verl_m2po.staleness.rule.units import StalenessUnitsError, UpdateClock

TRAIN_BATCH_SIZE = Number("data.train_batch_size", 1, meaning="prompts per trainer step")
MINI_BATCH_SIZE = Number("actor_rollout_ref.actor.ppo_mini_batch_size", 1, meaning="prompts per optimizer update")
EPOCHS = Number("actor_rollout_ref.actor.ppo_epochs", 1, default=1, meaning="passes over a batch")
RESPONSES = Number("actor_rollout_ref.rollout.n", 1, meaning="responses per prompt")
PROMPT_LENGTH = Number("data.max_prompt_length", 1, meaning="tokens of a prompt")
RESPONSE_LENGTH = Number("data.max_response_length", 1, meaning="tokens of a response")
TOTAL_STEPS = Number("trainer.total_training_steps", 1, may_be_null=True, meaning="trainer steps of the run")
TOTAL_EPOCHS = Number("trainer.total_epochs", 1, default=1, meaning="passes over the data")
SAVE_FREQ = Number("trainer.save_freq", -1, default=-1, meaning="trainer steps between two checkpoints, -1 writes none")
OF_VERL = (
    *(TRAIN_BATCH_SIZE, MINI_BATCH_SIZE, EPOCHS, RESPONSES, PROMPT_LENGTH, RESPONSE_LENGTH),
    *(TOTAL_STEPS, TOTAL_EPOCHS, SAVE_FREQ),
)

_SHARE = {"least": 0, "most": 1, "is_whole": False}
OF_A_MODE = (
    Number("generation_timeout_s", 0, is_whole=False, excludes_least=True, may_be_null=True, meaning="seconds"),
    Number("max_failed_fraction", **_SHARE, meaning="a share"),
    Number("failed_window_groups", 1, meaning="a number of prompt groups"),
    Number("buffer_memory_limit_gib", 0, is_whole=False, excludes_least=True, may_be_null=True, meaning="GiB"),
    Number("start_timeout_s", 0, is_whole=False, excludes_least=True, may_be_null=True, meaning="seconds"),
    Number("push_timeout_s", 0, is_whole=False, excludes_least=True, may_be_null=True, meaning="seconds"),
    Number("no_progress_timeout_s", 0, is_whole=False, excludes_least=True, may_be_null=True, meaning="seconds"),
    Number("replica_timeout_s", 0, is_whole=False, excludes_least=True, may_be_null=True, meaning="seconds"),
    Number("max_replicas", 1, may_be_null=True, meaning="rollout servers"),
    Number("restarts", 0, meaning="how often the command goes on after an error"),
    Number("served_within_nats", 0, is_whole=False, excludes_least=True, may_be_null=True, meaning="nats"),
    Number("stop_wait_s", 0, is_whole=False, may_be_null=True, meaning="seconds"),
    Number("min_usable_share", **_SHARE, meaning="a share"),
    Number("ahead_updates", 0, may_be_null=True, meaning="optimizer updates"),
)
"""Under `trainer.v1.<mode>`, as far as the mode has them. The staleness itself: units.py."""


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield every setting of the chosen mode, and every number of verl's beside it, that is none or is out of range."""
    for number in OF_VERL:
        if (problem := number.problem_of(read(config, number.key, number.default))) is not None:
            yield problem
    mode, settings = mode_and_settings(config)
    for number in OF_A_MODE:
        if hasattr(settings, number.key):
            problem = number.problem_of(getattr(settings, number.key))
            if problem is not None:
                yield problem._replace(key=f"trainer.v1.{mode}.{number.key}")


def mode_and_settings(config: DictConfig) -> tuple[str, StaleKConfig]:
    """The chosen mode of ours and its settings.

    Raises:
        WrongValue: they cannot be loaded.
    """
    mode = read(config, TRAINER_MODE)
    return mode, load_mode_config(config, mode)


def staleness_steps(config: DictConfig) -> tuple[UpdateClock, int]:
    """The clock of `config`, and its staleness in trainer steps.

    Raises:
        WrongValue: a number is none, or the staleness is no whole number of trainer steps.
    """
    mode, settings = mode_and_settings(config)
    key = f"trainer.v1.{mode}.staleness_updates"
    sizes = [number.of(config) for number in (TRAIN_BATCH_SIZE, MINI_BATCH_SIZE, EPOCHS)]
    try:
        clock = UpdateClock(*sizes)
        return clock, clock.steps(settings.staleness_updates, key)
    except StalenessUnitsError as error:
        remedy = "See the table of units in docs/staleness.md"
        raise WrongValue(Problem(key, settings.staleness_updates, str(error), remedy)) from error
