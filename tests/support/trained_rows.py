"""The rule that a training run keeps whatever kills it, checked against the ledger of its attempts.

The first line of an attempt is the step after the checkpoint that it came from. What earlier attempts trained from that
step on went down with them, and is trained again. Over what is left, nothing may be missing, doubled or of another age.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Line = dict[str, Any]


@dataclass(frozen=True)
class Promise:
    """What a run was to train on.

    Args:
        mode: trainer mode.
        staleness_steps: trainer steps; exact, or the bound.
        steps: trainer steps of the whole run.
        batch_size: prompt groups per trainer step.
        responses: trajectories per group.
        order: prompt indices in the order of the data loader, at least as many as are dispatched.
        masked: prompts of which one trajectory is masked.
    """

    mode: str
    staleness_steps: int
    steps: int
    batch_size: int
    responses: int
    order: list[int]
    masked: frozenset[int] = frozenset()


def surviving(attempts: list[list[Line]]) -> list[Line]:
    """The lines whose training is part of the final weights."""
    lines: list[Line] = []
    for attempt in attempts:
        batches = [line for line in attempt if "step" in line]
        if batches:
            lines = [line for line in lines if line["step"] < batches[0]["step"]] + batches
    return lines


def redone_steps(attempts: list[list[Line]]) -> list[int]:
    """For each attempt but the last: how many of the steps that it had begun were trained again."""
    begun = [{line["step"] for line in attempt if "step" in line} for attempt in attempts]
    redone = []
    for before, after in pairwise(begun):
        redone.append(len([step for step in before if step >= min(after)]) if after else 0)
    return redone


def broken(attempts: list[list[Line]], promise: Promise) -> list[str]:
    """What the run did not keep of `promise`; empty if it kept everything."""
    lines = surviving(attempts)
    groups = [(line, group) for line in lines for group in line["groups"]]
    found = [*_steps(lines, promise), *_once(groups, promise), *_masked(groups, promise)]
    if promise.mode == "bounded_async":
        return [*found, *_within_the_bound(groups, promise), *_nothing_skipped(groups, promise)]
    return [*found, *_exact_age(groups, promise), *_in_order(groups, promise)]


def _steps(lines: list[Line], promise: Promise) -> list[str]:
    sizes: dict[int, int] = {}
    for line in lines:
        sizes[line["step"]] = sizes.get(line["step"], 0) + len(line["groups"])
    if sizes == {step: promise.batch_size for step in range(1, promise.steps + 1)}:
        return []
    return [f"groups per step: {sizes}, expected {promise.batch_size} in each of the steps 1 to {promise.steps}"]


def _once(groups: list, promise: Promise) -> list[str]:
    found = []
    for what, values in {
        "group": [group[1] for _, group in groups],
        "prompt": [group[0] for _, group in groups],
        "trajectory": [row[0] for _, group in groups for row in group[3]],
    }.items():
        if doubled := {value for value in values if values.count(value) > 1}:
            found.append(f"trained twice: {what} {sorted(doubled)[:4]}")
    if short := [group[1] for _, group in groups if len(group[3]) != promise.responses]:
        found.append(f"not {promise.responses} trajectories: group {short[:4]}")
    return found


def _masked(groups: list, promise: Promise) -> list[str]:
    found = []
    for _, group in groups:
        tokens = [sum(tokens for _, tokens in row[1]) for row in group[3]]
        if tokens.count(0) != (group[0] in promise.masked):
            found.append(f"group {group[1]} of prompt {group[0]} has trajectories of {tokens} tokens")
    return found[:4]


def _versions(group: list) -> set[int]:
    return {version for row in group[3] for version, _ in row[1]}


def _exact_age(groups: list, promise: Promise) -> list[str]:
    return [
        f"step {line['step']}: group {group[1]} is of weight versions {sorted(_versions(group))}"
        for line, group in groups
        if _versions(group) != {max(0, line["step"] - 1 - promise.staleness_steps)}
    ][:4]


def _in_order(groups: list, promise: Promise) -> list[str]:
    places = [group[2] for _, group in groups]
    if places != list(range(promise.steps * promise.batch_size)):
        return [f"places {places}, expected one after the other from 0"]
    prompts = [group[0] for _, group in groups]
    if prompts != promise.order[: len(prompts)]:
        return [f"prompts {prompts}, the data loader gives {promise.order[: len(prompts)]}"]
    return []


def _within_the_bound(groups: list, promise: Promise) -> list[str]:
    found = []
    for line, group in groups:
        oldest = line["step"] - 1 - promise.staleness_steps
        kept = [v for v in _versions(group) if line["oldest_version"] is None or v >= line["oldest_version"]]
        if min(kept) < oldest or max(kept) >= line["step"]:
            found.append(f"step {line['step']}: group {group[1]} keeps tokens of weight versions {sorted(kept)}")
    return found[:4]


def _nothing_skipped(groups: list, promise: Promise) -> list[str]:
    """A prompt before the last trained one is trained, or still waits: at most (bound + 1) batches do."""
    positions = {prompt: position for position, prompt in enumerate(promise.order)}
    trained = [positions[group[0]] for _, group in groups]
    waiting = (promise.staleness_steps + 1) * promise.batch_size
    skipped = set(range(max(trained) + 1)) - set(trained)
    if len(skipped) > waiting or max(trained) >= len(trained) + waiting:
        return [f"skipped the prompts at positions {sorted(skipped)}"]
    return []
