"""What one run does, from the same Hydra config as a run through verl."""

import dataclasses
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig

from verl_m2po.launch.checks import losses
from verl_m2po.losses.kernel.settings import KEY
from verl_m2po.one_process.honoured import concerns_devices, not_honoured
from verl_m2po.staleness import checks
from verl_m2po.staleness.build_rule import build_rule
from verl_m2po.staleness.config import StaleKConfig, is_chosen, load_mode_config
from verl_m2po.staleness.needs import set_what_the_mode_needs
from verl_m2po.staleness.rule.rules import StalenessRule
from verl_m2po.staleness.rule.units import UpdateClock
from verl_m2po.tasks import tiny_model
from verl_m2po.tasks.made import TASKS
from verl_m2po.tasks.task import Task

logger = logging.getLogger(__name__)

CONFIG = "arithmetic_staleness"
RECIPE = tiny_model.SMALL
# Primary configs that are made for the bench, with the base model of their task
RECIPES = {CONFIG: RECIPE, "column_addition_staleness": tiny_model.LONG}
REWARD = "reward.custom_reward_function.path"
ACTOR = "actor_rollout_ref.actor"
MODEL = "actor_rollout_ref.model.path"
THROUGH_VERL = f"The same overrides work with `python -m verl.trainer.main_ppo --config-name={CONFIG}`"
MODES = ("sync", "stale_k", "stale_k_separate", "bounded_async", "replay")


# Their inputs are made by no trainer of verl 0.9.1's v1, or by a critic.
ESTIMATORS_WITHOUT_INPUTS = ("remax", "optimal_token_baseline", "tir_optimal_token_baseline", "gdpo", "gae")


class NotOnTheBench(ValueError):
    """A setting that only a run through verl can honour."""


class Refused(ValueError):
    """The config is refused here as before a run through verl, in the same words."""


@dataclass(frozen=True)
class Setup:
    """A composed config, checked, with what is read from it often.

    Args:
        config: verl's config of the run.
        actor: Its actor settings as verl's workers get them.
        clock: Converts optimizer updates and trainer steps.
        staleness_steps: Age of every batch when its trainer step begins, in trainer steps; 0 is on-policy.
    """

    config: DictConfig
    actor: ActorConfig
    clock: UpdateClock
    staleness_steps: int

    @property
    def has_proximal_policy(self) -> bool:
        """Whether verl would compute old_log_probs anew, with the weights at the start of the trainer step."""
        return not self.config.algorithm.rollout_correction.bypass_mode

    def make_rule(self) -> StalenessRule:
        """The rule that says what is generated and what is trained, for a run of `steps`."""
        mode = self.config.trainer.v1.trainer_mode
        settings = load_mode_config(self.config, mode) if is_chosen(self.config) else StaleKConfig()
        rule = build_rule(settings, self.clock, self.config.data.seed)
        rule.limit(self.steps)
        return rule

    @property
    def task(self) -> Task:
        """What is learnt: the task whose reward function the config names."""
        return _task(self.config)

    @property
    def recipe(self) -> tiny_model.Recipe:
        """Of the base model of the task."""
        return next(recipe for recipe in RECIPES.values() if recipe.task == self.task.data_source)

    @property
    def batch_size(self) -> int:
        """Prompts per trainer step."""
        return self.config.data.train_batch_size

    @property
    def responses(self) -> int:
        """Responses per prompt."""
        return self.config.actor_rollout_ref.rollout.n

    @property
    def steps(self) -> int:
        """Trainer steps of the run."""
        return self.config.trainer.total_training_steps


def read(overrides: list[str], config_name: str = CONFIG) -> Setup:
    """Compose `config_name` with `overrides` as ``python -m verl.trainer.main_ppo`` does.

    Raises:
        NotOnTheBench: The config asks for something that is left out here; names the keys.
        Refused: A run through verl would be refused too: what the loss needs, or the staleness, is contradicted.
        hydra.errors.HydraException: The config does not compose.
    """
    config = _compose(config_name, overrides)
    _refuse(config)
    _refuse_ignored(config, config_name if config_name in RECIPES else CONFIG, names_own_model(overrides))
    _prepare(config)
    actor: Any = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.optim.total_training_steps = config.trainer.total_training_steps
    clock = UpdateClock(config.data.train_batch_size, actor.ppo_mini_batch_size, actor.ppo_epochs)
    return Setup(config, actor, clock, clock.steps(*_staleness(config)))


def names_own_model(overrides: list[str]) -> bool:
    """Whether the run starts from a model of the user's instead of `base_model`."""
    return any(override.startswith(f"{MODEL}=") for override in overrides)


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    import verl  # noqa: F401  # loads the plugin, with which Hydra knows our configs

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(config_name, overrides=overrides)


