"""Who may be given work, which places are filled again, and which prompts are set aside: laws of the pure decisions."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from verl_m2po.staleness.heal.fleet import Fleet, behind
from verl_m2po.staleness.heal.suspects import CHANCE, Suspects

SERVERS, TIMEOUT_S = 3, 10.0


@given(st.dictionaries(st.text(min_size=1), st.none() | st.integers(0, 5)), st.integers(0, 5))
def test_exactly_those_that_report_the_version_may_be_given_work(reported, version):
    refused = behind(reported, version)
    assert {server for server in reported if server not in refused} == {s for s, v in reported.items() if v == version}
    assert all(str(reported[server]) in why or reported[server] is None for server, why in refused.items())


class FleetMachine(RuleBasedStateMachine):
    """Servers die, come up, get their weights, and places are given up, in any order; beside a count of places."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.names = 0.0, 0
        self.fleet = Fleet(map(str, range(SERVERS)), TIMEOUT_S, clock=lambda: self.now)
        self.awaited: list = []
        self.given_up = self.lost = self.joined = self.widened = 0

    @precondition(lambda self: self.fleet.serving)
    @rule(data=st.data())
    def a_server_dies(self, data):
        name = data.draw(st.sampled_from(sorted(self.fleet.serving)))
        self.awaited.append(self.fleet.lose(name))
        assert self.fleet.lose(name) is None, "a death counts once"
        assert not self.fleet.has(name)
        self.lost += 1

    @precondition(lambda self: self.awaited)
    @rule(data=st.data())
    def a_server_comes_up(self, data):
        vacancy = self.awaited.pop(data.draw(st.integers(0, len(self.awaited) - 1)))
        self.names += 1
        was_awaited = self.fleet.awaits(vacancy)
        assert self.fleet.arrive(f"new-{self.names}", vacancy) == was_awaited
        assert not self.fleet.awaits(vacancy) and not self.fleet.arrive("twice", vacancy)
        assert f"new-{self.names}" not in self.fleet.serving, "it has no weights yet"

    @rule(most=st.integers(1, SERVERS + 2))
    def devices_are_free(self, most):
        places = len(self.fleet.serving) + len(self.fleet.joining) + self.fleet.vacant
        vacancy = self.fleet.widen(most)
        assert (vacancy is not None) == (places < most and not self.awaited_now())
        if vacancy is not None:
            self.awaited.append(vacancy)
            self.widened += 1

    @precondition(lambda self: self.awaited)
    @rule(data=st.data())
    def nobody_tries_any_more(self, data):
        vacancy = self.awaited.pop(data.draw(st.integers(0, len(self.awaited) - 1)))
        self.given_up += self.fleet.awaits(vacancy)
        self.fleet.abandon(vacancy)
        assert not self.fleet.awaits(vacancy)

    def awaited_now(self):
        return [vacancy for vacancy in self.awaited if self.fleet.awaits(vacancy)]

    @precondition(lambda self: self.fleet.joining)
    @rule(data=st.data())
    def one_that_joins_dies(self, data):
        vacancy = self.fleet.lose(data.draw(st.sampled_from(sorted(self.fleet.joining))))
        assert vacancy is not None and vacancy.since <= self.now
        self.awaited.append(vacancy)

    @precondition(lambda self: self.fleet.joining)
    @rule(data=st.data())
    def one_that_joins_gets_the_weights(self, data):
        name = data.draw(st.sampled_from(sorted(self.fleet.joining)))
        assert self.fleet.admit(name) and not self.fleet.admit(name)
        self.joined += 1

    @rule(seconds=st.sampled_from([1.0, TIMEOUT_S]))
    def time_passes(self, seconds):
        self.now += seconds
        self.given_up += self.fleet.give_up()
        assert self.fleet.give_up() == 0

    @invariant()
    def every_place_is_in_one_state(self):
        fleet = self.fleet
        assert len(fleet.serving) + len(fleet.joining) + fleet.vacant + self.given_up == SERVERS + self.widened
        assert not fleet.serving & fleet.joining

    def teardown(self):
        changes = self.fleet.take_changes()
        assert (len(changes.lost_at), len(changes.joined_at)) == (self.lost, self.joined)
        assert not self.fleet.take_changes().lost_at


TestFleet = FleetMachine.TestCase
TestFleet.settings = settings(deadline=None, max_examples=60)


def test_a_place_is_never_given_up_where_that_is_asked():
    fleet = Fleet(["a"], None, clock=lambda: 1e9)
    vacancy = fleet.lose("a")
    assert fleet.give_up() == 0 and fleet.awaits(vacancy)


@settings(deadline=None)
@given(st.sets(st.integers(0, 9), max_size=6), st.data())
def test_only_the_guilty_are_found_guilty_and_each_of_them_is(guilty, data):
    """Whatever dies by chance: the guilty kill whenever they are generated, the others finish unless chance kills."""
    suspects, in_flight, found = Suspects(), set(range(10)), []
    lost: Counter = Counter()
    tried: set[int] = set()
    generating = set(in_flight)
    while in_flight:
        assert generating, "somebody waits for ever"
        group = data.draw(st.sampled_from(sorted(generating)))
        may_be_lost = group not in guilty and str(group) != suspects._tried and lost[group] < CHANCE
        by_chance = may_be_lost and data.draw(st.booleans())
        generating.discard(group)
        if group in guilty or by_chance:
            lost[group] += 1
            if suspects.lose(str(group), deaths=data.draw(st.integers(1, CHANCE))):
                found.append(group)
                in_flight.discard(group)
        else:
            suspects.end(str(group))
            in_flight.discard(group)
        tried &= generating
        again = {int(uid) for uid in suspects.due()}
        tried |= {each for each in again if str(each) == suspects._tried}
        generating |= again
        assert len(tried) <= 1, "suspects are generated one at a time"
    assert set(found) <= guilty and sorted(found) == sorted(guilty)
    assert not suspects._deaths, "nothing is remembered of what has ended"
    assert all(times <= CHANCE + 1 for times in lost.values())


def test_a_group_is_no_suspect_for_one_death():
    suspects = Suspects()
    for uid in "abc":
        assert not suspects.lose(uid, deaths=1)
    assert suspects.due() == ["a", "b", "c"] and suspects.due() == []
    for uid in "abc":
        assert not suspects.lose(uid, deaths=1)
    assert suspects.due() == ["a"] and suspects.due() == []
    suspects.end("a")
    assert suspects.due() == ["b"] and suspects.lose("b", deaths=1) and suspects.due() == ["c"]
