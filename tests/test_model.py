"""The model's mathematics against plain loops and closed forms, in fp64 where a sum is long."""

import math

import numpy as np
from hypothesis import given, settings, strategies as st

from hpcmoe.config import RouterConfig
from hpcmoe.model.attention import Segments, attend
from hpcmoe.model.dense import Rope, inverse_frequencies, layer_norm, rms_norm
from hpcmoe.model.kvcache import KVCache, bytes_per_sequence
from hpcmoe.model.router import gate, softmax, top_k
from hpcmoe.model.route import by_expert, merge, route

SEEDS = st.integers(0, 2**32 - 1)


@given(st.integers(0, 9), st.integers(1, 40), SEEDS)
def test_norms(t, d, seed):
    rng = np.random.default_rng(seed)
    x, weight, bias = (rng.normal(size=s).astype(np.float32) for s in ((t, d), d, d))
    for row, y, z in zip(x.astype(np.float64), rms_norm(x, weight, 1e-5), layer_norm(x, weight, bias, 1e-5)):
        np.testing.assert_allclose(y, row / math.sqrt((row**2).mean() + 1e-5) * weight, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(z, (row - row.mean()) / math.sqrt(row.var() + 1e-5) * weight + bias, rtol=2e-4, atol=1e-5)


def test_rotary_positions_turn_pairs_as_complex_numbers():
    x = np.random.default_rng(0).normal(size=(5, 2, 6)).astype(np.float32)
    position = np.array([0, 3, 3, 17, 40])
    speed, _ = inverse_frequencies({"type": "default", "theta": 100.0}, 6, 64)
    np.testing.assert_allclose(speed, 100.0 ** (-np.array([0, 2, 4]) / 6))
    y = Rope({"type": "default", "theta": 100.0}, 6, 64)(x, position)
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * position[:, None, None] * speed)
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-5)


# ---------------------------------------------------------------- attention
def plain_attention(q_pc, k_pc, v_pc, window):
    """One head of one whole sequence: a loop over positions."""
    out = np.zeros_like(q_pc)
    for p in range(len(q_pc)):
        first = max(0, p - window + 1) if window else 0
        weight = np.exp(q_pc[p] @ k_pc[first:p + 1].T)
        out[p] = weight @ v_pc[first:p + 1] / weight.sum()
    return out