@functools.cache
def _base(config_name: str) -> DictConfig:
    """What the bench does without overrides; composing takes half a second."""
    return _compose(config_name, [])


def _prepare(config: DictConfig) -> None:
    """Check and change `config` as is done on the way of a run through verl."""
    is_stale = is_chosen(config)
    found = [*losses.problems(config), *checks.check(config)]
    found = [problem for problem in found if not concerns_devices(problem.key)]
    for problem in found:
        if not problem.is_fatal:
            logger.warning("%s", problem)
    if fatal := [problem for problem in found if problem.is_fatal]:
        raise Refused("\n".join(f"  - {problem}" for problem in fatal))
    if is_stale:
        set_what_the_mode_needs(config)


def _staleness(config: DictConfig) -> tuple[int, str]:
    mode = config.trainer.v1.trainer_mode
    if mode == "sync":
        return 0, "staleness_updates"
    return config.trainer.v1[mode].staleness_updates, f"trainer.v1.{mode}.staleness_updates"


def _refuse(config: DictConfig) -> None:
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    mode, steps = config.trainer.v1.trainer_mode, config.trainer.total_training_steps
    micro_rows = actor.ppo_micro_batch_size_per_gpu
    wanted = {
        "trainer.v1.trainer_mode": (mode, mode in MODES, f"one of {', '.join(MODES)}"),
        "trainer.total_training_steps": (steps, steps is not None and steps > 0, "a number of trainer steps"),
        "algorithm.use_kl_in_reward": _same(config.algorithm.use_kl_in_reward, False),
        f"{ACTOR}.use_kl_loss": _same(actor.use_kl_loss, False),
        f"{ACTOR}.shuffle": _same(actor.shuffle, False),
        f"{KEY}.m2po.subtract_mismatch_floor": _same(actor.policy_loss.m2po.subtract_mismatch_floor, False),
        "actor_rollout_ref.rollout.top_p": _same(rollout.top_p, 1.0),
        "actor_rollout_ref.rollout.top_k": _same(rollout.top_k, -1),
        "actor_rollout_ref.rollout.temperature": (rollout.temperature, rollout.temperature > 0, "above 0"),
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": (micro_rows, *_micro_batches(config)),
        "critic.enable": (config.critic.enable, not config.critic.enable, "null or false"),
        "algorithm.adv_estimator": (config.algorithm.adv_estimator, *_estimator(config.algorithm.adv_estimator)),
    }
    for key, (value, is_fine, what) in wanted.items():
        if not is_fine:
            raise NotOnTheBench(f"{key}={value} needs verl itself; in one process it must be {what}. {THROUGH_VERL}")


def _refuse_ignored(config: DictConfig, base: str, has_own_model: bool) -> None:
    """What would compose and change nothing here, so that the run would not be what its overrides say."""
    ignored = not_honoured(config, _base(base))
    if has_own_model:
        ignored.pop(MODEL, None)
    if ignored:
        listed = ", ".join(f"{key}={value}" for key, value in ignored.items())
        raise NotOnTheBench(f"{listed} would change nothing in one process and needs verl itself. {THROUGH_VERL}")


def _micro_batches(config: DictConfig) -> tuple[bool, str]:
    """Whether micro-batches of a number of rows are what the bench can cut, and what it can."""
    actor, responses = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.n
    rows, whole = actor.ppo_micro_batch_size_per_gpu, actor.ppo_mini_batch_size * responses
    # Prompts are computed once for all their responses.
    is_fine = actor.use_dynamic_bsz or (bool(rows) and rows % responses == 0 and whole % rows == 0)
    return is_fine, f"a multiple of the {responses} responses to a prompt and a divisor of the mini-batch's {whole}"


def _estimator(name: str) -> tuple[bool, str]:
    """Whether the advantages can be had from rewards and groups, and by which estimators they can."""
    known = sorted(set(ADV_ESTIMATOR_REGISTRY) - set(ESTIMATORS_WITHOUT_INPUTS))
    return name in known, f"one of {', '.join(known)}"


def _task(config: DictConfig) -> Task:
    path = config.reward.custom_reward_function.path
    found = [task for task in TASKS.values() if task.reward_path == path]
    if not found:
        known = ", ".join(task.reward_path for task in TASKS.values())
        raise NotOnTheBench(f"{REWARD}={path} needs verl itself; in one process it must be one of {known}")
    return found[0]


def _same(value: Any, wanted: Any) -> tuple[Any, bool, str]:
    return value, value == wanted, str(wanted).lower()


def base_model(recipe: tiny_model.Recipe = RECIPE, digits: int | None = None) -> Path:
    """Folder of the base model, supervised first (about a minute) where neither the package nor a cache has it."""
    return tiny_model.build(recipe if digits is None else dataclasses.replace(recipe, digits=digits))
