"""What each method does to a token, drawn from the registered functions themselves: python docs/generate_gallery.py.

For every preset of the group `loss` this composes verl's config, calls the registered loss on tokens of known ratio,
and reads from the gradient how hard each token is pushed. Nothing here knows a formula.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

RATIOS = (0.2, 0.8, 1.0, 1.25, 5.0)
SIGNS = (1.0, -1.0)
# Probability of a token under the behaviour policy: 5 times it is still a probability.
BEHAVIOUR_PROBABILITY = 0.15
# The grid of a plot, log-spaced from 1/6 to 6.
POINTS = 145
LARGEST = 6.0
# Colours of A > 0 and A < 0.
POSITIVE, NEGATIVE = "#1b7837", "#b2182b"

# What verl's own config needs to compose.
NEEDED = ("actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.actor.use_dynamic_bsz=true")

# What a preset cannot say on its own in a batch of one-token responses.
OVERRIDES: dict[str, tuple[str, ...]] = {
    # In units of REINFORCE's gradient, so that it can be compared.
    "oapl": ("actor_rollout_ref.actor.policy_loss.oapl.unit_gradient=true",),
    # A batch of four updates ago.
    "decoupled_loglinear": ("actor_rollout_ref.actor.policy_loss.decoupled_loglinear.staleness_updates=4",),
}


class Push(NamedTuple):
    """How hard tokens are pushed: the derivative of minus the loss with respect to log pi, an on-policy token's is 1.

    Args:
        ratio: current over behaviour policy, [points].
        positive: Where A = 1, [points].
        negative: Where A = -1, [points].
    """

    ratio: Tensor
    positive: Tensor
    negative: Tensor


def presets() -> list[str]:
    """Names of the group `loss`."""
    folder = resources.files("verl_m2po.config") / "loss"
    return sorted(e.name.removesuffix(".yaml") for e in folder.iterdir() if e.name.endswith(".yaml"))


@cache
def preset_config(name: str) -> DictConfig:
    """verl's config with the preset `name` and what a plot of it needs."""
    return compose_run("ppo_trainer", f"loss={name}", *NEEDED, *OVERRIDES.get(name, ()), *_decides_alone(name))


def _decides_alone(name: str) -> Iterator[str]:
    """Let a loss that decides over the mini-batch decide over the plotted tokens themselves."""
    from verl_m2po.losses.kernel.registry import LOSSES
    from verl_m2po.losses.kernel.settings import KEY

    for loss in LOSSES.values():
        if name in loss.presets and hasattr(loss.settings, "scope"):
            yield f"{KEY}.{loss.name}.scope=micro_batch"


def compose_run(config_name: str, *overrides: str) -> DictConfig:
    """The config of a run, as verl's main would compose it."""
    GlobalHydra.instance().clear()
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(config_name, overrides=list(overrides))


def grid() -> Tensor:
    """Ratios from 1/6 to 6, among them all of `RATIOS`, ascending."""
    limit = torch.tensor(LARGEST, dtype=torch.float64).log()
    spaced = torch.linspace(-float(limit), float(limit), POINTS, dtype=torch.float64).exp()
    return torch.cat((spaced, torch.tensor(RATIOS, dtype=torch.float64))).unique()


def push(name: str, ratio: Tensor | None = None) -> Push:
    """How the preset `name` pushes tokens of these ratios, each a response of its own, all in one batch.

    A preset with a proximal policy is drawn at the first update after that policy was taken, where it is the current
    one. A loss with statistics of its batch sees the tokens of both signs as that batch.
    """
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.utils.config import omega_conf_to_dataclass

    config = preset_config(name)
    OmegaConf.resolve(config.actor_rollout_ref.actor)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    ratio = grid() if ratio is None else ratio
    advantages = torch.tensor(SIGNS, dtype=torch.float64).repeat_interleave(len(ratio)).unsqueeze(-1)
    behaviour = torch.full_like(advantages, BEHAVIOUR_PROBABILITY).log()
    log_prob = (behaviour + ratio.log().repeat(2).unsqueeze(-1)).requires_grad_()
    tokens = {"response_mask": torch.ones_like(advantages, dtype=torch.bool), "old_log_prob": behaviour}
    if not config.algorithm.rollout_correction.bypass_mode and config.algorithm.rollout_correction.rollout_is:
        tokens |= _decoupled(log_prob.detach(), tokens, config.algorithm.rollout_correction)
    actor.global_batch_info.update(dp_size=1, batch_num_tokens=len(advantages), global_batch_size=len(advantages))
    policy_loss: Callable[..., Any] = get_policy_loss_fn(actor.policy_loss.loss_mode)
    with _looked_ahead(actor.policy_loss.loss_mode, log_prob.detach()):
        loss, _ = policy_loss(
            log_prob=log_prob, advantages=advantages, loss_agg_mode=actor.loss_agg_mode, config=actor, **tokens
        )
    loss.backward()
    assert log_prob.grad is not None
    pushes = (-log_prob.grad * len(advantages) * advantages).squeeze(-1)
    # Against the advantage's own direction, so that "as REINFORCE" is 1 for both signs.
    return Push(ratio, *pushes.chunk(2))


def _looked_ahead(loss_mode: str, current: Tensor) -> AbstractContextManager[Any]:
    """What the actor worker gives a loss around an average of weights, when these have not moved yet."""
    from verl_m2po.losses.kernel.mini_batch import MiniBatch, training
    from verl_m2po.losses.kernel.registry import LOSSES

    loss = LOSSES.get(loss_mode)
    if loss is None or loss.averaging_decay is None:
        return nullcontext()
    return training(MiniBatch(averaged=deque([current])))


