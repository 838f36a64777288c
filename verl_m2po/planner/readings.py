"""Facts from a run: verl's `file` log with the config beside it, and the ledger of the staleness modes."""

# Pandas annotates wider types than it returns.
# pyright: reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

from pathlib import Path
from typing import Any

import numpy as np

from verl_m2po.ground import ledger
from verl_m2po.planner.facts import Facts
from verl_m2po.planner.workload import MeasuredLengths, PlanError
from verl_m2po.report.reading.runs import Run, read_runs
from verl_m2po.report.reading.settings import lookup

SKIPPED_STEPS = 2
"""First trainer steps of a run, which are slower than all others."""

TRAINING_PHASES = ("reward", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor")

Group = tuple[list[int], tuple[float, float] | None]
"""Lengths of a prompt group's responses, tokens, and when it began and ended, seconds since the epoch."""

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def read_run(path: Path) -> Facts:
    """What the log of one run, finished or running, and the config beside it say.

    Raises:
        PlanError: no run is there, or more than one, or one without times.
    """
    if not path.exists():
        raise PlanError(f"{path} is not there; give a log of verl's file logger, or the folder that holds it")
    runs, problems = read_runs([path])
    if len(runs) != 1:
        found = ", ".join(run.name for run in runs) or "; ".join(problems) or "no log of verl"
        raise PlanError(f"{path} is not the log of one verl run ({found}); give one .jsonl file of its file logger")
    (run,) = runs
    return _times(run, path).over(_config(run))


def _config(run: Run) -> Facts:
    config = run.settings.config

    def whole(key: str) -> int | None:
        value = lookup(config, key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def product(*values: int | None) -> int | None:
        return None if None in values else int(np.prod([value for value in values if value is not None]))

    batch, mini = whole("data.train_batch_size"), whole(f"{_ACTOR}.ppo_mini_batch_size")
    epochs = whole(f"{_ACTOR}.ppo_epochs")
    trainer = product(whole("trainer.nnodes"), whole("trainer.n_gpus_per_node"))
    is_separate = run.settings.mode in ("stale_k_separate", "bounded_async", "separate_async")
    rollout = product(whole(f"{_ROLLOUT}.nnodes"), whole(f"{_ROLLOUT}.n_gpus_per_node")) if is_separate else 0
    return Facts(
        devices=None if trainer is None or rollout is None else trainer + rollout,
        server_devices=whole(f"{_ROLLOUT}.tensor_model_parallel_size"),
        groups=batch,
        responses=whole(f"{_ROLLOUT}.n"),
        updates_per_step=batch // mini * (epochs or 1) if batch and mini else None,
        longest=whole("data.max_response_length"),
        max_requests=whole(f"{_ROLLOUT}.max_num_seqs"),
        update_devices=trainer,
        measured_servers=_servers(
            trainer if not is_separate else rollout, whole(f"{_ROLLOUT}.tensor_model_parallel_size")
        ),
    )


def _servers(devices: int | None, server_devices: int | None) -> int | None:
    return None if devices is None else max(1, devices // (server_devices or 1))


def _times(run: Run, path: Path) -> Facts:
    frame = run.frame[run.frame.index > SKIPPED_STEPS]
    if "timing_s/step" not in frame or frame["timing_s/step"].dropna().empty:
        raise PlanError(
            f"{path} has no timing_s/step after trainer step {SKIPPED_STEPS}: no training run of verl, or too short a "
            "one; leave it out, and give --update-s and --push-s"
        )
    step = frame["timing_s/step"]

    def mean(name: str) -> float | None:
        return float(frame[name].mean()) if name in frame and frame[name].notna().any() else None

    push_s = mean("timing_s/update_weights")
    if run.settings.mode == "sync" and "timing_s/gen" in frame:
        training = step - frame["timing_s/gen"] - (frame.get("timing_s/update_weights", 0.0))
    else:
        phases = [f"timing_s/{name}" for name in TRAINING_PHASES if f"timing_s/{name}" in frame]
        if "timing_s/update_actor" not in phases:
            return Facts(push_s=push_s, prompt_tokens=_rounded(mean("prompt_length/mean")))
        # A row of a validation alone, as at the start of a resumed run, is no step that took no time.
        training = frame[phases].sum(axis=1, min_count=1)
    return Facts(update_s=float(training.mean()), push_s=push_s, prompt_tokens=_rounded(mean("prompt_length/mean")))


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


def read_ledger_facts(path: Path, servers: int | None) -> Facts:
    """Response lengths by group, and a server's speed, from what a run has trained on.

    The speed is that of the longest response of each group, from its dispatch to its end, at the mean number of
    requests that were in flight meanwhile: one point of the curve. Waiting in a server's queue is in it.

    Args:
        path: the ledger.
        servers: of the run that wrote it; None: not known, so nothing is said of the speed.

    Raises:
        PlanError: it is no ledger, or nothing was trained in it.
    """
    try:
        groups = _groups(path)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(
            f"--ledger {path} is no ledger of the staleness modes ({type(error).__name__}: {error}); give the file "
            "that trainer.v1.<mode>.ledger_path named, or --lengths and --tokens-per-s"
        ) from error
    lengths = [lengths for lengths, _ in groups]
    if not any(lengths):
        raise PlanError(f"--ledger {path} holds no trained group; give --lengths and --tokens-per-s instead")
    speeds = None if servers is None else _speed(groups, servers)
    return Facts(lengths=MeasuredLengths(lengths), speeds=speeds)


def _groups(path: Path) -> list[Group]:
    """What was trained; a group that was trained again was generated once, and counts once."""
    groups: dict[str, Group] = {}
    for batch in ledger.surviving(ledger.read(path).whole):
        for (_, uid, _, rows), times in zip(batch["groups"], ledger.times(batch), strict=True):
            groups.setdefault(uid, ([length for _, spans in rows if (length := _tokens(spans)) > 0], times))
    return list(groups.values())


def _tokens(spans: list[Any]) -> int:
    return sum(ledger.number("tokens", tokens, is_whole=True) for _, tokens in spans)


def _speed(groups: list[Group], servers: int) -> tuple[tuple[int, float], ...] | None:
    whole = [(*times, lengths) for lengths, times in groups if times and lengths]
    tokens, seconds = sum(max(group) for _, _, group in whole), sum(ended - began for began, ended, _ in whole)
    if not whole or seconds <= 0:
        return None
    per_request = tokens / seconds
    first, last = min(began for began, _, _ in whole), max(ended for _, ended, _ in whole)
    # By Little's law: every response is in flight for its own share of its group's time.
    requests = sum(sum(group) for _, _, group in whole) / per_request / (last - first) / servers
    at = max(1, round(requests))
    return ((at, per_request * at),)
