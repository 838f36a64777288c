"""verl's real training worker with its FSDP2 engine on the CPU, inside a rank started by `run_on_ranks`."""

import contextlib
import functools
import os

import packed_attention
import torch
import torch.distributed as dist

VOCABULARY = 32
PROMPT = 3


def save_model(folder):
    """A random Qwen2 with a few thousand parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    # Larger weights than the default, so that log-probs differ from token to token.
    config.initializer_range = 0.3
    Qwen2ForCausalLM(config).save_pretrained(folder)


def rollouts(rows, seed, ages=None):
    """Rows of tokens with unequal lengths, as plain lists: behaviour log-probs come from `behaviour_log_probs`.

    The last row is padding, as verl appends it: it has tokens, but none of them is a response token.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 20, (rows,), generator=generator).tolist()
    data = []
    for row, length in enumerate(lengths):
        response_mask = torch.rand(length, generator=generator) < 0.85
        response_mask[0] = True
        if row == rows - 1:
            response_mask[:] = False
        # A heavy tail, and a different scale for each row: micro-batches that decide alone would disagree.
        noise = torch.randn(length, generator=generator) * 0.1 * (1 + row)
        # The size of the advantage tells the row.
        advantage = (1 + 0.01 * row) * (1 if torch.rand((), generator=generator) < 0.5 else -1)
        data.append(
            {
                "tokens": torch.randint(0, VOCABULARY, (PROMPT + length,), generator=generator),
                "response_mask": response_mask,
                "noise": noise,
                "advantages": torch.full((length,), advantage),
                "age": 0 if ages is None else ages[row],
            }
        )
    return data


