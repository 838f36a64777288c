"""What the buffer knows besides the rows in TransferQueue, for a checkpoint."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from verl_m2po.staleness.account.metrics import StalenessMetrics
from verl_m2po.staleness.restart.backlog import Backlog
from verl_m2po.staleness.restart.resume import STATE_FORMATS
from verl_m2po.staleness.rule.failures import FailureWindow
from verl_m2po.staleness.rule.rules import StalenessRule


class BufferState(NamedTuple):
    """The parts of `StalenessReplayBuffer` that have a state of their own."""

    rule: StalenessRule
    backlog: Backlog
    failures: FailureWindow
    metrics: StalenessMetrics

    def to_json(self, version: int) -> dict[str, Any]:
        """As plain JSON, in the last of `STATE_FORMATS`; `version` is the weight version that the rollout holds."""
        return {
            "state_version": STATE_FORMATS[-1],
            "version": version,
            "rule": self.rule.state_dict(),
            "arrivals": self.backlog.state(),
            "failures": self.failures.state_dict(),
            "metrics": self.metrics.state_dict(),
        }

    def load(self, state: Mapping[str, Any], version: int) -> None:
        """Go on from `state`.

        Args:
            state: what `to_json` returned.
            version: weights of the checkpoint, which the rollout will hold.

        Raises:
            ValueError: it was written by another version of this package or under another schedule.
            StalenessViolation: it ends a run, and cannot be made longer at the same staleness.
            RuntimeError: TransferQueue lacks rows that the state waits for.
        """
        if state.get("state_version") not in STATE_FORMATS:
            raise ValueError(f"staleness state of format {state.get('state_version')!r}, readable are {STATE_FORMATS}")
        if "failures" in state:  # format 1 has none
            self.failures.load_state_dict(state["failures"])
            self.metrics.load_state_dict(state["metrics"])
        self.rule.load_state_dict(state["rule"])
        self.rule.check_resumable(version)
        self.backlog.restore(state.get("arrivals", []))
