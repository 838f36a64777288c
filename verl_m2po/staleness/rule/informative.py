"""Counting groups without advantage, and stopping a run whose prompts teach it too little."""

from collections import Counter, deque
from typing import Any

from verl_m2po.staleness.rule import events


class TooFewInformative(RuntimeError):
    """So many batches of prompts were generated, and not one batch could be trained on."""


class InformativeWindow:
    """Stops the run when the last `most_batches` batches of generated groups do not fill one batch.

    Groups that failed or were aborted do not show whether the prompts teach anything, and are not counted.

    Args:
        metric: name of the metric that all trajectories of a group without advantage share; for the message.
        most_batches: verl's `max_num_gen_batches`, at least 1.
        batch_size: prompt groups per trainer step.
    """

    def __init__(self, metric: str, most_batches: int, batch_size: int) -> None:
        self._metric, self._most_batches, self._batch_size = metric, most_batches, batch_size
        self._shared: deque[float | None] = deque(maxlen=most_batches * batch_size)

    def on_event(self, event: events.Event) -> None:
        """See `rule.events.Listener`.

        Raises:
            TooFewInformative: the window is full, and its groups with an advantage do not fill a batch.
        """
        match event:
            case events.Finished() | events.Returned():
                self._shared.append(None)
            case events.SetAside(_, report):
                self._shared.append(report.shared_metric)
                self._judge()

    def _judge(self) -> None:
        kept = sum(value is None for value in self._shared)
        if len(self._shared) < (self._shared.maxlen or 0) or kept >= self._batch_size:
            return
        values = Counter(value for value in self._shared if value is not None)
        found = ", ".join(f"{count} groups with {value:g}" for value, count in values.most_common(5))
        raise TooFewInformative(
            f"algorithm.filter_groups.max_num_gen_batches={self._most_batches}: of the last {len(self._shared)} prompt "
            f"groups only {kept} have an advantage, and a batch needs {self._batch_size}. In the others all "
            f"trajectories have the same {self._metric}: {found}. The prompts are too easy or too hard for the model. "
            "Take others, or raise the limit (0 never gives up)"
        )

    def state_dict(self) -> list[float | None]:
        """What a restart needs to go on counting, as plain JSON."""
        return list(self._shared)

    def load_state_dict(self, state: list[Any]) -> None:
        """Go on counting from `state`; if its window was longer, from the last groups of it."""
        self._shared.extend(state)
