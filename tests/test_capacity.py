"""A capacity factor: rerouted and dropped choices against a plain loop; in runs the same for all transports, none where it is large."""

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from hpcmoe.config import RouterConfig, RunJob
from hpcmoe.model.capacity import DROPPED, Capacity, room, route_kept
from hpcmoe.model.copies import Copies
from hpcmoe.model.router import gate
from local import choices, run_job, write_prompts

ROUTERS = {
    "mixtral": RouterConfig(6, 2), "olmoe": RouterConfig(7, 3, renormalise=False), "one choice": RouterConfig(4, 1),
    "gpt-oss": RouterConfig(5, 2, over="selected"),
    "deepseek": RouterConfig(8, 3, "sigmoid", bias=True, groups=4, top_groups=3, scale=2.5)}


def weight_of(logits, experts, e, r: RouterConfig) -> float:
    """What the router gives expert e of one token that chose `experts`, by its formula."""
    if r.score == "sigmoid":
        score = [1 / (1 + math.exp(-x)) for x in logits]
    elif r.over == "selected":
        score = [math.exp(x) for x in logits]
    else:
        score = [math.exp(x) / sum(math.exp(y) for y in logits) for x in logits]
    by = sum(score[f] for f in experts) if r.renormalise or r.over == "selected" else 1.0
    return r.scale * score[e] / by


def best_groups(logits, bias_e, r: RouterConfig) -> list[int]:
    """The experts that may be chosen: those of the groups whose two best are best."""
    size = r.experts // r.groups
    choice = [(1 / (1 + math.exp(-x)) if r.score == "sigmoid" else x) + b for x, b in zip(logits, bias_e)]
    worth = [sum(sorted(choice[g * size:(g + 1) * size])[-2:]) for g in range(r.groups)]
    kept = sorted(range(r.groups), key=lambda g: -worth[g])[:r.top_groups]
    return [e for e in range(r.experts) if e // size in kept]


def plain(expert_tk, weight_tk, logit_te, bias_e, r: RouterConfig, most: int, reroute: bool):
    """Token by token, choice by choice."""
    kept, weights, rows = expert_tk.tolist(), weight_tk.tolist(), [0] * r.experts
    over = []
    for t, chosen in enumerate(kept):
        for k, e in enumerate(chosen):
            if rows[e] < most:
                rows[e] += 1
            else:
                over.append((t, k))
                kept[t][k] = DROPPED
    for t, k in over if reroute else []:
        logits, taken = logit_te[t].tolist(), {*expert_tk[t].tolist(), *kept[t]}
        choice = [(1 / (1 + math.exp(-x)) if r.score == "sigmoid" else x) + b for x, b in zip(logits, bias_e)]
        able = [e for e in best_groups(logits, bias_e, r) if e not in taken and rows[e] < most]
        if able:
            e = max(able, key=lambda f: choice[f])
            rows[e] += 1
            kept[t][k], weights[t][k] = e, weight_of(logits, expert_tk[t].tolist(), e, r)
    return np.array(kept), np.array(weights), len(over)


@settings(deadline=None, max_examples=120)
@given(st.sampled_from(sorted(ROUTERS)), st.integers(0, 12), st.floats(0.05, 4), st.booleans(), st.integers(0, 10**6))
def test_choices_beyond_the_limit_against_a_plain_loop(name, tokens, factor, reroute, seed):
    r, rng = ROUTERS[name], np.random.default_rng(seed)
    logit_te = (rng.normal(size=(tokens, r.experts)) + 2 * rng.normal(size=r.experts)).astype(np.float32)
    bias_e = rng.normal(size=r.experts).astype(np.float32) / 3 if r.bias else np.zeros(r.experts, dtype=np.float32)
    expert_tk, weight_tk = gate(logit_te, r, bias_e if r.bias else None)
    most = math.ceil(round(factor * tokens * r.top_k / r.experts, 8))
    assert room(factor, tokens, r) == most
    limit = Capacity(RunJob(capacity_factor=factor, over_capacity="reroute" if reroute else "drop"), r, [3])
    before = expert_tk.copy(), weight_tk.copy()
    kept_tk, new_tk = limit.limit(3, expert_tk, weight_tk, logit_te, bias_e if r.bias else None)
    expected, weights, over = plain(expert_tk, weight_tk, logit_te, bias_e, r, most, reroute)
    assert kept_tk.tolist() == expected.tolist()
    np.testing.assert_allclose(new_tk[kept_tk != DROPPED], weights.reshape(kept_tk.shape)[kept_tk != DROPPED], rtol=2e-5)
    dropped = int((kept_tk == DROPPED).sum())
    assert limit.counted == {3: [over - dropped, dropped]}
    assert (expert_tk == before[0]).all() and (weight_tk == before[1]).all()
    rows_e = np.bincount(kept_tk[kept_tk != DROPPED], minlength=r.experts)
    assert rows_e.max(initial=0) <= most
    for row in kept_tk.tolist():
        assert len({e for e in row if e != DROPPED}) == sum(e != DROPPED for e in row)


@pytest.mark.parametrize("factor, tokens, expected", [(1.1, 160, 22), (1.0, 7, 1), (0.01, 3, 1), (1.25, 0, 0), (1e9, 4, 500_000_000)])
def test_the_limit_is_rounded_up_once(factor, tokens, expected):
    """1.1 x 160 x 2 / 16 = 22, though in floating point it is a little more."""
    assert room(factor, tokens, RouterConfig(16, 2)) == expected


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 9), st.integers(1, 3), st.integers(0, 3), st.integers(0, 4))
def test_slots_of_choices_that_are_kept(seed, tokens, k, spare, leader):
    """Rows of every copy in token order, by turns; slot -1 where a choice was dropped."""
    rng, experts = np.random.default_rng(seed), 4
    expert_tk = np.array([rng.permutation(experts)[:k] for _ in range(tokens)], dtype=np.int64).reshape(tokens, k)
    expert_tk[rng.random(expert_tk.shape) < 0.3] = DROPPED
    expert_s = rng.permutation(np.concatenate([np.arange(experts), rng.integers(0, experts, spare)]))
    found, copy_tk = route_kept(expert_tk, experts, Copies(expert_s, experts), leader)
    seen, rows_s = [0] * experts, [[] for _ in expert_s]
    for t in range(tokens):
        for j in range(k):
            e = int(expert_tk[t, j])
            if e == DROPPED:
                assert found.slot_tk[t, j] == copy_tk[t, j] == -1
                continue
            copies = np.flatnonzero(expert_s == e)
            slot = int(copies[(seen[e] + leader) % len(copies)])
            seen[e] += 1
            rows_s[slot].append(t)
            assert copy_tk[t, j] == slot
    assert found.n_send_e.tolist() == [len(rows) for rows in rows_s]
    assert found.token_s.tolist() == [t for rows in rows_s for t in rows]
    for t in range(tokens):
        for j in range(k):
            if expert_tk[t, j] != DROPPED:
                assert found.token_s[found.slot_tk[t, j]] == t


