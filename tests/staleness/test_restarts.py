"""Crashes at random moments of random runs, with a journal: nothing twice, nothing skipped, nothing of another age."""

import json
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_simulation import Simulation, Workload

from verl_m2po.staleness.rule.bounded import BoundedAsync
from verl_m2po.staleness.rule.bounded_replay import BoundedReplay
from verl_m2po.staleness.rule.exact import ExactStale
from verl_m2po.staleness.rule.reuse import Reuse
from verl_m2po.staleness.rule.units import exact_version

pytestmark = pytest.mark.slow

BATCH, STEPS = 4, 24


class Journalled(Simulation):
    """A simulated run that writes down what a journal would hold, and can go on from what another has written."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.events, self.finished = [], {}
        self.arrivals, self.reissues = defaultdict(list), defaultdict(list)

    def restart(self, version: int, state: dict, dispatched: int, events: list, finished: dict) -> None:
        """As the buffer does: replay the events, expect what had finished at its version, begin the rest at theirs."""
        self.version, self.dispatched = version, dispatched
        self._versions = [(0.0, version)]
        self.rule.load_state_dict(json.loads(json.dumps(state)))
        self.events, self.finished = list(events), dict(finished)
        for kind, what in events:
            if kind == "failed":
                self.rule.fail(what)
            else:
                self.rule.readmit(what)
                self.dispatched += kind == "dispatched"
        for ticket in self.rule.in_flight_tickets():
            rows = finished.get(ticket.uid)
            if rows is None:
                self.reissues[ticket.dispatch_version].append(ticket.uid)
            else:
                self.arrivals[max(row.max_version for row in rows)].append((ticket.uid, rows))
            self.rule.postpone(ticket.uid)

    def _pump(self) -> None:
        for due in [version for version in self.arrivals if version <= self.version]:
            for uid, rows in self.arrivals.pop(due):
                self.rule.finish(uid, rows)
        for due in sorted(version for version in self.reissues if version <= self.version):
            for uid in self.reissues.pop(due):
                self.events.append(("again", self.rule.reissue(uid, self.version)))
                self._begin(uid)
        known = {ticket.uid for ticket in self.rule.in_flight_tickets()}
        super()._pump()
        self.events += [("dispatched", t) for t in self.rule.in_flight_tickets() if t.uid not in known]

    def _begin(self, uid: str) -> None:
        lengths = [max(1, int(self.workload.length(self.random))) for _ in range(self.workload.rows)]
        self._generating[uid] = (self.now, lengths, [])
        order = int(uid.removeprefix("g"))
        self._ends.append((self.now + max(lengths) / self.workload.tokens_per_time, order, uid))
        self._ends.sort()

    def _end_next(self) -> None:
        before = {ticket.uid: ticket for ticket in self.rule.in_flight_tickets()}
        finish, fail = self.rule.finish, self.rule.fail

        def record_finish(uid, rows):
            self.finished[uid] = rows
            return finish(uid, rows)

        def record_fail(uid):
            self.events.append(("failed", uid))
            return fail(uid)

        self.rule.finish, self.rule.fail = record_finish, record_fail
        try:
            super()._end_next()
        finally:
            del self.rule.finish, self.rule.fail
        assert before

    def _abort(self, uid: str) -> None:
        self.events.append(("failed", uid))
        super()._abort(uid)


@settings(max_examples=40, deadline=None)
@given(
    make_rule=st.sampled_from(
        [lambda: ExactStale(0, BATCH), lambda: ExactStale(3, BATCH), *[lambda: BoundedAsync(3, BATCH, 0.25)] * 2]
    ),
    stops=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=3),
    is_slow=st.booleans(),
    fail_share=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 2**32),
)
def test_nothing_is_lost_or_doubled_wherever_a_run_stops(make_rule, stops, is_slow, fail_share, seed):
    """Each stop: so many steps to a checkpoint, so many more that are lost, so many more generations that ended."""
    workload = Workload(
        length=lambda rng: min(2000, rng.paretovariate(0.8) * 10),
        tokens_per_time=60.0 if is_slow else 1000.0,
        fail_share=fail_share,
    )
    trained, step = [], 0
    simulation = Journalled(make_rule(), workload, seed)
    simulation.rule.limit(STEPS)
    for number, (to_checkpoint, beyond, ended) in enumerate(stops):
        saved = min(STEPS, step + to_checkpoint)
        for done in range(step + 1, saved + 1):
            simulation._train(done)
        trained, step = trained + simulation.trace.trained, saved
        state, dispatched = simulation.rule.state_dict(), simulation.dispatched
        # Those that had arrivals of an earlier crash to come carry them over, as the buffer's state does.
        carried = {uid: rows for due in simulation.arrivals.values() for uid, rows in due}
        simulation.events, simulation.finished = [], {}
        for lost in range(saved + 1, min(STEPS, saved + beyond) + 1):
            simulation._train(lost)
        for _ in range(min(ended, len(simulation._ends))):
            simulation._end_next()
        events, finished = simulation.events, carried | simulation.finished
        simulation = Journalled(make_rule(), workload, seed + number + 1)
        simulation.rule.limit(STEPS)
        simulation.restart(saved, state, dispatched, events, finished)
    for done in range(step + 1, STEPS + 1):
        simulation._train(done)
    trained += simulation.trace.trained
    assert len(trained) == STEPS * BATCH == len({group.ticket.uid for *_, group in trained})
    for i, (version, oldest, group) in enumerate(trained):
        versions = {version for row in group.rows for version, _ in row.spans}
        assert version == i // BATCH and max(versions) <= version
        if isinstance(simulation.rule, ExactStale):
            assert versions == {exact_version(version, simulation.rule.staleness_steps)} and group.ticket.place == i
        else:
            assert min(v for v in versions if oldest is None or v >= oldest) >= version - 3


@settings(max_examples=30, deadline=None)
@given(
    max_uses=st.none() | st.integers(2, 4),
    sampling=st.sampled_from(["uniform", "positive"]),
    crash=st.tuples(st.integers(0, 8), st.integers(0, 5), st.integers(0, 6)),
    is_slow=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_no_use_is_lost_or_doubled_where_rollouts_are_trained_several_times(max_uses, sampling, crash, is_slow, seed):
    """A use that a crash has undone is none; see the test above for what a crash is."""

    def make_rule() -> BoundedReplay:
        rule = BoundedReplay(3, BATCH, Reuse(max_uses, 1, sampling))
        rule.limit(STEPS)
        return rule

    workload = Workload(length=lambda rng: rng.uniform(10, 200), tokens_per_time=60.0 if is_slow else 1000.0)
    to_checkpoint, beyond, ended = crash
    simulation = Journalled(make_rule(), workload, seed)
    for done in range(1, to_checkpoint + 1):
        simulation._train(done)
    trained = list(simulation.trace.trained)
    state, dispatched = simulation.rule.state_dict(), simulation.dispatched
    simulation.events, simulation.finished = [], {}
    for lost in range(to_checkpoint + 1, to_checkpoint + beyond + 1):
        simulation._train(lost)
    for _ in range(min(ended, len(simulation._ends))):
        simulation._end_next()
    events, finished = simulation.events, simulation.finished
    simulation = Journalled(make_rule(), workload, seed + 1)
    simulation.restart(to_checkpoint, state, dispatched, events, finished)
    for done in range(to_checkpoint + 1, STEPS + 1):
        simulation._train(done)
    trained += simulation.trace.trained
    uses = Counter((version, group.ticket.uid) for version, _, group in trained)
    assert len(trained) == STEPS * BATCH == len(uses), "a group is twice in a batch"
    assert max_uses is None or max(Counter(uid for _, uid in uses).values()) <= max_uses
    for version, oldest, group in trained:
        versions = [v for row in group.rows for v, _ in row.spans if oldest is None or v >= oldest]
        assert version - 3 <= min(versions) and max(versions) <= version
    # A group whose first use a crash has undone has it again: it came back from the journal, with its own uid.
    undone = finished.keys() & {ticket.uid for kind, ticket in events if kind == "dispatched"}
    ended = undone - {group.ticket.uid for *_, group in trained}
    waiting = {group.ticket.uid for group in simulation.rule.stored_groups()}
    assert ended <= waiting | simulation.dropped
