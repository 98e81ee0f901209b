"""The clock against replay (another program for the same schedules), and against sums made by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmoe.parallel.ops import Op, Step
from hpcmoe.parallel.replay import Cost, replay
from hpcmoe.parallel.schedule import Role, build
from hpcmoe.simulate.clock import Clock, Crew, Doing, Flight, Leg

SHARED = ("COUNTS", "DISPATCH", "COMBINE")


def crews_of(schedule, cost, rounds, experts, ranks=1, **more):
    """Crews whose exchanges take their flight and no link; numbers as replay has them."""
    def doing_of(role):
        def doing(rnd, op):
            busy, flight = cost(role, op)
            last = schedule.stages - 1
            if op.kind == "RECV":
                if role.stage:
                    return Doing(busy, waits_on=("SEND", role.stage - 1, rnd, op.micro))
                return Doing(busy, waits_on=("SAMPLE", last, rnd - 1, op.micro)) if last and rnd else Doing(busy)
            if op.kind in ("SEND", "SAMPLE"):
                key = (op.kind, role.stage, rnd, op.micro)
                return Doing(busy, 0.0, None, Flight(key, 1, (Leg(None, flight),)) if last else Flight(None))
            if op.kind in SHARED:
                return Doing(busy, 0.0, None, Flight((role.stage, rnd, op), 1 + experts, (Leg(None, flight),)))
            return Doing(busy)
        return doing
    return {role: Crew(0, role, ranks, program, rounds, doing_of(role), trace=True, **more)
            for role, program in schedule.programs.items() if role.leader or experts}


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_clock_agrees_with_replay(data):
    """Every op of every round ends when replay says, whatever ops take: to the last bit, since both add the same numbers in one order."""
    pp = data.draw(st.integers(1, 3))
    schedule = build(data.draw(st.sampled_from(["plain", "overlapped", "queued"])), pp, pp + data.draw(st.integers(0, 2)), data.draw(st.integers(1, 4)),
                     data.draw(st.integers(1, 3)))
    experts, seed, rounds = data.draw(st.booleans()), data.draw(st.integers(0, 999)), 3
    rng, costs = np.random.default_rng(seed), {}

    def cost(role, op):
        key = (role.stage, op) if op.kind in SHARED else (role, op)
        if key not in costs:
            costs[key] = Cost(*rng.integers(0, 64, 2) / 8.0)
        busy, flight = costs[key]
        return Cost(busy, flight if op.kind in SHARED + ("SEND",) or (op.kind == "SAMPLE" and pp > 1) else 0.0)

    slots = replay(schedule, cost, rounds, experts)
    crews = crews_of(schedule, cost, rounds, experts)
    Clock(list(crews.values()), np.ones(1)).run()
    for role, crew in crews.items():
        ours = [(s.round, s.op, float(s.start_s[0]), float(s.end_s[0])) for s in crew.stretches if not s.wait]
        assert ours == [(s.round, s.op, s.start_s, s.end_s) for s in slots if s.role == role]
        assert [op for _, op, _, _ in ours] == [step.op for step in schedule.programs[role]] * rounds  # the schedule's own order


def sender(number, host_s, load_l, latency_s=0.0):
    """A crew that posts one exchange after so many seconds, and awaits it."""
    sent, after = Op("DISPATCH", 0, 0), Op("EXPERT", 0, 0)
    legs = (Leg(np.array(load_l, dtype=float), latency_s),)
    return Crew(number, Role(0, True), 1, (Step(sent, ()), Step(after, (sent,))), 1,
                lambda rnd, op: Doing(host_s, flight=Flight((number, op), 1, legs)) if op == sent else Doing())


def test_two_exchanges_that_overlap_share_a_link_by_hand():
    """10 bytes over a link of 1 byte/s, from 0 s on, and as many from 4 s on: a has 6 left then, which take 12 s at half of the rate;
    by then b has 4 left, and the link to itself. Apart: 10 and 14. On links of their own they do not meet."""
    a, b = sender(0, 0.0, [10, 0]), sender(1, 4.0, [10, 0], latency_s=0.5)
    Clock([a, b], np.ones(2)).run()
    assert (a.now[0], b.now[0]) == (pytest.approx(16.0), pytest.approx(20.5))
    assert a.wait_s["DISPATCH"][0] == pytest.approx(16.0)
    a, b = sender(0, 0.0, [10, 0]), sender(1, 4.0, [0, 10])
    Clock([b, a], np.ones(2)).run()
    assert (a.now[0], b.now[0]) == (pytest.approx(10.0), pytest.approx(14.0))


def test_ranks_of_a_crew_have_clocks_of_their_own():
    """Three ranks whose work takes 1, 5 and 2 s post, and go on when the slowest has: they wait 4, 0 and 3 s (and 2 s for the bytes)."""
    made, sent, after = Op("EXPERT", 0, 0), Op("COMBINE", 0, 0), Op("MERGE", 0, 0)

    def doing(rnd, op):
        return {"EXPERT": Doing(np.array([1.0, 5.0, 2.0])), "COMBINE": Doing(flight=Flight("rows", 1, (Leg(np.array([2.0]), 0.0),))),
                "MERGE": Doing(1.0)}[op.kind]
    crew = Crew(0, Role(0, True), 3, (Step(made, ()), Step(sent, (made,)), Step(after, (sent,))), 1, doing)
    Clock([crew], np.ones(1)).run()
    assert crew.wait_s["COMBINE"].tolist() == [6.0, 2.0, 5.0] and crew.now.tolist() == [8.0] * 3


def test_a_device_works_behind_its_host():
    """The host queues two micro-batches' work of 10 s each in 1 s each: the device is done at 11 and 21 s. The first exchange is posted at
    11.5 s (0.5 s pass until the host knows); the second's wait begins when the first's is over."""
    program = tuple(Step(Op("GATE", 0, m), ()) for m in (0, 1)) + tuple(Step(Op("COUNTS", 0, m), ()) for m in (0, 1)) + \
        tuple(Step(Op("DISPATCH", 0, m), (Op("COUNTS", 0, m),)) for m in (0, 1))

    def doing(rnd, op):
        return {"GATE": Doing(1.0, 0.0, 10.0), "COUNTS": Doing(flight=Flight(op, 1, (Leg(None, 2.0),))), "DISPATCH": Doing()}[op.kind]
    crew = Crew(0, Role(0, True), 1, program, 1, doing, sync_s=0.5, trace=True)
    Clock([crew], np.ones(1)).run()
    waits = [(s.op.micro, float(s.start_s[0]), float(s.end_s[0])) for s in crew.stretches if s.wait]
    assert waits == [(0, 2.0, 13.5), (1, 13.5, 23.5)]
    assert [(float(s.start_s[0]), float(s.end_s[0])) for s in crew.stretches if s.device] == [(1.0, 11.0), (11.0, 21.0)]


def test_a_schedule_that_does_not_end_is_refused():
    a, b = Op("DISPATCH", 0, 0), Op("COMBINE", 0, 0)
    crew = Crew(0, Role(0, True), 1, (Step(a, ()), Step(b, (a,))), 1, lambda rnd, op: Doing(flight=Flight("never", 2, ())))
    with pytest.raises(ValueError, match="does not end"):
        Clock([crew], np.ones(1)).run()
