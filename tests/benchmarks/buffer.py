# pyright: reportAbstractUsage=false
# tensordict's tensor classes are made at run time.
"""`python -m benchmarks.buffer`: what taking a batch costs, by how many rollouts wait, beside verl's own buffer.

A real TransferQueue with one storage unit, and the batches of stale-256 in the paper: 256 prompts x 8 responses. Times
are those that the processor worked for all processes that take part, which a busy machine does not distort. A step
waits for what is left to do when its batch was unpacked while the one before trained. Bytes are the growth of the
storage process, which is a fresh one each time.
"""

import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import psutil
import ray
import torch
import transfer_queue as tq
import typer
from omegaconf import DictConfig, OmegaConf
from pages import processor, replace_section
from rich.console import Console
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from verl.trainer.ppo.v1.replay_buffer import ReplayBufferAsync
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_m2po.staleness.account.metrics import StalenessMetrics
from verl_m2po.staleness.buffer import StalenessReplayBuffer
from verl_m2po.staleness.rows import codec, media
from verl_m2po.staleness.rows.store import lot_partition, training_partition
from verl_m2po.staleness.rule.exact import ExactStale
from verl_m2po.staleness.rule.failures import FailureWindow
from verl_m2po.staleness.rule.records import Row
from verl_m2po.staleness.rule.units import UpdateClock
from verl_m2po.staleness.watch.stop import StopRequest

SECTION = "buffer"
PROMPTS, RESPONSES, PROMPT_TOKENS = 256, 8, 32
ROWS = PROMPTS * RESPONSES
PATCH = 14


