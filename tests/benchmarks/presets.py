"""`python -m benchmarks.presets`: what the loss of each option of the group `loss` costs, against `vanilla`."""

import sys
from collections import deque
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from generate_gallery import NEEDED, compose_run, presets
from omegaconf import OmegaConf
from pages import processor, replace_section
from rich.console import Console
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig

from benchmarks.batches import Batch, make_batch
from benchmarks.measure import median, seconds
from verl_m2po.ground.verl_config import has_proximal_policy
from verl_m2po.losses.kernel import diagnostics
from verl_m2po.losses.kernel.mini_batch import MiniBatch, training
from verl_m2po.losses.kernel.registry import LOSSES
from verl_m2po.losses.kernel.tokens import tokens_of

SECTION = "methods"
TOKENS, MASKED = 51 * 1024, 0.01
BASE = "vanilla"


class PresetCall:
    """The loss of one preset on one batch, forward and backward, as our actor worker calls it."""

    def __init__(self, name: str, batch: Batch):
        config = compose_run("ppo_trainer", f"loss={name}", *NEEDED)
        OmegaConf.resolve(config.actor_rollout_ref.actor)
        self.batch = batch
        self.actor: ActorConfig = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        self.actor.global_batch_info.update(
            dp_size=1, batch_num_tokens=int(batch.response_mask.sum()), global_batch_size=len(batch.log_prob)
        )
        self.loss: Callable[..., Any] = get_policy_loss_fn(self.actor.policy_loss.loss_mode)
        # The trainer makes them, once a step.
        self.weights = torch.ones_like(batch.log_prob) if has_proximal_policy(config) else None
        self.decision = decide(self.actor, batch)

    def __call__(self) -> None:
        log_prob = self.batch.log_prob.detach().requires_grad_()
        averaged = deque([self.batch.old_log_prob])
        with training(MiniBatch(decision=self.decision, averaged=averaged)) as mini_batch:
            loss, _ = self.loss(
                old_log_prob=self.batch.old_log_prob,
                log_prob=log_prob,
                advantages=self.batch.advantages,
                response_mask=self.batch.response_mask,
                loss_agg_mode=self.actor.loss_agg_mode,
                config=self.actor,
                rollout_is_weights=self.weights,
            )
        loss.backward()
        if mini_batch.sums:
            diagnostics.added_up(mini_batch.sums).tolist()


def decide(actor: ActorConfig, batch: Batch) -> Any:
    """What the actor worker decides over the mini-batch before the loss is called; None for most."""
    loss = LOSSES.get(actor.policy_loss.loss_mode)
    if loss is None or loss.decision is None:
        return None
    search = loss.decision.search(loss.settings_in(actor), 0.0)
    search.add(tokens_of(batch.log_prob, batch.old_log_prob, batch.advantages, batch.response_mask))
    return search.solve()


def main(
    out: Annotated[Path | None, typer.Option(help="Markdown file whose marked section is replaced.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds that count.", min=1)] = 41,
) -> None:
    """Forward and backward of the loss of every preset, in turns in one process."""
    torch.set_num_threads(1)
    batch = make_batch(TOKENS, MASKED, torch.float32, "cpu")
    names = [BASE, *(name for name in presets() if name != BASE)]
    medians = [median(times) for times in seconds([PresetCall(name, batch) for name in names], rounds)]
    lines = [
        f"`python -m benchmarks.presets {' '.join(sys.argv[1:])}`, {date.today()}, one thread of {processor()}, "
        f"torch {torch.__version__}, seed 0. {TOKENS:,} tokens, float32, processor time, median of {rounds} rounds.",
        "",
        "| `loss=` | ns a token | times `vanilla` |",
        "|---|---:|---:|",
    ]
    for name, taken in sorted(zip(names, medians, strict=True)):
        lines.append(f"| `{name}` | {taken / TOKENS * 1e9:.0f} | {taken / medians[0]:.2f} |")
    table = "\n".join(lines)
    if out is None:
        Console().print(table, markup=False, soft_wrap=True)
    else:
        replace_section(out, SECTION, table)


if __name__ == "__main__":
    typer.run(main)