# ---------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A random model with 8 experts, requests, and a run on one rank without a limit: folder, settings, its choices."""
    from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig
    from hpcmoe.data.create import create
    folder = tmp_path_factory.mktemp("capacity")
    model = ModelConfig("mixtral", 97, 32, 2, AttentionConfig(4, 2, 8), RouterConfig(8, 2), ExpertConfig(24), 128)
    create(str(folder / "model.h5"), model, dtype="fp32", seed=5)
    rng = np.random.default_rng(3)
    write_prompts(folder / "requests.jsonl", [rng.integers(3, 97, n) for n in (9, 5, 14, 8, 3, 7)], max_tokens=4, logprobs=1, ignore_eos=True)
    sets = {"weights.file": folder / "model.h5", "requests.file": folder / "requests.jsonl", "layout.leaders": 1}
    _, rows, report = run_job(1, folder, sets, name="base")
    assert "capacity" not in report
    return folder, sets, choices(rows)


def same(rows, expected) -> None:
    for mine, want in zip(choices(rows), expected, strict=True):
        assert mine["token_ids"] == want["token_ids"]
        np.testing.assert_allclose(mine["logprobs"]["token_logprobs"], want["logprobs"]["token_logprobs"], atol=1e-5)


@pytest.mark.parametrize("over", ["reroute", "drop"])
def test_a_limit_means_the_same_to_every_transport_and_a_large_one_nothing(case, over):
    """One leader, so the micro-batches are those of one rank. Counted rows are those that came and did not come."""
    folder, sets, base = case
    limited = {**sets, "run.capacity_factor": 0.75, "run.over_capacity": over}
    _, rows, report = run_job(1, folder, limited, name=over)
    assert [c["token_ids"] for c in choices(rows)] != [c["token_ids"] for c in base]  # it changes results
    found = report["capacity"]
    assert found["changes_results"] and found["rerouted_rows"] > 0 if over == "reroute" else found["rerouted_rows"] == 0
    tokens = report["throughput"]["prefill_rows"] + report["throughput"]["decode_rows"]
    for which in ("rerouted_rows", "dropped_rows"):
        assert found[which] == sum(layer[which] for layer in found["layers"])
    for layer, load in zip(found["layers"], report["expert_load"]["layers"], strict=True):
        assert load["rows"] + layer["dropped_rows"] == 2 * tokens and layer["dropped_rows"] > 0
    for more in ({"run.transport": "hierarchical", "layout.replicas": 4}, {"run.transport": "pairwise", "layout.ep": 2, "layout.tp": 2}):
        _, again, other = run_job(4, folder, {**limited, **more}, env={"HPCMOE_RANKS_PER_NODE": "2"}, name=over)
        same(again, choices(rows))
        assert other["capacity"] == found
    if over == "reroute":
        _, free, report = run_job(1, folder, {**sets, "run.capacity_factor": 1e9}, name="free")
        assert report["capacity"]["rerouted_rows"] == report["capacity"]["dropped_rows"] == 0
        assert [c["token_ids"] for c in choices(free)] == [c["token_ids"] for c in base]
        same(free, base)


def test_what_cannot_be_is_refused():
    from hpcmoe.errors import UserError
    from hpcmoe.jobfile import read_job
    from hpcmoe.model import capacity
    base = ["weights.file=m.h5", "requests.file=r.jsonl"]
    for key, value in (("capacity_factor", "-0.5"), ("capacity_factor", "nan"), ("capacity_factor", "inf"), ("over_capacity", '"lose"')):
        with pytest.raises(UserError, match=f"run.{key} = "):
            read_job(None, [*base, f"run.{key}={value}"])
    with pytest.raises(UserError, match="run.over_capacity = 'reroute': expected drop"):
        capacity.check(RunJob(capacity_factor=1.0), RouterConfig(16, 2, "sparsemixer"))
    capacity.check(RunJob(capacity_factor=1.0, over_capacity="drop"), RouterConfig(16, 2, "sparsemixer"))