def _decoupled(current: Tensor, tokens: dict[str, Tensor], correction: DictConfig) -> dict[str, Tensor]:
    """What verl's trainer makes of a batch when the proximal policy has just been taken."""
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

    names = ("rollout_is", "rollout_is_threshold", "rollout_rs", "rollout_rs_threshold", "rollout_is_batch_normalize")
    weights, mask, _ = compute_rollout_correction_and_rejection_mask(
        old_log_prob=current,
        rollout_log_prob=tokens["old_log_prob"],
        response_mask=tokens["response_mask"],
        **{name: correction[name] for name in names},
    )
    assert weights is not None
    return {
        "old_log_prob": current,
        "response_mask": mask.bool(),
        "rollout_is_weights": weights.batch["rollout_is_weights"],
    }


def advantage_table(name: str, size: int = 8) -> tuple[list[float], list[float]]:
    """Advantages by the estimator `name` of a right and of a wrong answer, for 1 .. size - 1 right answers of `size`.

    Averaged over the answers of a kind, since `red_drop` drops some.
    """
    import numpy as np
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    import verl_m2po.advantages  # noqa: F401

    right, wrong = [], []
    for count in range(1, size):
        rewards = torch.tensor([[1.0]] * count + [[0.0]] * (size - count))
        index = np.array(["a"] * size, dtype=object)
        options = {"norm_adv_by_std_in_grpo": False} if name == "grpo" else {}
        advantages, _ = get_adv_estimator_fn(name)(
            token_level_rewards=rewards.clone(), response_mask=torch.ones(size, 1), index=index, config={}, **options
        )
        right.append(float(advantages[:count].mean()))
        wrong.append(float(advantages[count:].mean()))
    return right, wrong


def markdown_table(names: list[str]) -> str:
    """The pushes at `RATIOS` as a table in Markdown, A > 0 / A < 0 in one cell."""
    head = "| preset | " + " | ".join(f"r = {ratio:g}" for ratio in RATIOS) + " |"
    lines = [head, "|---" * (len(RATIOS) + 1) + "|"]
    for name in names:
        seen = push(name)
        at = [int((seen.ratio - ratio).abs().argmin()) for ratio in RATIOS]
        cells = [f"{_short(seen.positive[i])} / {_short(seen.negative[i])}" for i in at]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(value: Tensor) -> str:
    # Adding 0 turns -0 into 0.
    return f"{round(float(value), 2) + 0.0:g}"


def draw_push(name: str, seen: Push) -> Any:
    """The plot of one preset, push against ratio with dots at `RATIOS`; a matplotlib Figure."""
    figure, axes = _small_figure()
    axes.axhline(1, color="0.8", linewidth=0.8)
    for values, color in ((seen.positive, POSITIVE), (seen.negative, NEGATIVE)):
        axes.plot(seen.ratio, values, color=color, linewidth=1.4)
        at = [int((seen.ratio - ratio).abs().argmin()) for ratio in RATIOS]
        axes.plot(seen.ratio[at], values[at], "o", color=color, markersize=2.6)
    axes.set_xscale("log")
    axes.set_xlim(1 / LARGEST, LARGEST)
    axes.set_ylim(-0.3, LARGEST)
    # The other ratios would not have room for their labels; they have their dots.
    axes.set_xticks([0.2, 1, 5], ["0.2", "1", "5"])
    axes.minorticks_off()
    axes.set_yticks([0, 1, 5], ["0", "1", "5"])
    axes.set_title(name, fontsize=8)
    return figure


def draw_advantages(names: list[str], size: int = 8) -> Any:
    """Advantages of right and wrong answers against the number of right ones, one panel for each estimator."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.75 * len(names), 1.7), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True)
    for axes, name in zip(panels, names, strict=True):
        right, wrong = advantage_table(name, size)
        counts = range(1, size)
        axes.axhline(0, color="0.8", linewidth=0.8)
        axes.plot(counts, right, "o-", color=POSITIVE, markersize=2.6, linewidth=1.2)
        axes.plot(counts, wrong, "o-", color=NEGATIVE, markersize=2.6, linewidth=1.2)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=6)
    figure.supxlabel(f"right answers of {size}", fontsize=7)
    return figure


def _small_figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9, 1.3), layout="constrained")
    axes = figure.subplots()
    axes.tick_params(labelsize=6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def figures(names: list[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name of a file and how to draw it, for every preset and for the estimators."""
    for name in names:
        yield name, lambda name=name: draw_push(name, push(name))
    estimators = ["grpo", "asymre", "red_drop", "red_weight", "max_at_k", "oapl"]
    yield "advantages", lambda: draw_advantages(estimators)


def main(
    folder: Annotated[Path, "Where the figures go"] = Path("docs/figures/methods"),
) -> None:
    """Draw every preset of the group `loss` into `folder`, and the table of pushes beside them."""
    import matplotlib

    # Reproducible files: text stays text, and ids do not change from run to run.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "verl-m2po"})
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in figures(presets()):
        draw().savefig(folder / f"{name}.svg", metadata={"Date": None})
    (folder / "table.md").write_text(markdown_table(presets()) + "\n")


if __name__ == "__main__":
    import typer

    typer.run(main)
