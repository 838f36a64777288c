"""The first trainer steps of the experiment bench, and of verl's real actor worker on the same batches."""

import functools

import torch
from actor_worker_runs import build_worker, pack

OVERRIDES = [
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.rollout.n=4",
    "trainer.v1.trainer_mode=stale_k",
    "trainer.v1.stale_k.staleness_updates=4",
    "trainer.total_training_steps=3",
    # Large steps and a small threshold: batches that are a step old are clipped and masked.
    "actor_rollout_ref.actor.optim.lr=3e-3",
    "actor_rollout_ref.actor.policy_loss.m2po.threshold=0.004",
]


# Losses under another name, with further overrides.
MICRO_ROWS = 4
VARIANTS = {
    "m2po_by_micro_batch": [
        "loss=m2po",
        "actor_rollout_ref.actor.policy_loss.m2po.scope=micro_batch",
        "actor_rollout_ref.actor.use_dynamic_bsz=false",
        f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={MICRO_ROWS}",
    ]
}


def run_both(losses, model_folder, steps):
    """{loss: (bench, verl)}, each with metrics by trainer step and all parameters at the end."""
    return {loss: _run_both(loss, model_folder, steps) for loss in losses}


def _run_both(loss, model_folder, steps):
    from verl_m2po.one_process import setup as setups
    from verl_m2po.one_process.train import Bench

    overrides = [*OVERRIDES, *VARIANTS.get(loss, [f"loss={loss}"])]
    setup = setups.read(overrides)
    bench = Bench(setup, model_folder, digits=2)
    batches, metrics = [], []
    for step in range(1, steps + 1):
        data = bench.batch(step)
        batches.append(data.batch.clone())
        metrics.append(_plain(bench.learner.train_step(data.batch)))
    ours = {"metrics": metrics, "parameters": {n: p.detach() for n, p in bench.model.named_parameters()}}
    return ours, _verl(setups.read(overrides), model_folder, batches)


def _verl(setup, model_folder, batches):
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.losses import ppo_loss

    worker = build_worker(model_folder, {}, optim=setup.actor.optim)
    worker.set_loss_fn(functools.partial(ppo_loss, config=setup.actor))
    pack(worker, None if setup.actor.use_dynamic_bsz else MICRO_ROWS, max_tokens=4096)
    metrics = []
    for batch in batches:
        output = worker.train_mini_batch(_as_verl_sends_it(batch, setup))
        metrics.append(tu.get(output, "metrics"))
    parameters = {name: parameter.full_tensor().detach() for name, parameter in worker.engine.module.named_parameters()}
    return {"metrics": [_plain(step) for step in metrics], "parameters": parameters}


def _plain(metrics):
    """The actor's metrics of each update as numbers."""
    return {
        name: [float(value.aggregate() if hasattr(value, "aggregate") else value) for value in values]
        for name, values in metrics.items()
        if name.startswith("actor/") or name in ("grad_norm", "lr")
    }


def _as_verl_sends_it(batch, setup):
    """Ragged rows without what follows the end of the turn."""
    from verl.utils import tensordict_utils as tu

    prompt, lengths = batch["prompts"].shape[1], batch["response_mask"].sum(-1).tolist()

    def nested(rows):
        return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)

    def response(name):
        return [row[:length] for row, length in zip(batch[name], lengths, strict=True)]

    whole = [torch.cat(pair) for pair in zip(batch["prompts"], response("responses"), strict=True)]
    is_response = [torch.arange(len(row)) >= prompt for row in whole]
    names = ["responses", "response_mask", "rollout_log_probs", "old_log_probs", "advantages"]
    if "rollout_is_weights" in batch.keys():  # noqa: SIM118 (a TensorDict)
        names.append("rollout_is_weights")
    tensors = {
        "input_ids": nested(whole),
        "position_ids": nested(torch.arange(len(row)) for row in whole),
        "prompts": nested(batch["prompts"]),
        "loss_mask": nested(is_response),
        "age_updates": batch["age_updates"],
        **{name: nested(response(name)) for name in names},
    }
    rows = setup.actor.ppo_mini_batch_size * setup.responses
    settings = {
        "global_batch_size": rows,
        "mini_batch_size": rows,
        "epochs": setup.actor.ppo_epochs,
        "temperature": 1.0,
        "calculate_entropy": setup.actor.calculate_entropy,
    }
    return tu.get_tensordict(tensors, settings)
