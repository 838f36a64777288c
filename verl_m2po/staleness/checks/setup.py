"""Does the run use a part of verl that the mode replaces, or lack the devices that it needs?"""

from collections.abc import Iterator

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.settings import Number
from verl_m2po.ground.verl_config import TRAINER_MODE, read
from verl_m2po.staleness.config import SEPARATE_MODES

_ROLLOUT = "actor_rollout_ref.rollout"
_SWITCH = "trainer.v1.separate_async.hybrid_rollout.enable_switch"
_HYBRID = "actor_rollout_ref.hybrid_engine"
_DISAGGREGATED = f"{_ROLLOUT}.disaggregation.enabled"
_SAMPLER = "trainer.v1.sampler.custom_sampler.path"
_MANAGER = f"{_ROLLOUT}.agent.agent_loop_manager_class"
_SKIP = "skip.rollout_tq.enable"

_OPTION = "Add staleness=bounded_async or staleness=s64_separate, with hardware=eight_gpu_separate or cpu"


def replaced(config: DictConfig) -> Iterator[Problem]:
    """Yield what cannot work beside the mode."""
    mode = read(config, TRAINER_MODE)
    if not read(config, "trainer.use_v1", True):
        why = f"the trainer mode {mode} exists in verl's v1 trainer only"
        yield Problem("trainer.use_v1", False, why, "Set it to true")
    if read(config, _SKIP):
        yield Problem(_SKIP, True, "skipped rollouts have no weight version", "Set it to false")
    sampler = read(config, _SAMPLER)
    # hardware=cpu sets one of ours, which only makes verl's own buffer poll faster; it is not used here.
    if sampler is not None and not str(sampler).startswith("pkg://verl_m2po."):
        yield Problem(_SAMPLER, sampler, f"the mode {mode} brings its own sampler", "Remove it")
    manager = read(config, _MANAGER)
    if manager is not None and not str(manager).startswith("verl_m2po."):
        why = f"the mode {mode} needs verl_m2po.staleness.rollout.manager.StalenessAgentLoopManager"
        yield Problem(_MANAGER, manager, why, "Remove it; custom agent loops are not affected")


def lending(config: DictConfig) -> Iterator[Problem]:
    """Yield what keeps verl from lending the training devices to the rollout; verl ignores the key, or ends late."""
    mode = read(config, TRAINER_MODE)
    if not read(config, _SWITCH):
        return
    if mode not in SEPARATE_MODES:
        why = f"in the mode {mode} trainer and rollout share their devices anyway"
        yield Problem(_SWITCH, True, why, "Set it to false")
    elif read(config, _HYBRID) is False:
        why = f"there is no rollout on the training devices that could be lent ({_HYBRID}=false)"
        yield Problem(_SWITCH, True, why, f"Set {_HYBRID}=true, or this to false")
    elif read(config, _DISAGGREGATED):
        why = f"verl cannot lend devices to a rollout in which prefill has devices of its own ({_DISAGGREGATED})"
        yield Problem(_SWITCH, True, why, "Set one of them to false")


def asynchronous_saving(config: DictConfig) -> Iterator[Problem]:
    """Yield a save that never ends. Only Megatron writes in the background; every other engine of verl at once."""
    for role in ("actor_rollout_ref.actor", "critic"):
        if read(config, f"{role}.checkpoint.async_save") and read(config, f"{role}.strategy") == "megatron":
            why = (
                "Megatron then writes in the background, and nothing in verl's v1 trainer asks for the end of it "
                "(async_calls_finalize_fn_exec), so that no checkpoint ever becomes whole"
            )
            yield Problem(f"{role}.checkpoint.async_save", True, why, "Set it to false")


def devices(config: DictConfig) -> Iterator[Problem]:
    """Yield what a separate mode lacks to generate; verl asks in an assertion, and after Ray has started."""
    mode = read(config, TRAINER_MODE)
    if mode not in SEPARATE_MODES:
        return
    for name, what in (("nnodes", "node"), ("n_gpus_per_node", "device of such a node")):
        value = Number(f"{_ROLLOUT}.{name}", 0, may_be_null=True).of(config)
        if not value:
            why = f"the mode {mode} generates on devices of its own, and no {what} is given to it"
            yield Problem(f"{_ROLLOUT}.{name}", value, why, f"{_OPTION}, or set it to 1 or more")
    backend = read(config, f"{_ROLLOUT}.checkpoint_engine.backend")
    if backend in (None, "naive"):
        why = "it moves weights within one process, and the rollout has processes of its own"
        remedy = f"{_OPTION}, or set it to nccl (gloo on the CPU)"
        yield Problem(f"{_ROLLOUT}.checkpoint_engine.backend", backend, why, remedy)
    if read(config, _HYBRID) is not False and not read(config, _SWITCH):
        why = f"verl keeps a second rollout on the training devices, which the mode {mode} asks in validations alone"
        remedy = f"Set it to false to have the memory, or lend the devices: {_SWITCH}=true"
        yield Problem(_HYBRID, True, why, remedy, is_fatal=False)
