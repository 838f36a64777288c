"""What is trained in which staleness mode, as the tests say it: a table of docs/compatibility.md.

A test in tests/e2e or tests/faults that runs a feature says so, `@pytest.mark.feature("LoRA", mode="stale_k")`, and its
name stands in the table. Where there is none, the checks of a composed config say whether the mode refuses the feature.
What is left was not run.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

_TESTS = Path(__file__).parents[1] / "tests"
# Where tests are real runs
RUNNING = (_TESTS / "e2e", _TESTS / "faults")
MODES = ("stale_k", "stale_k_separate", "bounded_async", "replay")

_MODEL, _ACTOR, _ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("model", "actor", "rollout"))
_REWARD_MODEL = "reward.reward_model"
FEATURES: dict[str, tuple[str, ...]] = {
    "dynamic sampling": ("algorithm.filter_groups.enable=true",),
    "LoRA": (f"{_MODEL}.lora_rank=8",),
    "an agent with a tool, several turns": (f"{_ROLLOUT}.agent.default_agent_loop=tool_agent",),
    "images and video": ("data.image_key=images", f"{_MODEL}.path=Qwen/Qwen2-VL-2B-Instruct"),
    "a critic (`gae`)": ("algorithm.adv_estimator=gae",),
    "a reference model, KL in the loss": (f"{_ACTOR}.use_kl_loss=true",),
    "KL in the reward": ("algorithm.use_kl_in_reward=true",),
    "a reward model with devices of its own": (
        f"{_REWARD_MODEL}.enable=true",
        f"{_REWARD_MODEL}.enable_resource_pool=true",
    ),
    "a teacher, beside the task's rewards": ("distillation.enabled=true",),
    "an entropy bonus": (f"{_ACTOR}.entropy_coeff=0.01",),
    "`ppo_epochs=2`": (f"{_ACTOR}.ppo_epochs=2",),
    "failed trajectories masked": ("{mode}.on_failed_trajectory=mask",),
    "a journal": ("{mode}.journal=true",),
    "resuming from a checkpoint": ("trainer.resume_mode=auto",),
    "validation while training": ("trainer.test_freq=4",),
    "asynchronous saving": (f"{_ACTOR}.checkpoint.async_save=true",),
    "training devices lent to the rollout": (
        "actor_rollout_ref.hybrid_engine=true",
        "trainer.v1.separate_async.hybrid_rollout.enable_switch=true",
    ),
    "an adaptive bound": ("trainer.v1.bounded_async.adaptive.enable=true",),
    "router replay": (f"{_ROLLOUT}.enable_rollout_routing_replay=true",),
    "`top_p` below 1": (f"{_ROLLOUT}.top_p=0.9",),
    "`top_k`": (f"{_ROLLOUT}.top_k=50",),
}
"""What switches each on."""

_OPTIONS = {"stale_k": "s16", "stale_k_separate": "s16_separate", "bounded_async": "bounded_async", "replay": "replay"}


class Run(NamedTuple):
    """A test that runs a feature in a mode."""

    feature: str
    mode: str
    test: str


@cache
def marked() -> tuple[Run, ...]:
    """What the tests say of themselves, in the order of their files."""
    found = []
    for path in sorted(path for folder in RUNNING for path in folder.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                found += [Run(*says, node.name) for says in filter(None, map(_feature, node.decorator_list))]
    return tuple(found)


def _feature(decorator: ast.expr) -> tuple[str, str] | None:
    """Feature and mode of `pytest.mark.feature("...", mode="...")`; None for another decorator."""
    match decorator:
        case ast.Call(
            func=ast.Attribute(attr="feature"),
            args=[ast.Constant(value=str(feature))],
            keywords=[ast.keyword(arg="mode", value=ast.Constant(value=str(mode)))],
        ):
            return feature, mode
    return None


def features() -> Iterator[str]:
    """Yield the table, one row a feature and one column a mode."""
    yield f"| | {' | '.join(f'`{mode}`' for mode in MODES)} |"
    yield "| --- |" + " --- |" * len(MODES)
    for feature in FEATURES:
        yield f"| {feature} | {' | '.join(_cell(feature, mode) for mode in MODES)} |"


def _cell(feature: str, mode: str) -> str:
    tests = [run.test for run in marked() if (run.feature, run.mode) == (feature, mode)]
    if tests:
        return "runs: " + ", ".join(f"`{test}`" for test in tests)
    if refusals := _refusals(feature, mode):
        return "refused: " + " ".join(refusals).replace("|", "\\|")
    return "not run"


def _refusals(feature: str, mode: str) -> list[str]:
    """What the checks that need the config alone have against the feature, and not against the mode without it."""
    without = _problems(mode, ())
    switched_on = tuple(setting.format(mode=f"trainer.v1.{mode}") for setting in FEATURES[feature])
    return [said for said in _problems(mode, switched_on) if said not in without]


@cache
def _problems(mode: str, overrides: tuple[str, ...]) -> list[str]:
    from compose import verl_hydra
    from hydra import compose

    from verl_m2po.ground.check import ask_all
    from verl_m2po.launch import registry

    with verl_hydra():
        ours = [f"staleness={_OPTIONS[mode]}", "hardware=cpu", "loss=m2po", *overrides]
        config = compose("arithmetic", overrides=ours, return_hydra_config=True)
    return [str(problem) for problem in ask_all(registry.of_the_config(2**40), config) if problem.is_fatal]
