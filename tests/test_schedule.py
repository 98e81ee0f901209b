"""Schedules: consistent, deadlock-free, parseable, and drawn as expected; damage is found."""

import pytest
from hypothesis import given, settings, strategies as st

from hpcmoe.errors import UserError
from hpcmoe.parallel import check, schedule
from hpcmoe.parallel.check import ScheduleError
from hpcmoe.parallel.ops import Op, Step
from hpcmoe.parallel.schedule import Role, Schedule, build, parse

SHAPES = st.tuples(st.sampled_from(["plain", "overlapped", "queued"]), st.integers(1, 5), st.integers(1, 6), st.integers(1, 9), st.integers(1, 4),
                   st.booleans())


@given(SHAPES)
@settings(deadline=None, max_examples=60)
def test_every_schedule_passes_the_checker_and_is_its_text(shape):
    name, stages, more, micros, lanes, shards = shape
    built = build(name, stages, stages + more - 1, micros, lanes, shards)
    check.check(built)
    assert parse(str(built)) == built


@given(SHAPES)
@settings(deadline=None, max_examples=40)
def test_each_micro_batch_passes_each_layer_once_in_order(shape):
    name, stages, more, micros, lanes, shards = shape
    layers = stages + more - 1
    built = build(name, stages, layers, micros, lanes, shards)
    sums = ("REDUCE_ATTEND", "REDUCE_MERGE") if shards else ()
    for micro in range(micros):
        for kind in ("ATTEND", "GATE", "COUNTS", "DISPATCH", "EXPERT", "COMBINE", "MERGE", *sums):
            seen = [s.op.layer for stage in range(stages) for s in built.programs[Role(stage, True)] if s.op[::2] == (kind, micro)]
            assert seen == list(range(layers))


def test_the_plain_schedule_of_one_stage_reads_like_the_life_of_a_token():
    text = " ".join(str(step.op) for step in build("plain", 1, 2, 1).programs[Role(0, True)])
    assert text == ("RECV.0.0 ATTEND.0.0 GATE.0.0 COUNTS.0.0 DISPATCH.0.0 EXPERT.0.0 COMBINE.0.0 MERGE.0.0 "
                    "ATTEND.1.0 GATE.1.0 COUNTS.1.0 DISPATCH.1.0 EXPERT.1.0 COMBINE.1.0 MERGE.1.0 SAMPLE.1.0")


def test_tensor_shards_sum_once_after_attention_and_once_after_the_experts():
    text = " ".join(str(step.op) for step in build("plain", 1, 2, 1, shards=True).programs[Role(0, True)])
    assert text == ("RECV.0.0 EMBED.0.0 ATTEND.0.0 REDUCE_ATTEND.0.0 GATE.0.0 COUNTS.0.0 DISPATCH.0.0 EXPERT.0.0 COMBINE.0.0 MERGE.0.0 "
                    "REDUCE_MERGE.0.0 ATTEND.1.0 REDUCE_ATTEND.1.0 GATE.1.0 COUNTS.1.0 DISPATCH.1.0 EXPERT.1.0 COMBINE.1.0 MERGE.1.0 "
                    "REDUCE_MERGE.1.0 SAMPLE.1.0")
    order = [s.op for s in build("overlapped", 1, 3, 2, 2, shards=True).programs[Role(0, True)]]
    for what, after in (("ATTEND", "GATE"), ("MERGE", "ATTEND")):  # a's sum travels behind b's part of the same
        a, b = order.index(Op(f"REDUCE_{what}", 1, 0)), order.index(Op(after, 1 + (what == "MERGE"), 0))
        assert Op(what, 1, 1) in order[a:b]


def test_two_lanes_travel_behind_each_others_compute():
    """Between the post of an exchange and its need stands another micro-batch's compute, but for b's counts."""
    steps = build("overlapped", 1, 3, 2, 2).programs[Role(0, True)]
    order = [s.op for s in steps]
    compute = ("ATTEND", "EXPERT")
    for kind, after in (("DISPATCH", "EXPERT"), ("COMBINE", "MERGE")):
        for micro in (0, 1):
            a, b = order.index(Op(kind, 1, micro)), order.index(Op(after, 1, micro))
            assert any(op.kind in compute and op.micro != micro for op in order[a:b]), (kind, micro)


def test_a_lanes_dispatch_does_not_wait_for_the_other_lanes_rows():
    """a's counts are there before b's rows are back: b's MERGE, which awaits those, stands behind a's DISPATCH."""
    order = [s.op for s in build("overlapped", 1, 3, 3, 3).programs[Role(0, True)]]
    for layer in (1, 2):
        for micro in (0, 1):
            assert order.index(Op("DISPATCH", layer, micro)) < order.index(Op("MERGE", layer - 1, micro + 1))


