"""Logs of runs that never ran, in verl's formats, with truths that a test can know."""

import json
from pathlib import Path

import numpy as np
import yaml


def write_log(path: Path, rows: dict[int, dict], cut: str = "") -> Path:
    """A log of verl's `file` logger; `cut` is what a dying run left of its last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in rows.items())
    path.write_text(text + cut, encoding="utf-8")
    return path


def write_config(folder: Path, **values: object) -> None:
    """A config beside a log; dots in the keys (written as __) make nested mappings."""
    tree: dict = {}
    for key, value in values.items():
        node = tree
        *parents, leaf = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")


def stale_run(
    loss: str, staleness_steps: int, seed: int, steps: int = 200, test_every: int = 10, task: str = "addition"
) -> dict[int, dict]:
    """Rows that look like a run: GRPO clips and lags, no trust region collapses, M2PO keeps up."""
    random = np.random.default_rng([seed, staleness_steps, sum(map(ord, loss))])
    lag = 0.0 if staleness_steps == 0 else {"grpo": 0.14, "m2po": 0.02}.get(loss, 0.05)
    rows: dict[int, dict] = {}
    for step in range(steps + 1):
        share = step / steps
        result = 0.3 + (0.35 - lag) * (1 - np.exp(-3 * share))
        if loss == "no_trust_region" and staleness_steps and share > 0.6:
            result *= np.exp(-9 * (share - 0.6))
        result = float(np.clip(result + random.normal(0, 0.008), 0, 1))
        row = {}
        if step % test_every == 0:
            row[f"val-core/{task}/acc/mean@8"] = result
            row["timing_s/testing"] = 1.5
        if step:
            row |= _training_row(loss, staleness_steps, step, share, result, random)
        if row:
            rows[step] = row
    return rows


def _training_row(loss: str, staleness_steps: int, step: int, share: float, result: float, random) -> dict[str, float]:
    noise = float(np.exp(random.normal(0, 0.25)))
    age = min(step - 1, staleness_steps)
    row = {
        "critic/score/mean": float(np.clip(result + random.normal(0, 0.04), 0, 1)),
        "actor/grad_norm": (0.2 if loss == "m2po" else 0.35) * noise,
        "actor/ppo_kl": 1e-3 * noise * (1 + staleness_steps),
        "response_length/mean": 5.0 + random.normal(0, 0.1),
        "response_length/clip_ratio": 0.01 * noise,
        "training/rollout_probs_diff_mean": 1e-7 * noise,
        "training/off_policy/trajectory_staleness/min": age,
        "training/off_policy/trajectory_staleness/mean": age,
        "training/off_policy/trajectory_staleness/max": age,
        "perf/throughput": 620 + random.normal(0, 15),
        "timing_s/step": 4.0,
        "timing_s/gen": 3.1,
        "timing_s/reward": 0.1,
        "timing_s/adv": 0.05,
        "timing_s/update_actor": 0.6,
        "timing_s/update_weights": 0.1,
    }
    if loss == "m2po":
        before = (0.02 + 0.05 * staleness_steps / 64 * share) * noise
        row |= {
            "actor/m2po/second_moment_before": before,
            "actor/m2po/second_moment_after": min(before, 0.04),
            "actor/m2po/masked_fraction": 0.0006 * noise if before > 0.04 else 0.0,
            "actor/m2po/effective_sample_size": 0.9,
        }
    else:
        row["actor/pg_clipfrac"] = 0.0122 * noise * (age + 1) / (staleness_steps + 1) if loss == "grpo" else 0.0
    return row
