"""Self-imitation: the present advantage of a success that is trained again. After SPEAR (arXiv:2509.22601). Pure."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Imitation:
    """How the advantage of a trajectory that is trained again is formed anew.

    Args:
        baseline_groups: groups whose mean scores make the baseline, their median; 0 leaves advantages as they are.
            SPEAR has 10,240.
        ramp_steps: trainer steps over which the weight of what is trained again rises from 0 to 1; 0: it is 1 from the
            start. SPEAR has 200.
    """

    baseline_groups: int = 0
    ramp_steps: int = 0

    def weight(self, step: int) -> float:
        """SPEAR's warm-up at trainer step `step`: half a cosine wave."""
        if step >= self.ramp_steps:
            return 1.0
        return 0.5 * (1 - math.cos(math.pi * step / self.ramp_steps))


class Recalibration:
    """Advantages over a baseline: the median of the mean scores of the groups last trained for the first time.

    A success of an early policy need not be one for a later policy that is right more often: its score may be below the
    baseline.
    """

    def __init__(self, imitation: Imitation) -> None:
        self.imitation = imitation
        self._means: deque[float] = deque(maxlen=imitation.baseline_groups)

    def add(self, mean_scores: Iterable[float]) -> None:
        """Groups with these mean scores were trained for the first time."""
        self._means.extend(mean_scores)

    def baseline(self) -> float | None:
        """What is subtracted from a score; None where advantages stay as they are."""
        return median(self._means) if self._means else None

    def state_dict(self) -> list[float]:
        """As plain JSON."""
        return list(self._means)

    def load_state_dict(self, state: list[Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._means.clear()
        self._means.extend(state)