GRID = """\
schedule plain: 2 stage(s), 2 layers, 2 micro-batch(es), 1 lane(s); a column is one tick, a cell an op and its micro-batch
a=ATTEND  g=GATE  n=COUNTS  d=DISPATCH  e=EXPERT  c=COMBINE  m=MERGE  >=SEND  s=SAMPLE
stage 0 ( 67% busy) a0 g0 n0 d0 e0 c0 m0 >0 a1 g1 n1 d1 e1 c1 m1 >1 .  .  .  .  .  .  .  .
stage 1 ( 67% busy) .  .  .  .  .  .  .  .  a0 g0 n0 d0 e0 c0 m0 s0 a1 g1 n1 d1 e1 c1 m1 s1"""


def test_the_grid_of_a_small_pipeline():
    built = build("plain", 2, 2, 2)
    drawn = check.draw(built, check.timeline(built, 1))
    assert [line.rstrip() for line in drawn.splitlines()] == GRID.splitlines()


@pytest.mark.parametrize("stages, micros", [(2, 2), (4, 4), (4, 8), (3, 5)])
def test_with_as_many_micro_batches_as_stages_no_stage_idles_in_decode(stages, micros):
    """From the second round on every stage has an op at every tick: rounds overlap through sampling."""
    built = build("plain", stages, stages, micros)
    rounds = 6
    cells = [c for c in check.timeline(built, rounds) if c[3].kind != "RECV"]
    for stage in range(stages):
        ticks = sorted(tick for role, rnd, tick, _ in cells if role.stage == stage and 0 < rnd < rounds)
        assert ticks == list(range(ticks[0], ticks[0] + len(ticks)))


def test_with_one_micro_batch_in_flight_a_pipeline_of_four_is_a_quarter_busy():
    built = build("plain", 4, 4, 1)
    cells = [c for c in check.timeline(built, 8) if c[3].kind != "RECV"]
    last = max(tick for _, _, tick, _ in cells) + 1
    assert len(cells) / (4 * last) == pytest.approx(0.25)


# ---------------------------------------------------------------- damage
def damaged(built: Schedule, role: Role, change) -> Schedule:
    programs = dict(built.programs)
    programs[role] = tuple(change(list(programs[role])))
    return Schedule(built.name, built.stages, built.layers, built.micros, built.lanes, programs)


def drop(kind):
    return lambda steps: [s for s in steps if s.op.kind != kind or s.op.micro != 0]


def swap_first(kind):
    def change(steps):
        at = [i for i, s in enumerate(steps) if s.op.kind == kind]
        steps[at[0]], steps[at[1]] = steps[at[1]], steps[at[0]]
        return steps
    return change


@pytest.mark.parametrize("role, change, words", [
    (Role(0, False), drop("EXPERT"), "needs"),
    (Role(0, False), swap_first("COUNTS"), "the leaders post"),
    (Role(0, True), drop("SEND"), "receives RECV.2.0"),
    (Role(0, True), swap_first("SEND"), "receives RECV.2.0"),
    (Role(1, True), lambda steps: steps + [steps[-1]], "more than once"),
    (Role(1, True), lambda steps: [Step(s.op, (Op("SAMPLE", 9, 9),)) if s.op.kind == "SEND" or s.op.kind == "SAMPLE" else s for s in steps],
     "not in the program")])
def test_damage_is_found_and_named(role, change, words):
    built = damaged(build("overlapped", 2, 4, 2, 2), role, change)
    with pytest.raises(ScheduleError) as error:
        check.check(built)
    assert words in str(error.value) and "stage" in str(error.value)
    assert ">>" in str(error.value) or words == "not in the program"


def test_a_deadlock_is_found_and_marked_in_the_grid():
    """A leader that awaits its dispatch before it posts it in the same round, while the others need its counts first."""
    built = build("plain", 1, 1, 2)

    def change(steps):
        late = next(i for i, s in enumerate(steps) if s.op == Op("DISPATCH", 0, 1))
        early = next(i for i, s in enumerate(steps) if s.op == Op("COUNTS", 0, 0))
        steps[early + 1] = Step(steps[early + 1].op, (Op("COUNTS", 0, 1), Op("DISPATCH", 0, 1)))
        steps[early + 1:early + 1] = [Step(steps[late].op, (Op("COUNTS", 0, 0),))]
        del steps[late + 1]
        return steps

    late = damaged(built, Role(0, True), change)
    with pytest.raises(ScheduleError) as error:
        check._check_progress(late)
    assert ">>" in str(error.value) and "<<" in str(error.value)


@pytest.mark.parametrize("arguments, words", [
    (("plain", 0, 4, 1), "stages"), (("plain", 5, 4, 1), "at most the 4 layers"), (("plain", 1, 4, 0), "micro_batches"),
    (("plain", 1, 4, 1, 0), "lanes"), (("fast", 1, 4, 1), "plain, overlapped, queued")])
def test_impossible_schedules_are_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        build(*arguments)


@given(st.text(max_size=60))
def test_any_other_text_is_refused_as_a_schedule(text):
    with pytest.raises(UserError):
        schedule.parse("schedule x " + text + "\nno step")
