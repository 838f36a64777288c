"""What a run does, in a dozen lines: verl prints its whole configuration, over a thousand lines, and no summary."""

from collections.abc import Iterator

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from verl_m2po.ground.verl_config import TRAINER_MODE, read
from verl_m2po.staleness.config import SEPARATE_MODES, is_chosen, load_mode_config, make_clock

TITLE = "verl-m2po: this run"


def print_summary(config: DictConfig) -> None:
    """Print the summary of a run whose `config` has passed the checks to this process's standard output.

    Raises:
        WrongValue: the settings of the mode cannot be loaded.
        StalenessUnitsError: its batch sizes make no whole number of optimizer updates.
    """
    table = Table(title=TITLE, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))
    for name, value in lines(config):
        table.add_row(name, value)
    # As wide as it needs: a path that is cut cannot be copied.
    Console(width=200).print(table)


def lines(config: DictConfig) -> Iterator[tuple[str, str]]:
    """Yield what matters of `config`, as pairs of a name and a value.

    Raises:
        WrongValue: the settings of the mode cannot be loaded.
        StalenessUnitsError: its batch sizes make no whole number of optimizer updates.
    """
    yield "trainer mode", f"{read(config, TRAINER_MODE)}: {_what_the_mode_promises(config)}"
    yield "policy loss", _policy_loss(config)
    yield "advantages", str(read(config, "algorithm.adv_estimator"))
    yield "trainer step", _trainer_step(config)
    yield "learning rate", str(read(config, "actor_rollout_ref.actor.optim.lr"))
    yield "model", str(read(config, "actor_rollout_ref.model.path"))
    yield "training data", str(read(config, "data.train_files"))
    yield "length", _length(config)
    yield "checkpoints", _checkpoints(config)


def _what_the_mode_promises(config: DictConfig) -> str:
    if not is_chosen(config):
        return "verl's own; the age of its rollouts is not under the control of verl-m2po"
    mode = read(config, TRAINER_MODE)
    updates = load_mode_config(config, mode).staleness_updates
    steps = make_clock(config).steps(updates)
    age = f"{updates} optimizer updates ({steps} trainer steps) old"
    devices = "rollout on devices of its own" if mode in SEPARATE_MODES else "trainer and rollout share the devices"
    if updates == 0:
        return f"every token on-policy; {devices}"
    return f"every token {'exactly' if mode.startswith('stale_k') else 'at most'} {age}; {devices}"


def _policy_loss(config: DictConfig) -> str:
    ours = read(config, "algorithm.policy_loss")
    return str(ours if ours is not None else read(config, "actor_rollout_ref.actor.policy_loss.loss_mode"))


def _trainer_step(config: DictConfig) -> str:
    prompts, responses = read(config, "data.train_batch_size"), read(config, "actor_rollout_ref.rollout.n")
    batch = f"{prompts} prompts x {responses} responses"
    if not is_chosen(config):
        return batch
    return f"{batch}, {make_clock(config).updates_per_step} optimizer updates"


def _length(config: DictConfig) -> str:
    steps, epochs = read(config, "trainer.total_training_steps"), read(config, "trainer.total_epochs")
    return f"{epochs} epochs" if steps is None else f"{steps} trainer steps, at most {epochs} epochs"


def _checkpoints(config: DictConfig) -> str:
    every, folder = read(config, "trainer.save_freq"), read(config, "trainer.default_local_dir")
    if every is None or every < 1:
        return "none"
    return f"every {every} trainer steps in {folder}; trainer.resume_mode={read(config, 'trainer.resume_mode')}"
