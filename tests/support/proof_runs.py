"""First updates of the real actor worker that are, and are not, what was asked for; in a rank of `run_on_ranks`."""

import functools

from actor_worker_runs import as_data, behaviour_log_probs, build_worker, pack
from verl.workers.utils.losses import ppo_loss

M2PO = {"selected": "m2po"}
STALE = {"requested_mode": "stale_k"}


def distilled(config, model_output=None, data=None, dp_group=None):
    """verl's loss for distillation without task rewards, in short: the policy loss is computed and thrown away."""
    _, metrics = ppo_loss(config, model_output, data, dp_group)
    return model_output["log_probs"].values().mean(), metrics


def weighed_by_zero(config, model_output=None, data=None, dp_group=None):
    """The policy loss is there, and changes nothing."""
    loss, metrics = ppo_loss(config, model_output, data, dp_group)
    return 0 * loss + model_output["log_probs"].values().mean(), metrics


def own(config, model_output=None, data=None, dp_group=None):
    """A loss that asks verl's registry for nothing."""
    return model_output["log_probs"].values().mean(), {}


CASES = {
    "m2po": (M2PO, ppo_loss, False),
    "m2po with entropy": (M2PO, ppo_loss, False),
    "vanilla in a mode": (STALE, ppo_loss, True),
    "m2po without the mode": ({**M2PO, **STALE}, ppo_loss, False),
    "vanilla without the mode": (STALE, ppo_loss, False),
    "verl's mode": ({**M2PO, "requested_mode": "colocate_async"}, ppo_loss, False),
    "thrown away": (M2PO, distilled, False),
    "weighed by zero": (M2PO, weighed_by_zero, False),
    "never called": (M2PO, own, False),
    "nothing of ours, thrown away": ({}, distilled, False),
    "loss_mode of ours, thrown away": ({"loss_mode": "no_trust_region"}, distilled, False),
}


def run_first_updates(model_folder, rows):
    """{case: the error of its first update, None for none}, and how often the loss was watched in two updates."""
    errors = {}
    for name, (policy_loss, loss_fn, with_age) in CASES.items():
        worker = build_worker(model_folder, policy_loss)
        old_log_probs = behaviour_log_probs(worker, rows)
        if loss_fn is not ppo_loss:
            worker.set_loss_fn(functools.partial(loss_fn, config=worker.loss_fn.keywords["config"]))
        pack(worker, micro_batch_size=2)
        data = as_data(rows, old_log_probs, len(rows), with_age=with_age, entropy="entropy" in name)
        errors[name] = _error_of(worker, data)
    return errors


def _error_of(worker, data):
    try:
        worker.train_batch(data)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return None


def run_watched_updates(model_folder, rows):
    """Which of three updates, one of them failed otherwise, watched the loss; whether verl has its loss back."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    loss, watched = POLICY_LOSS_REGISTRY["m2po"], []
    worker = build_worker(model_folder, M2PO)
    old_log_probs = behaviour_log_probs(worker, rows)
    pack(worker, micro_batch_size=2)
    data = as_data(rows, old_log_probs, len(rows))
    step = worker.engine.optimizer_step

    def noting():
        watched.append(POLICY_LOSS_REGISTRY["m2po"] is not loss)
        if len(watched) == 1:
            raise FloatingPointError
        return step()

    worker.engine.optimizer_step = noting
    for _ in range(3):
        try:
            worker.train_batch(data)
        except FloatingPointError:
            continue
    return {"watched": watched, "restored": POLICY_LOSS_REGISTRY["m2po"] is loss}


def run_all(model_folder, rows):
    """Both of the above."""
    return run_first_updates(model_folder, rows) | run_watched_updates(model_folder, rows)