def build_worker(
    model_folder, policy_loss, ours=True, lr=0.0, optim=None, sequence_parallel=None, dtype="fp32", strategy="fsdp2"
):
    """verl's training worker (or ours); at learning rate 0 it can train on data again. `optim` wins over `lr`.

    `sequence_parallel` ranks share each sequence, all sequences of a micro-batch in one row; None: one row each.
    """
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import (
        FSDPActorConfig,
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        TrainingWorkerConfig,
    )
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    from verl_m2po.actor.worker import M2POTrainingWorker
    from verl_m2po.losses.config import M2POPolicyLossConfig

    os.environ.update(WORLD_SIZE=str(dist.get_world_size()), RANK=str(dist.get_rank()))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    packed_attention.register()
    model_config = HFModelConfig(
        path=str(model_folder),
        load_tokenizer=False,
        use_remove_padding=sequence_parallel is not None,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": packed_attention.NAME if sequence_parallel else "sdpa"},
    )
    precision = {"param_dtype": dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    engine_config = FSDPEngineConfig(
        strategy=strategy,
        use_torch_compile=False,
        mixed_precision=precision,
        use_remove_padding=sequence_parallel is not None,
        ulysses_sequence_parallel_size=sequence_parallel or 1,
    )
    worker = (M2POTrainingWorker if ours else TrainingWorker)(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model_config,
            engine_config=engine_config,
            optimizer_config=optim or FSDPOptimizerConfig(lr=lr, total_training_steps=10),
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    actor_config = FSDPActorConfig(
        strategy=strategy,
        rollout_n=1,
        use_dynamic_bsz=True,
        use_torch_compile=False,
        policy_loss=M2POPolicyLossConfig(**policy_loss),
    )
    worker.set_loss_fn(functools.partial(ppo_loss, config=actor_config))
    return worker


def pack(worker, micro_batch_size=None, max_tokens=None):
    """Choose how `worker` cuts a mini-batch: by rows or by tokens."""
    worker.engine_config.use_dynamic_bsz = micro_batch_size is None
    worker.engine_config.max_token_len_per_gpu = max_tokens
    worker.engine_config.micro_batch_size_per_gpu = micro_batch_size


def as_data(rows, old_log_probs, global_batch_size, with_age=False, entropy=False, **fields):
    """The TensorDict that verl gives to `train_batch`; `fields` are further ones of tokens, by row."""
    from verl.utils import tensordict_utils as tu

    def nested(values):
        return torch.nested.as_nested_tensor(list(values), layout=torch.jagged)

    def whole(row, response):
        return torch.cat((torch.zeros(PROMPT, dtype=response.dtype), response))

    tensors = {
        "input_ids": nested(row["tokens"] for row in rows),
        "position_ids": nested(torch.arange(len(row["tokens"])) for row in rows),
        "prompts": nested(row["tokens"][:PROMPT] for row in rows),
        "responses": nested(row["tokens"][PROMPT:] for row in rows),
        "response_mask": nested(row["response_mask"] for row in rows),
        "loss_mask": nested(whole(row, row["response_mask"]) for row in rows),
        "advantages": nested(row["advantages"] for row in rows),
        "old_log_probs": nested(old_log_probs),
        **{name: nested(values) for name, values in fields.items()},
    }
    if with_age:
        tensors["age_updates"] = torch.tensor([row["age"] for row in rows])
    settings = {
        "global_batch_size": global_batch_size,
        "temperature": 1.0,
        "calculate_entropy": entropy,
        "disable_auto_offload": True,
    }
    return tu.get_tensordict(tensors, settings)


def behaviour_log_probs(worker, rows):
    """Log-probs of `rows` under the weights of `worker`, plus the noise of each row, on every rank."""
    own = as_data(rows, [torch.zeros(len(row["noise"])) for row in rows], len(rows))
    pack(worker, max_tokens=4096)
    log_ratios = {}
    for tokens, _ in worker.look_ahead(own):
        for log_prob, advantages in zip(tokens.raw_log_prob, tokens.advantages, strict=True):
            row = row_of(advantages)
            # The padding row has no advantages that count.
            log_ratios[len(rows) - 1 if row < 0 else row] = log_prob
    return [log_ratios[i][: len(row["noise"])] - row["noise"] for i, row in enumerate(rows)]


def row_of(advantages):
    return round((advantages.abs().max().item() - 1) / 0.01)


@contextlib.contextmanager
def recording(worker):
    """What happens inside `train_batch`: keep masks and log-probs by row, gradients, the number of looks ahead."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    from verl_m2po.losses.kernel.mini_batch import current_mini_batch

    record = {"keep": {}, "log_probs": {}, "log_probs_ahead": {}, "gradients": {}, "forward_only_passes": 0}
    name = worker.loss_fn.keywords["config"].policy_loss.loss_mode
    loss, step, infer = POLICY_LOSS_REGISTRY[name], worker.engine.optimizer_step, worker.engine.infer_batch
    look_ahead = worker.look_ahead if hasattr(worker, "look_ahead") else None

    def recorded_loss(**arguments):
        result = loss(**arguments)
        mini_batch = current_mini_batch()
        if mini_batch is None or mini_batch.keep is None:
            return result
        columns = (mini_batch.keep, arguments["log_prob"], arguments["advantages"], arguments["response_mask"])
        for keep, log_prob, advantages, response_mask in zip(*columns, strict=True):
            length = int(response_mask.nonzero().max()) + 1 if response_mask.any() else 0
            record["keep"][row_of(advantages)] = keep[:length].tolist()
            if length:
                record["log_probs"][row_of(advantages)] = log_prob[:length].detach().clone()
        return result

    def recorded_look(*arguments, **keywords):
        seen = look_ahead(*arguments, **keywords)
        for tokens, _ in seen:
            columns = (tokens.raw_log_prob, tokens.advantages, tokens.response_mask)
            for log_prob, advantages, response_mask in zip(*columns, strict=True):
                length = int(response_mask.nonzero().max()) + 1 if response_mask.any() else 0
                if length:
                    record["log_probs_ahead"][row_of(advantages)] = log_prob[:length].clone()
        return seen

    def recorded_step():
        for parameter_name, parameter in worker.engine.module.named_parameters():
            record["gradients"][parameter_name] = parameter.grad.full_tensor().clone()
        return step()

    def recorded_infer(*arguments, **keywords):
        record["forward_only_passes"] += 1
        return infer(*arguments, **keywords)

    POLICY_LOSS_REGISTRY[name] = recorded_loss
    worker.engine.optimizer_step, worker.engine.infer_batch = recorded_step, recorded_infer
    if look_ahead is not None:
        worker.look_ahead = recorded_look
    try:
        yield record
    finally:
        POLICY_LOSS_REGISTRY[name] = loss
        worker.engine.optimizer_step, worker.engine.infer_batch = step, infer
        if look_ahead is not None:
            worker.look_ahead = look_ahead


def train(worker, rows, old_log_probs, with_age=False, entropy=False, **fields):
    """One `train_batch` on this rank's share of `rows`; a record of what happened, with its metrics."""
    from verl.utils import tensordict_utils as tu

    engine = worker.engine
    share = torch.arange(len(rows)).tensor_split(engine.get_data_parallel_size())[engine.get_data_parallel_rank()]
    share = share.tolist()
    own = {name: [values[i] for i in share] for name, values in {"old_log_probs": old_log_probs, **fields}.items()}
    data = as_data([rows[i] for i in share], global_batch_size=len(rows), with_age=with_age, entropy=entropy, **own)
    with recording(worker) as record:
        output = worker.train_batch(data)
    # Of ranks that share their sequences, one answers.
    metrics = {} if output is None else tu.get(output, "metrics")
    record["metrics"] = m2po_metrics(metrics)
    record["loss"], record["grad_norm"] = metrics.get("loss"), metrics.get("grad_norm")
    return record


def m2po_metrics(metrics):
    return {name: value for name, value in metrics.items() if name.startswith("actor/m2po/")}


def run_packings(model_folder, rows, packings, policy_loss, entropy=False):
    """{packing: record} of training on `rows` with each way to cut them into micro-batches."""
    worker = build_worker(model_folder, policy_loss)
    old_log_probs = behaviour_log_probs(worker, rows)
    records = {}
    for name, packing in packings.items():
        pack(worker, **packing)
        records[name] = train(worker, rows, old_log_probs, entropy=entropy)
    return records


def run_seams(model_folder, rows):
    """What the worker does where the loss asks for nothing, for statistics, or for what it cannot give."""
    from verl.utils import tensordict_utils as tu

    records = {}
    two_rows = {"micro_batch_size": 2}
    for name, policy_loss in {
        "vanilla": {},
        "vanilla with diagnostics": {"diagnostics": True},
        "no_trust_region": {"selected": "no_trust_region"},
        "m2po by micro_batch": {"selected": "m2po", "m2po": {"scope": "micro_batch"}},
    }.items():
        worker = build_worker(model_folder, policy_loss)
        old_log_probs = behaviour_log_probs(worker, rows)
        pack(worker, **two_rows)
        records[name] = train(worker, rows, old_log_probs)
    worker = build_worker(model_folder, {"selected": "m2po", "m2po": {"subtract_mismatch_floor": True}})
    old_log_probs = behaviour_log_probs(worker, rows)
    pack(worker, max_tokens=4096)
    try:
        train(worker, rows, old_log_probs)
    except ValueError as error:
        records["floor without ages"] = str(error)
    records["floor"] = train(worker, rows, old_log_probs, with_age=True)
    # Rows of age 0 have age 1 for the second update, so the floor stays what it was.
    records["floor, second update"] = train(worker, rows, old_log_probs, with_age=True)
    worker.save_checkpoint(str(model_folder / "checkpoint"))
    restarted = build_worker(model_folder, {"selected": "m2po", "m2po": {"subtract_mismatch_floor": True}})
    restarted.load_checkpoint(str(model_folder / "checkpoint"))
    records["floor after a restart"] = restarted._mismatch_floor
    worker = build_worker(model_folder, {"selected": "m2po"}, ours=False)
    pack(worker, **two_rows)
    try:
        worker.train_batch(as_data(rows, old_log_probs, len(rows)))
    except RuntimeError as error:
        records["verl's own worker"] = str(error)
    worker = build_worker(model_folder, {"selected": "m2po"})
    pack(worker, **two_rows)
    # Two mini-batches of four rows, twice: verl's own loop around `train_batch`.
    data = as_data(rows, old_log_probs, len(rows) // 2)
    tu.assign_non_tensor(data, mini_batch_size=len(rows) // 2, epochs=2)
    with recording(worker) as record:
        output = worker.train_mini_batch(data)
    record["metrics"] = m2po_metrics(tu.get(output, "metrics"))
    records["two mini-batches, two epochs"] = record
    data["advantages"].values()[3] = float("nan")
    try:
        worker.train_mini_batch(data)
    except ValueError as error:
        records["an advantage that is NaN"] = str(error)
    records["looked at ages"] = {age: _looks_at_ages(worker, rows, old_log_probs, age) for age in (0, 4)}
    masked = [row | {"response_mask": torch.zeros_like(row["response_mask"])} for row in rows]
    for name, policy_loss in {"vanilla": {}, "m2po": {"selected": "m2po"}}.items():
        worker = build_worker(model_folder, policy_loss)
        pack(worker, **two_rows)
        records[f"{name}, all masked"] = train(worker, masked, old_log_probs)
    return records


def _looks_at_ages(worker, rows, old_log_probs, age):
    """How often an update on `rows`, all of `age`, looks which of them are new."""
    looks = []
    is_age_zero = worker._is_age_zero
    worker._updates_in_call = 0
    worker._is_age_zero = lambda data: looks.append(len(data)) or is_age_zero(data)
    try:
        train(worker, [row | {"age": age} for row in rows], old_log_probs, with_age=True)
    finally:
        worker._is_age_zero = is_age_zero
    return looks


def weights(worker):
    """All parameters of `worker` in one tensor."""
    return torch.cat([parameter.detach().full_tensor().flatten() for parameter in worker.engine.module.parameters()])


def run_step_scale(model_folder, rows):
    """What one update does to the weights, scaled and not, and where the behaviour log-probs have their own field."""
    plain, scaled = {"lr": 0.01}, {"step_scale": {"power": 0.5}}
    records = {}
    for name, policy_loss in {
        "plain": {},
        "scaled": scaled,
        "proximal policy": {**scaled, "diagnostics": True},
    }.items():
        worker = build_worker(model_folder, policy_loss, **plain)
        behaviour = behaviour_log_probs(worker, rows)
        old, fields = behaviour, {}
        if name == "proximal policy":
            old, fields = proximal_log_probs(behaviour, rows), {"rollout_log_probs": behaviour}
        pack(worker, micro_batch_size=1)
        before = weights(worker)
        record = train(worker, rows, old, **fields)
        groups = worker.engine.optimizer.param_groups
        records[name] = {**record, "moved": weights(worker) - before, "lr": [group["lr"] for group in groups]}
    return records


def proximal_log_probs(behaviour, rows):
    """Log-probs of the current policy, given those of `behaviour_log_probs`: the first update after it was taken."""
    return [old + row["noise"] for old, row in zip(behaviour, rows, strict=True)]


def run_presets(model_folder, rows, presets):
    """{preset: what two updates with it did}; `presets` has their actor settings and whether the ratio is decoupled."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    records = {}
    worker = build_worker(model_folder, {}, lr=1e-4)
    behaviour = behaviour_log_probs(worker, rows)
    proximal = proximal_log_probs(behaviour, rows)
    for name, (actor, is_decoupled) in presets.items():
        worker.set_loss_fn(functools.partial(ppo_loss, config=omega_conf_to_dataclass(actor)))
        old, fields = behaviour, {}
        if is_decoupled:
            ratios = [(new - old).exp().clamp(max=2.0) for new, old in zip(proximal, behaviour, strict=True)]
            old, fields = proximal, {"rollout_log_probs": behaviour, "rollout_is_weights": ratios}
        before = weights(worker)
        packings = ({"micro_batch_size": 2}, {"max_tokens": 4096})
        updates = []
        for packing in packings:
            pack(worker, **packing)
            record = train(worker, rows, old, **fields)
            updates.append({name: record[name] for name in ("loss", "grad_norm", "metrics")})
        records[name] = {"updates": updates, "moved": (weights(worker) - before).abs().max().item()}
    return records


def run_layouts(model_folder, rows, layouts, packing, policy_loss):
    """{layout: record} of training on `rows` with ranks laid out in several ways, from the same old log-probs."""
    records = {}
    old_log_probs = None
    for name, layout in layouts.items():
        worker = build_worker(model_folder, policy_loss, **layout)
        old_log_probs = old_log_probs or behaviour_log_probs(worker, rows)
        pack(worker, **packing)
        records[name] = train(worker, rows, old_log_probs)
    return records


def run_reincarnation(model_folder, rows, folder):
    """How far the reference is from the actor after an update, after the reincarnation, and after a restart."""
    from verl_m2po.staleness.reincarnation import ReincarnatingWorker

    worker = ReincarnatingWorker.__new__(ReincarnatingWorker)
    worker._rank, worker._world_size = dist.get_rank(), dist.get_world_size()
    worker.actor = build_worker(model_folder, {"selected": "no_trust_region"}, lr=1e-2)
    worker.ref = build_worker(model_folder, {"selected": "no_trust_region"})
    pack(worker.actor, max_tokens=4096)
    pack(worker.ref, max_tokens=4096)

    def distance():
        own = as_data(rows, [torch.zeros(len(row["noise"])) for row in rows], len(rows))
        (actor, _), (ref, _) = (each.look_ahead(own)[0] for each in (worker.actor, worker.ref))
        return float((actor.raw_log_prob - ref.raw_log_prob).abs().max())

    behaviour = behaviour_log_probs(worker.actor, rows)
    train(worker.actor, rows, behaviour)
    found = {"after an update": distance(), "states": len(worker.actor.engine.optimizer.state)}
    worker.reincarnate(str(folder))
    found |= {"anew": distance(), "states anew": len(worker.actor.engine.optimizer.state)}
    with torch.no_grad():
        for parameter in worker.ref.engine.module.parameters():
            parameter.add_(0.1)
    found["lost"] = distance()
    worker.load_reference(str(folder))
    found["restarted"] = distance()
    train(worker.actor, rows, behaviour)
    return found | {"states later": len(worker.actor.engine.optimizer.state)}


def run_averaging(model_folder, rows, folder, decay, strategy="fsdp2", updates=3):
    """Updates of `ppo_ewma`: whole weights after each, log-probs of the average before it; the last once more anew."""
    worker = _averaging_worker(model_folder, decay, strategy)
    behaviour = behaviour_log_probs(worker, rows)
    pack(worker, micro_batch_size=2)
    found = {"weights": [whole_weights(worker)], "ahead": [], "loss": []}

    def update(worker):
        record = train(worker, rows, behaviour)
        found["ahead"].append(record["log_probs_ahead"])
        found["loss"].append(record["loss"])
        found["weights"].append(whole_weights(worker))

    for _ in range(updates):
        update(worker)
    worker.save_checkpoint(str(folder))
    update(worker)
    restarted = _averaging_worker(model_folder, decay, strategy)
    restarted.load_checkpoint(str(folder))
    pack(restarted, micro_batch_size=2)
    update(restarted)
    return found


def _averaging_worker(model_folder, decay, strategy):
    policy_loss = {"selected": "ppo_ewma", "ppo_ewma": {"decay": decay}}
    return build_worker(model_folder, policy_loss, lr=0.01, strategy=strategy)


def whole_weights(worker):
    """{name: parameter} of all ranks together."""
    tensors, _ = worker.engine.get_per_tensor_param()
    return {name: tensor.detach().clone() for name, tensor in tensors}


def run_averaging_kinds():
    """{kind of sharding: outputs with the mean of two weights in place, and with its own weights before and after}."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def second_version(gives_up):
        def make(module):
            for part in (module[0], module):
                fully_shard(part, mesh=mesh, reshard_after_forward=gives_up)
            return module

        return make

    kinds = {
        "none": lambda module: module,
        "fsdp2": second_version(True),
        "fsdp2 that keeps what it has gathered": second_version(False),
        "fsdp": lambda module: FullyShardedDataParallel(module, device_id=torch.device("cpu")),
    }
    return {name: _outputs_around_a_mean(make) for name, make in kinds.items()}


def _outputs_around_a_mean(make):
    from types import SimpleNamespace

    from verl_m2po.actor.averaged import AveragedPolicy

    torch.manual_seed(0)
    rows = torch.randn(5, 4)
    module = make(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)))
    policy = AveragedPolicy(SimpleNamespace(module=module), decay=0.5, state=None)
    module(rows).square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.01).step()
    policy.weights.update()
    with torch.no_grad():
        before = module(rows)
        with policy.in_place():
            mean = module(rows)
        return mean, before, module(rows)
