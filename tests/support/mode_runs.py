"""Runs in a staleness mode, and what their ledgers must say."""

from benchmarks.paced.agent_loop import NAME, write_config
from verl_m2po.staleness.account.ledger import read_ledger, surviving

SEPARATE = ("actor_rollout_ref.hybrid_engine=false", "actor_rollout_ref.rollout.nnodes=1")
LORA = ("actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora_alpha=16")
STEPS, UPDATES_PER_STEP, BATCH, RESPONSES = 8, 2, 8, 4
TINY_BATCHES = (
    "data.train_batch_size=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=1",
    "actor_rollout_ref.rollout.n=2",
)


def run_mode(train, tmp_path, mode: str, staleness_updates: int, *overrides: str, steps: int = STEPS, **kwargs):
    """Train in `mode`; returns the result and the ledger, one entry per sampled batch."""
    ledger = tmp_path / "ledger.jsonl"
    result = train(
        f"trainer.total_training_steps={steps}",
        f"trainer.v1.trainer_mode={mode}",
        f"++trainer.v1.{mode}.staleness_updates={staleness_updates}",
        f"++trainer.v1.{mode}.ledger_path={ledger}",
        *overrides,
        **kwargs,
    )
    return result, surviving(read_ledger(ledger))


def paced(tmp_path, **settings) -> tuple[str, str]:
    """Overrides that generate with our paced agent loop."""
    path = tmp_path / "agent_loop.yaml"
    write_config(str(path), **settings)
    agent = "actor_rollout_ref.rollout.agent"
    return f"{agent}.agent_loop_config_path={path}", f"{agent}.default_agent_loop={NAME}"


def with_tool(tool: str, reward: str, turns: int = 3) -> tuple[str, ...]:
    """Overrides for verl's tool agent loop; the tool is in the file `tool`, and `reward` has the reward function."""
    rollout = "actor_rollout_ref.rollout"
    return (
        f"{rollout}.agent.default_agent_loop=tool_agent",
        f"{rollout}.multi_turn.enable=true",
        f"{rollout}.multi_turn.format=expression",
        f"{rollout}.multi_turn.function_tool_path={tool}",
        f"{rollout}.multi_turn.max_assistant_turns={turns}",
        f"{rollout}.multi_turn.max_tool_response_length=20000",
        "data.max_response_length=64",
        f"reward.custom_reward_function.path={reward}",
    )


def spans_of(line) -> list[tuple[int, int]]:
    return [tuple(span) for group in line["groups"] for row in group[3] for span in row[1]]


def trained_tokens(ledger, steps: int) -> list[int]:
    """Generated tokens of each trainer step that are not too old to be trained."""
    by_step = [0] * (steps + 1)
    for line in ledger:
        oldest = line["oldest_version"] or 0
        by_step[line["step"]] += sum(tokens for version, tokens in spans_of(line) if version >= oldest)
    return by_step[1:]


def versions_by_step(ledger) -> dict[int, set[int]]:
    versions: dict[int, set[int]] = {}
    for line in ledger:
        versions.setdefault(line["step"], set()).update(version for version, _ in spans_of(line))
    return versions


def assert_every_place_was_trained_once(
    ledger, steps: int = STEPS, batch: int = BATCH, responses: int = RESPONSES
) -> None:
    places = [group[2] for line in ledger for group in line["groups"]]
    assert places == list(range(steps * batch))
    assert all(len(group[3]) == responses for line in ledger for group in line["groups"])


def assert_exactly_k_steps_old(
    result, ledger, k_steps: int, steps: int, updates_per_step: int = UPDATES_PER_STEP
) -> None:
    assert versions_by_step(ledger) == {step: {max(0, step - 1 - k_steps)} for step in range(1, steps + 1)}
    ages = [updates_per_step * min(step, k_steps) for step in range(steps)]
    assert result.series("staleness/age_updates_max") == result.series("staleness/age_updates_mean") == ages
    verls = [age / updates_per_step for age in ages]
    assert result.series("training/off_policy/trajectory_staleness_worst/max") == verls
    assert result.series("training/off_policy/trajectory_staleness/min") == verls
    # Age-zero tokens have only the mismatch between vLLM and the trainer in their ratio: nothing, in float32.
    assert max(result.series("actor/m2po/mismatch_floor")) < 1e-9
