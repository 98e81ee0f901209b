"""Layouts as arithmetic: every rank has one place, every layer and expert one owner."""

import pytest
from hypothesis import given, strategies as st

from hpcmoe.config import AttentionConfig, ExpertConfig, LayoutJob, ModelConfig, RouterConfig
from hpcmoe.errors import UserError
from hpcmoe.parallel.layout import Layout, choose, share


def model(layers=4, experts=16) -> ModelConfig:
    return ModelConfig("mixtral", 100, 32, layers, AttentionConfig(4, 2, 8), RouterConfig(experts, 2), ExpertConfig(16), 64)


@given(st.integers(0, 200), st.integers(1, 40))
def test_shares_are_a_partition_and_differ_by_one_at_most(total, parts):
    shares = [share(total, parts, p) for p in range(parts)]
    assert [i for part in shares for i in part] == list(range(total))
    sizes = [len(part) for part in shares]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 16), st.integers(1, 8))
def test_places_and_columns_agree(dp, pp, ep, tp):
    layout = Layout(dp, pp, ep, tp)
    seen = [rank for d in range(dp) for p in range(pp) for rank in sorted(r for j in range(tp) for r in layout.column(d, p, j))]
    assert seen == list(range(layout.size))
    for rank in seen:
        here = layout.place(rank)
        assert layout.column(here.dp, here.stage, here.shard)[here.place] == rank
    for slots in (layout, Layout(dp, pp, ep, tp, replicas=5)):
        owners = slots.owner_of_slot(16)
        assert len(owners) == slots.slots(16) and all(s in slots.slots_of(owner, 16) for s, owner in enumerate(owners))


@pytest.mark.parametrize("ranks, expected", [
    (1, (1, 1, 1)), (2, (1, 1, 2)), (3, (1, 1, 3)), (4, (1, 1, 4)), (8, (1, 1, 8)), (16, (1, 1, 16)),
    (32, (1, 2, 16)), (64, (1, 4, 16)), (128, (2, 4, 16)), (17, (17, 1, 1))])
def test_a_sensible_layout_for_each_number_of_ranks(ranks, expected):
    layout, why = choose(LayoutJob(), ranks, model())
    assert (layout.dp, layout.pp, layout.ep) == expected
    assert f"{ranks} rank" in why


def test_what_is_asked_for_is_kept_and_the_rest_chosen():
    layout, _ = choose(LayoutJob(pp=4), 8, model())
    assert (layout.dp, layout.pp, layout.ep) == (1, 4, 2)


@pytest.mark.parametrize("job, ranks, words", [
    (LayoutJob(dp=1, pp=4, ep=16), 32, ["pp=4 ep=16", "32 ranks", "pp=2 ep=16", "or start 64 ranks"]),
    (LayoutJob(ep=17), 4, ["ep=17 does not fit 4 ranks", "ep <= 16 experts, or more"]),
    (LayoutJob(ep=20, replicas=2), 20, ["ep=20", "ep <= 18 slots", "nearest", "ep=10"]),
    (LayoutJob(ep=2, replicas=17), 2, ["replicas = 17", "at most 16", "2 expert places"]),
    (LayoutJob(replicas=1), 1, ["replicas = 1", "at most 0"]),
    (LayoutJob(replicas=-1), 2, ["replicas = -1", "0 for none"]),
    (LayoutJob(pp=5), 10, ["pp=5", "pp <= 4 layers", "nearest"]),
    (LayoutJob(tp=3), 3, ["tp = 3", "hidden width 16", "nearest: 4, 2, 1"]),
    (LayoutJob(tp=32), 32, ["tp = 32", "hidden width 16", "nearest: 16, 8, 4"]),
    (LayoutJob(tp=2), 3, ["tp=2", "3 ranks", "nearest", "tp=1", "a multiple of 2"]),
    (LayoutJob(tp=2, pp=3), 8, ["pp=3 tp=2", "8 ranks", "pp=2 ep=2 tp=2"]),
    (LayoutJob(dp=1, pp=2, ep=4, tp=2), 8, ["ep=4 tp=2", "or start 16 ranks"]),
    (LayoutJob(dp=-1), 2, ["dp", "-1"]),
    (LayoutJob(leaders="some"), 2, ["leaders", "some", "all"]),
    (LayoutJob(leaders="0"), 2, ["leaders", "0"]),
    (LayoutJob(leaders="²"), 2, ["leaders", "²", "a number"]),
    (LayoutJob(leaders="5"), 4, ["leaders", "5", "4 ranks"])])
def test_a_layout_that_does_not_fit_is_refused_with_what_would(job, ranks, words):
    with pytest.raises(UserError) as error:
        choose(job, ranks, model())
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("job, ranks, ep, replicas", [
    (LayoutJob(ep=20), 20, 20, 4), (LayoutJob(replicas=4), 20, 20, 4), (LayoutJob(ep=4, replicas=4), 8, 4, 4), (LayoutJob(replicas=3), 4, 4, 3),
    (LayoutJob(pp=2, ep=18), 36, 18, 2), (LayoutJob(ep=2, replicas=16), 2, 2, 16), (LayoutJob(), 32, 16, 0)])
def test_spare_slots_are_asked_for_by_number_or_by_more_places_than_experts(job, ranks, ep, replicas):
    layout, why = choose(job, ranks, model())
    assert (layout.ep, layout.replicas, layout.slots(16)) == (ep, replicas, 16 + replicas)
    assert ("cop" in why) == (replicas > 0)


@given(st.integers(1, 130), st.integers(1, 8), st.integers(1, 64))
def test_every_choice_fits(ranks, layers, experts):
    layout, _ = choose(LayoutJob(), ranks, model(layers, experts))
    assert layout.size == ranks and layout.pp <= layers and layout.ep <= experts
