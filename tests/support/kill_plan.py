"""What hits a run in which processes are replaced: which process, in the midst of what, alone or with another one."""

import random
from collections.abc import Iterable
from dataclasses import dataclass

from fault_runs import METHODS, SEPARATE_MODES, TARGETS

ONE, TWO, IN_PUSH, IN_REPLACEMENT, MISSED = (
    "one",
    "two at once",
    "one during a push",
    "one while another is replaced",
    "a push that does not arrive",
)
ROUND = (ONE, TWO, ONE, IN_PUSH, ONE, IN_REPLACEMENT, ONE, MISSED)
"""The order in which strikes of a chain follow each other, over and over."""

SERVERS = ("rollout engine", "rollout server", "rollout worker")
"""What a push of weights goes to in the separate modes."""

START_S = 10.0
"""How long a process that takes the place of another one may have lived when the next kill comes, at most."""

Hit = tuple[str, str]
"""What is hit, of `fault_runs.TARGETS`, and in the midst of what, of `fault_runs.METHODS`."""


@dataclass
class Strike:
    """One or two killed processes, or a push that is kept from one server, and what came of it. Times in seconds.

    Args:
        pattern: one of `ROUND`.
        targets: of `fault_runs.TARGETS`.
        moment: of `fault_runs.METHODS`.
        delay_s: after the moment has begun.
        choices: from 0 to 1, for each target: which of the processes.
        start_s: age of the process in another one's place when the second kill comes.
    """

    pattern: str
    targets: tuple[str, ...]
    moment: str
    delay_s: float
    choices: tuple[float, ...]
    start_s: float
    after_step: int = 0
    replicas_lost: float = 0.0
    groups_moved: float = 0.0
    lost_generation_s: float = 0.0
    trainer_waited_s: float = 0.0


def healable(mode: str) -> list[str]:
    """What a run in `mode` replaces."""
    return [name for name, target in TARGETS.items() if mode in target.heals_in]


class Deck:
    """What is drawn at random and not put back before all has been drawn."""

    def __init__(self, rng: random.Random, cards: Iterable[Hit]) -> None:
        self._rng, self._cards, self._left = rng, sorted(cards), []

    def draw(self) -> Hit:
        if not self._left:
            self._left = self._rng.sample(self._cards, len(self._cards))
        return self._left.pop()


def draw(mode: str, kills: int, seed: int, patterns: tuple[str, ...] = ROUND) -> list[Strike]:
    """Strikes in a run in `mode` until `kills` processes have been killed; all follows from `seed`.

    Every process is hit in the midst of everything before one is hit in the midst of the same again.
    """
    rng = random.Random(f"{mode} {seed}")
    between = Deck(rng, ((target, moment) for target in healable(mode) for moment in METHODS if moment != "push"))
    in_push = Deck(rng, ((target, "push") for target in SERVERS))
    is_separate = mode in SEPARATE_MODES
    strikes: list[Strike] = []
    while sum(len(strike.targets) for strike in strikes) < kills or len(strikes) < len(patterns):
        pattern = patterns[len(strikes) % len(patterns)]
        if pattern in (IN_PUSH, MISSED) and not is_separate:
            pattern = ONE
        strikes.append(_draw_one(rng, pattern, healable(mode), in_push if pattern == IN_PUSH else between))
    return strikes


def _draw_one(rng: random.Random, pattern: str, among: list[str], deck: Deck) -> Strike:
    targets, moment = (), "generation"  # of a push that does not arrive, whenever the next one is
    if pattern != MISSED:
        first, moment = deck.draw()
        # In the place of one of its own kind: the one that starts may be the one that is hit.
        second = {TWO: (rng.choice(among),), IN_REPLACEMENT: (first,)}
        targets = (first, *second.get(pattern, ()))
    return Strike(
        pattern,
        targets,
        moment,
        round(rng.uniform(0.0, 0.5), 3),
        (rng.random(), rng.random()),
        round(rng.uniform(0.0, START_S), 1),
    )