def main(
    out: Annotated[Path | None, typer.Option(help="Markdown file whose marked section is replaced.")] = None,
    depths: Annotated[list[int] | None, typer.Option(help="Batches that wait. Repeat for several.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each response.", min=1)] = 1000,
    rounds: Annotated[int, typer.Option(help="Batches to take at each depth.", min=1)] = 3,
    side: Annotated[int, typer.Option(help="Pixels of a side of an image in each prompt; 0: none.", min=0)] = 0,
) -> None:
    """Milliseconds to take one batch of 2,048 trajectories out, and bytes of each that waits."""
    torch.set_num_threads(1)
    ray.init(
        "local", num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20, _node_ip_address="127.0.0.1"
    )
    lines = [
        f"`python -m benchmarks.buffer --tokens {tokens} --rounds {rounds}{f' --side {side}' if side else ''}`, "
        f"{date.today()}, {processor()}: batches of {ROWS:,} trajectories of {PROMPT_TOKENS} + {tokens} tokens"
        f"{f' and an image of {side} x {side} pixels a prompt' if side else ''}. Median of {rounds}, in milliseconds "
        "of processor time over all processes; a step waits when its batch was unpacked ahead; bytes of the storage "
        "process per trajectory that waits.",
        "",
        "| waiting | verl: sample | ours: decision | ours: sample | ours: a step waits | verl: bytes | ours: bytes |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    try:
        for depth in depths or [1, 16, 65]:
            verls, verls_bytes = _rounds(depth, rounds, lambda d: _fill_verls(d, tokens, side))
            ours, our_bytes = _rounds(depth, rounds, lambda d: _fill_ours(d, tokens, side, prefetch=False))
            decision, sample = (statistics.median(values) * 1e3 for values in zip(*ours, strict=True))
            # The first batch of a store is not unpacked ahead.
            deep = max(depth, rounds + 1)
            ahead = _rounds(deep, rounds + 1, lambda d: _fill_ours(d, tokens, side, prefetch=True))[0][1:]
            waits = statistics.median(taken for _, taken in ahead) * 1e3
            lines.append(
                f"| {depth * ROWS:,} | {statistics.median(taken for (taken,) in verls) * 1e3:.0f} | {decision:.1f} | "
                f"{sample:.0f} | {waits:.0f} | {verls_bytes:,.0f} | {our_bytes:,.0f} |"
            )
            Console().print(lines[-1], markup=False)
    finally:
        ray.shutdown()
    if out is not None:
        replace_section(out, SECTION, "\n".join(lines))


Take = Callable[[int], tuple[float, ...]]


def _rounds(depth: int, rounds: int, fill: Callable[[int], Take]) -> tuple[list[tuple[float, ...]], float]:
    """Times of `rounds` batches taken at about that depth, and bytes per waiting trajectory."""
    times: list[tuple[float, ...]] = []
    sizes = []
    while len(times) < rounds:
        tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
        before = _storage_bytes()
        take = fill(depth)
        sizes.append((_storage_bytes() - before) / (depth * ROWS))
        times += [take(step) for step in range(1, 1 + min(depth, rounds - len(times)))]
        tq.close()
    return times, statistics.median(sizes)


def _processes() -> list[psutil.Process]:
    """This process and TransferQueue's."""
    this = psutil.Process()
    return [
        this,
        *(child for child in this.children(recursive=True) if child.name().startswith(("ray::Simple", "ray::Tr"))),
    ]


def _storage_bytes() -> int:
    return sum(each.memory_info().rss for each in _processes() if each.name().startswith("ray::SimpleStor"))


def _worked_s() -> float:
    """Processor seconds of all processes that take part, so far."""
    return sum(sum(each.cpu_times()[:2]) for each in _processes())


def _row(tokens: int, session: int) -> dict[str, Any]:
    """A trajectory as verl's agent loop writes it."""
    prompts, responses = torch.randint(1000, (PROMPT_TOKENS,)), torch.randint(1000, (tokens,))
    mask = torch.ones_like(responses)
    return {
        "prompts": prompts,
        "responses": responses,
        "response_mask": mask,
        "loss_mask": mask,
        "input_ids": torch.cat([prompts, responses]),
        "position_ids": torch.arange(PROMPT_TOKENS + tokens),
        "rollout_log_probs": torch.randn(tokens),
        "rm_scores": torch.zeros(tokens),
        "num_turns": 2,
        "session_id": session,
        "multi_modal_inputs": {},
        "extra_fields": {"reward_extra_info": {"acc": 1.0}, "turn_scores": [], "tool_rewards": []},
    }


def _rows(tokens: int, side: int) -> list[dict[str, Any]]:
    """Those of a batch, group after group, with the patches that Qwen2-VL's processor makes of an image."""
    rows = []
    for i in range(ROWS):
        rows.append(_row(tokens, i % RESPONSES))
        if side and i % RESPONSES == 0:
            grid = torch.tensor([[1, side // PATCH, side // PATCH]])
            seen = {"pixel_values": torch.rand(int(grid.prod()), 6 * PATCH**2), "image_grid_thw": grid}
        if side:
            rows[-1] |= {"multi_modal_inputs": dict(seen), "position_ids": rows[-1]["position_ids"].expand(4, -1)}
    return rows


def _packed(keys: list[str], rows: list[dict[str, Any]], side: int) -> TensorDict:
    pools = [media.Pool() if side else None for _ in range(PROMPTS)]
    packed = [codec.pack(row, key, pools[i // RESPONSES]) for i, (key, row) in enumerate(zip(keys, rows, strict=True))]
    return list_of_dict_to_tensordict(packed)


def _prompt(uid: str) -> dict[str, Any]:
    return {
        "uid": uid,
        "raw_prompt": [{"role": "user", "content": "What is 12+34?"}],
        "reward_model": {"ground_truth": "46", "style": "rule"},
        "data_source": "arithmetic",
    }


def _fill_verls(depth: int, tokens: int, side: int) -> Take:
    buffer = ReplayBufferAsync(
        trainer_mode="separate_async",
        trainer_config=DictConfig({}),
        max_off_policy_threshold=None,
        max_off_policy_strategy="drop",
        sampler_kwargs=DictConfig({}),
        poll_interval=0.02,
        refill_fn=lambda _: None,
    )
    fields = list_of_dict_to_tensordict([row | _prompt("uid") for row in _rows(tokens, side)])
    for lot in range(depth):
        uids = [f"v{lot}g{i}" for i in range(PROMPTS)]
        tags = [{"is_prompt": True, "status": "finished", "global_steps": 1} for _ in uids]
        tq.kv_batch_put(keys=uids, partition_id="train", tags=tags)
        keys = [f"{uid}_{session}_0" for uid in uids for session in range(RESPONSES)]
        tag = {"status": "success", "seq_len": PROMPT_TOKENS + tokens, "min_global_steps": 0, "max_global_steps": 0}
        tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=[dict(tag) for _ in keys])

    def take(step: int) -> tuple[float]:
        before_s = _worked_s()
        batch, _ = buffer.sample(step, "train", PROMPTS)
        taken = _worked_s() - before_s
        assert len(batch.keys) == ROWS
        tq.kv_clear(keys=batch.keys, partition_id="train")
        return (taken,)

    return take


class _Silence:
    """Agent loop workers that have nothing to say."""

    def wait(self, timeout_s: float) -> list:
        return []

    def abort(self, uids: list[str]) -> None:
        return


def _fill_ours(depth: int, tokens: int, side: int, prefetch: bool) -> Take:
    rule = ExactStale(depth - 1, PROMPTS)
    rule.limit(depth)
    buffer = StalenessReplayBuffer(
        rule=rule,
        metrics=StalenessMetrics(UpdateClock(PROMPTS, PROMPTS)),
        failures=FailureWindow(),
        stop=StopRequest(wait_s=0.0),
        dispatch=lambda _: None,
        trainer_mode="stale_k",
        trainer_config={},
        prefetch=prefetch,
    )
    buffer.connect(_Silence())
    rows, fields = _rows(tokens, side), None
    for lot in range(depth):
        uids = [f"o{lot}g{i}" for i in range(PROMPTS)]
        columns = {key: NonTensorStack(*[_prompt(uid)[key] for uid in uids]) for key in _prompt("")}
        buffer.open_groups(uids, list(range(PROMPTS)), TensorDict(columns, batch_size=[PROMPTS]))
        keys = [f"{uid}_{session}_0" for uid in uids for session in range(RESPONSES)]
        if fields is None or side:  # images name the row that they lie with
            fields = _packed(keys, rows, side)
        tq.kv_batch_put(keys=keys, partition_id=lot_partition(lot), fields=fields)
        for i, uid in enumerate(uids):
            of_group = keys[i * RESPONSES : (i + 1) * RESPONSES]
            rule.finish(uid, tuple(Row(key, PROMPT_TOKENS, tokens, ((0, tokens),)) for key in of_group))
    decided: list[float] = []
    select = rule.select

    def timed_select(version: int, count: int):
        began_at = time.thread_time()
        selection = select(version, count)
        decided.append(time.thread_time() - began_at)
        return selection

    rule.select = timed_select  # pyright: ignore[reportAttributeAccessIssue]

    def take(step: int) -> tuple[float, float]:
        buffer.version = step - 1
        before_s = _worked_s()
        batch, _ = buffer.sample(step, "train", PROMPTS)
        taken = _worked_s() - before_s
        assert len(batch.keys) == ROWS
        buffer.prefetch.look()
        buffer.prefetch.wait()  # the batch trains
        tq.kv_clear(keys=batch.keys, partition_id=training_partition(step - 1))
        return sum(decided[-1:]), taken

    return take


if __name__ == "__main__":
    typer.run(main)
