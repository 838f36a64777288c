"""The trainer mode `method_tour`: `stale_k` that goes on to the next method after every few trainer steps.

Ray, TransferQueue, vLLM and FSDP start once, and every method trains on data of the same age. Importing registers it.
"""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf, open_dict
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

from verl_m2po.staleness.config import MODE_DEFAULTS, MODES, StaleKConfig, load_mode_config
from verl_m2po.staleness.needs import set_what_the_mode_needs
from verl_m2po.staleness.trainer import PPOTrainerStaleK

MODE = "method_tour"


@dataclass
class MethodTourConfig(StaleKConfig):
    """Settings of the mode.

    Args:
        methods_path: JSON file {method: {"algorithm": ..., "actor": ...}} with these sections of verl's config, in the
            order in which the methods take their turns.
        first_step: trainer step at which the first method has its turn; before it the run's own method trains.
        steps_each: trainer steps of a turn.
    """

    methods_path: str = ""
    first_step: int = 1
    steps_each: int = 2


MODES[MODE] = MethodTourConfig
MODE_DEFAULTS[MODE] = asdict(MethodTourConfig())


@register_trainer(MODE)
class PPOTrainerMethodTour(PPOTrainerStaleK):
    """Changes what decides about the loss: the advantage estimator, the rollout correction, the actor's settings."""

    def on_step_begin(self) -> None:
        super().on_step_begin()
        settings = load_mode_config(self.config, MODE)
        assert isinstance(settings, MethodTourConfig)
        turn, into_turn = divmod(self.global_steps - settings.first_step, settings.steps_each)
        methods = json.loads(Path(settings.methods_path).read_text())
        if into_turn or not 0 <= turn < len(methods):
            return
        sections = methods[list(methods)[turn]]
        with open_dict(self.config):
            self.config.algorithm = sections["algorithm"]
            self.config.actor_rollout_ref.actor = sections["actor"]
        set_what_the_mode_needs(self.config)
        OmegaConf.resolve(self.config)
        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        self.actor_rollout_wg.set_loss_fn(partial(ppo_loss, config=actor))