@given(SEEDS, st.sampled_from([(1, 1), (3, 1), (4, 2), (6, 3)]), st.sampled_from([0, 1, 4]))
@settings(deadline=None, max_examples=40)
def test_attention_in_any_chunks_equals_a_plain_loop(seed, heads, window):
    """Sequences of unequal lengths, cut into chunks at random, several per step, in slots out of order."""
    rng = np.random.default_rng(seed)
    (h, g), c = heads, 4
    lengths = rng.integers(1, 20, size=rng.integers(1, 6))
    slots = rng.permutation(8)[:len(lengths)]
    q, k, v = ([rng.normal(size=(n, heads_here, c)).astype(np.float32) for n in lengths] for heads_here in (h, g, g))
    cache = KVCache(np, [5], 8, g, c, 20)
    done, out = np.zeros(len(lengths), dtype=int), [np.zeros_like(part) for part in q]
    while (done < lengths).any():
        order = sorted(np.flatnonzero(done < lengths), key=lambda s: slots[s])
        count = np.array([1 if rng.random() < 0.5 else rng.integers(1, lengths[s] - done[s] + 1) for s in order])
        segments = Segments.of(slots[order], done[order], count)
        rows = [np.concatenate([part[s][done[s]:done[s] + n] for s, n in zip(order, count)]) for part in (q, k, v)]
        cache.append(5, segments.slot_t, segments.position_t, rows[1], rows[2])
        mixed = np.split(attend(rows[0], segments, cache.k[5], cache.v[5], window), np.cumsum(count)[:-1])
        for s, n, part in zip(order, count, mixed):
            out[s][done[s]:done[s] + n] = part
            done[s] += n
    for s in range(len(lengths)):
        for head in range(h):
            expected = plain_attention(*(a.astype(np.float64) for a in (q[s][:, head], k[s][:, head * g // h], v[s][:, head * g // h])), window)
            np.testing.assert_allclose(out[s][:, head], expected, atol=2e-5)


def test_cache_bytes_are_what_is_allocated():
    cache = KVCache(np, [2, 3, 7], 5, 4, 6, 11)
    assert cache.nbytes == 5 * bytes_per_sequence(3, 4, 6, 11) == 2 * 3 * 5 * 4 * 6 * 11 * 4


# ---------------------------------------------------------------- router
def plain_gate(logit_e, r: RouterConfig, bias_e):
    """One token by the definitions, with Python lists."""
    e = len(logit_e)
    score = [1 / (1 + math.exp(-x)) for x in logit_e] if r.score == "sigmoid" else \
        [math.exp(x) / sum(math.exp(y) for y in logit_e) for x in logit_e] if r.over == "all" else list(logit_e)
    choice = [s + (bias_e[i] if r.bias else 0.0) for i, s in enumerate(score)]
    allowed = range(e)
    if r.groups > 1:
        size = e // r.groups
        worth = [sum(sorted(choice[g * size:(g + 1) * size])[-2:]) for g in range(r.groups)]
        best = sorted(range(r.groups), key=lambda g: (-worth[g], g))[:r.top_groups]
        allowed = [i for i in range(e) if i // size in best]
    chosen = sorted(allowed, key=lambda i: (-choice[i], i))[:r.top_k]
    weight = [score[i] for i in chosen]
    if r.score == "softmax" and r.over == "selected":
        weight = [math.exp(w) / sum(math.exp(v) for v in weight) for w in weight]
    elif r.renormalise:
        weight = [w / sum(weight) for w in weight]
    return chosen, [w * r.scale for w in weight]


ROUTERS = st.builds(RouterConfig, experts=st.sampled_from([8, 12, 16]), top_k=st.integers(1, 4), score=st.sampled_from(["softmax", "sigmoid"]),
                    over=st.sampled_from(["all", "selected"]), bias=st.booleans(), groups=st.sampled_from([1, 2, 4]),
                    top_groups=st.just(1), renormalise=st.booleans(), scale=st.sampled_from([1.0, 2.5]))


@given(ROUTERS, SEEDS, st.integers(0, 7))
@settings(deadline=None)
def test_gate_equals_its_definition(r, seed, t):
    r = RouterConfig(**{**r.__dict__, "top_groups": max(1, r.groups // 2), "top_k": min(r.top_k, r.experts // r.groups)})
    rng = np.random.default_rng(seed)
    logit, bias = rng.normal(size=(t, r.experts)).astype(np.float32), rng.normal(size=r.experts).astype(np.float32)
    expert_tk, weight_tk = gate(logit, r, bias if r.bias else None)
    assert expert_tk.shape == weight_tk.shape == (t, r.top_k)
    for row in range(t):
        chosen, weight = plain_gate(logit[row].astype(float), r, bias)
        assert expert_tk[row].tolist() == chosen
        np.testing.assert_allclose(weight_tk[row], weight, rtol=1e-5)


def test_among_equals_the_lower_expert_comes_first():
    assert top_k(np.array([[1.0, 3.0, 3.0, 2.0, 3.0]]), 4).tolist() == [[1, 2, 4, 3]]


def test_softmax_of_extremes():
    np.testing.assert_allclose(softmax(np.array([[1e30, 1e30, -np.inf], [0.0, -np.inf, -1e30]])), [[0.5, 0.5, 0], [1, 0, 0]])


# ---------------------------------------------------------------- route and merge
@given(SEEDS, st.integers(0, 12), st.integers(1, 3), st.integers(3, 9))
def test_route_and_merge_equal_a_plain_loop(seed, t, k, experts):
    rng = np.random.default_rng(seed)
    expert_tk = np.array([rng.permutation(experts)[:k] for _ in range(t)], dtype=np.int64).reshape(t, k)
    plan = route(expert_tk, experts)
    pairs = sorted((int(expert_tk[row, j]), row, j) for row in range(t) for j in range(k))
    assert plan.token_s.tolist() == [row for _, row, _ in pairs]
    assert [int(plan.slot_tk[row, j]) for _, row, j in pairs] == list(range(t * k))
    assert plan.n_send_e.tolist() == [sum(e == want for e, _, _ in pairs) for want in range(experts)]
    x, y = rng.normal(size=(t, 5)).astype(np.float32), rng.normal(size=(t * k, 5)).astype(np.float32)
    weight = rng.random((t, k)).astype(np.float32)
    expected = np.array([x[row] + sum(weight[row, j] * y[plan.slot_tk[row, j]] for j in range(k)) for row in range(t)]).reshape(t, 5)
    merge(x, y, weight, plan.slot_tk)
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=5))
def test_received_rows_are_sorted_by_expert_and_stable(counts):
    counts = np.array(counts)
    expert_i = [e for peer in counts for e, n in enumerate(peer) for _ in range(n)]
    order = by_expert(counts)
    expected = sorted(range(len(expert_i)), key=lambda i: expert_i[i])
    assert (list(range(len(expert_i))) if order is None else order.tolist()) == expected
