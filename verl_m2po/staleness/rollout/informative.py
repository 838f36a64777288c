"""Does a finished group have an advantage? What all its trajectories share, and only where they share it."""

from collections.abc import Iterable

from verl_m2po.staleness.dynamic_sampling import METRIC, REWARD
from verl_m2po.staleness.rollout.masking import StoredRow


class UnknownMetric(ValueError):
    """The reward function does not return what groups are to be filtered by."""


def shared_metric(rows: Iterable[StoredRow], metric: str) -> float | None:
    """The value of `metric` that all trajectories have; None if they differ, or if there is one only.

    verl's own rule (`ReplayBuffer._dapo_filtered_keys`), but that it asks whether a standard deviation is 0, which
    rounding keeps it from being for equal values like 0.1.

    Args:
        rows: the trajectories of a group, masked copies included.
        metric: `reward`, before a KL penalty, or the name of a value that the reward function returns.

    Raises:
        UnknownMetric: a trajectory has no such number.
    """
    values = [_value(row, metric) for row in rows]
    return values[0] if len(values) > 1 and len(set(values)) == 1 else None


def _value(row: StoredRow, metric: str) -> float:
    rest = row.packed["rest"]
    if metric == REWARD and "last_token_reward" in rest:
        return rest["last_token_reward"]
    returned = rest.get("extra_fields", {}).get("reward_extra_info", {})
    try:
        return float(returned[metric])
    except (KeyError, TypeError, ValueError) as error:
        found = ", ".join(sorted(returned)) or "nothing besides the reward"
        raise UnknownMetric(
            f"{METRIC.key}={metric}: the reward function returned no such number for {row.row.key}; it returned "
            f"{found}. Set it to one of these, or to {REWARD}"
        ) from error
