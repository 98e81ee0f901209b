"""sample.cu against its twin, and the twin against a plain loop: the same tokens, the same random numbers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmoe.kernels.sample import Draw, sample, sample_twin, threads
from tests.cudabed.check import count, guarded, kernels, needs_compiler, same_for_all_seeds

NEAR = 1e-9  # u and top_p this close to a boundary between two tokens may fall on either side
DTYPES = [np.float64, np.int32, np.float64, np.uint64, np.uint64, np.int64, np.int32]


def draws(rows: int, temperature=1.0, top_k=0, top_p=1.0, seed=1, request=None, position=7, given=-1) -> Draw:
    values = temperature, top_k, top_p, seed, np.arange(rows) if request is None else request, position, given
    return Draw(*(np.broadcast_to(v, rows).astype(t) for v, t in zip(values, DTYPES)))


def run(call, logit_nv, draw, **options) -> tuple[np.ndarray, np.ndarray]:
    token_n, same_token = guarded(np.full(len(logit_nv), -7, np.int32))
    logprob_n, same_logprob = guarded(np.full(len(logit_nv), 9.0))
    call(logit_nv, draw, token_n, logprob_n, **options)
    same_token(), same_logprob()
    return token_n, logprob_n


def on_cpu(*args, **options):
    return sample(kernels("fp16"), *args, **options)


def agree(logit_nv, draw, **options) -> np.ndarray:
    """Kernel and twin give the same tokens and log-probabilities; returns the tokens."""
    token_n, logprob_n = run(on_cpu, logit_nv, draw, **options)
    twin_token, twin_logprob = run(sample_twin, logit_nv, draw, **options)
    np.testing.assert_array_equal(token_n, twin_token)
    np.testing.assert_allclose(logprob_n, twin_logprob, rtol=1e-6, atol=1e-6)
    return token_n


# ---- the plain loop
def philox_u(seed: int, request: int, position: int) -> float:
    low = 0xFFFFFFFF
    c, k = [position & low, position >> 32, request & low, request >> 32], [seed & low, seed >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q & low, p >> 32 ^ c[3] ^ k[1], p & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return ((c[0] >> 5) * 2**26 + (c[1] >> 6)) / 2**53


def plainly(logit_v, temperature, top_k, top_p, u) -> tuple[int, float]:
    """(token, how near u or top_p came to a boundary between two tokens)."""
    order = sorted(range(len(logit_v)), key=lambda i: (-logit_v[i], i))
    order = order[:top_k] if top_k > 0 else order
    weight = [math.exp((float(logit_v[i]) - float(logit_v[order[0]])) / temperature) for i in order]
    total, kept, before, near = math.fsum(weight), [], 0.0, 1.0
    for w in weight:
        if kept and before / total >= top_p:
            break
        near = min(near, abs(before / total - top_p))
        kept.append(w)
        before += w
    near = min(near, abs(before / total - top_p)) if top_p < 1 else near
    target, running = u * before, 0.0
    for i, w in zip(order, kept):
        running += w
        near = min(near, abs(running / before - u))
        if running > target:
            return i, near
    return order[len(kept) - 1], near


def logits(rows: int, vocab: int, kind: str, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 3, (rows, vocab))
    if kind == "ties":
        x = np.round(x)
    elif kind == "few values":
        x = rng.integers(0, 2, (rows, vocab))
    elif kind == "flat":
        x = x * 1e-3
    elif kind == "peaked":
        x = x * 40
    elif kind == "masked":
        x[rng.random((rows, vocab)) < 0.7] = -np.inf
        x[:, vocab // 2] = 0.25
    elif kind == "offset":
        x = x + 300
    return x.astype(np.float32)


KINDS = ["normal", "ties", "few values", "flat", "peaked", "masked", "offset"]


@settings(max_examples=60, deadline=None)
@given(vocab=st.integers(1, 60), kind=st.sampled_from(KINDS), temperature=st.sampled_from([0.3, 1.0, 2.5]),
       top_k=st.sampled_from([0, 1, 2, 7, 100]), top_p=st.sampled_from([0.0, 0.137, 0.7213, 0.95, 1.0]),
       seed=st.integers(0, 2**64 - 1), request=st.integers(0, 2**64 - 1), position=st.integers(0, 2**40))
def test_the_twin_follows_the_plain_loop(vocab, kind, temperature, top_k, top_p, seed, request, position):
    logit_nv = logits(1, vocab, kind, seed % 1000)
    draw = draws(1, temperature, top_k, top_p, np.uint64(seed), np.uint64(request), position)
    token_n, logprob_n = run(sample_twin, logit_nv, draw)
    token, near = plainly(logit_nv[0], temperature, top_k, top_p, philox_u(seed, request, position))
    assert token_n[0] == token or near < NEAR
    wide = logit_nv[0].astype(np.float64)
    top = wide.max()
    want = wide[token_n[0]] - top - math.log(math.fsum(np.exp(wide - top)))
    assert logprob_n[0] == pytest.approx(want, abs=1e-6)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 3), vocab=st.integers(1, 700), kind=st.sampled_from(KINDS), data=st.data())
def test_kernel_and_twin_agree(rows, vocab, kind, data):
    one = lambda *values: data.draw(st.lists(st.sampled_from(values), min_size=rows, max_size=rows))  # noqa: E731
    big = lambda: np.array(data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=rows, max_size=rows)), np.uint64)  # noqa: E731
    draw = draws(rows, one(0.0, 0.3, 1.0, 2.5), one(0, 1, 2, 7, 50, 10**6), one(0.0, 0.137, 0.7213, 0.95, 1.0), big(),
                 big(), one(0, 9, 2**40), one(-1, -1, 0, vocab - 1))
    agree(logits(rows, vocab, kind, data.draw(st.integers(0, 99))), draw)


@needs_compiler
@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 31, 63, 64, 65, 255, 1023, 1026, 4099])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_choose_at_odd_vocabularies(vocab, kind):
    temperature, top_k, top_p, given = np.array([
        (0, 0, 1, -1), (0, 5, 0.5, -1), (1, 0, 1, -1), (0.7, 0, 1, -1), (1, 40, 1, -1), (1, 0, 0.9013, -1),
        (1.3, 40, 0.8123, -1), (1, 3000, 0.99017, -1), (1, 1, 1, -1), (1, 0, 1e-9, -1), (0, 0, 1, vocab // 2)]).T
    for seed in range(2):
        agree(logits(11, vocab, kind, seed), draws(11, temperature, top_k, top_p, seed, given=given))


@needs_compiler
@pytest.mark.parametrize("vocab", [32000, 151937, 262144])
def test_large_vocabularies(vocab):
    # Flat rows and rows with many ties have more tokens in a bin than are put in order at once.
    logit_nv = np.concatenate([logits(1, vocab, k) for k in KINDS])
    temperature = [1, 1, 1, 1, 1, 0.5, 0]
    for top_k, top_p in ((0, 1.0), (60, 0.93071), (20000, 0.61803)):
        agree(logit_nv, draws(len(KINDS), temperature, top_k, top_p, seed=top_k))


@needs_compiler
def test_many_draws_from_one_row_reach_every_part_of_it():
    rows = 100
    logit_nv = np.repeat(logits(1, 5000, "flat"), rows, axis=0)
    assert len(set(agree(logit_nv, draws(rows, seed=4)))) > 80
    logit_nv = np.repeat(logits(1, 5000, "few values"), rows, axis=0)
    assert len(set(agree(logit_nv, draws(rows, top_p=0.9013)))) > 70


@needs_compiler
def test_frequencies_follow_the_distribution():
    rows, logit_v = 1500, np.array([0.3, 2.0, -1.0, 1.0, 0.0, 1.5], np.float32)
    token_n, _ = run(on_cpu, np.tile(logit_v, (rows, 1)), draws(rows, 1.3, 4, 0.93))
    p = np.exp(logit_v.astype(np.float64) / 1.3) * (np.argsort(np.argsort(-logit_v)) < 4)
    np.testing.assert_allclose(np.bincount(token_n, minlength=6) / rows, p / p.sum(), atol=4 * np.sqrt(0.25 / rows))


@needs_compiler
@pytest.mark.parametrize("vocab", [40, 41])
def test_infinite_and_missing_logits_are_those_of_the_sampler(vocab):
    logit_nv = logits(12, vocab, "normal")
    logit_nv[0, 5] = np.nan
    logit_nv[1, [3, 9]] = np.inf
    logit_nv[2] = -np.inf
    logit_nv[3] = np.nan
    logit_nv[4, [7, 8]] = np.inf, np.nan
    logit_nv[5, 2] = -np.inf
    logit_nv[6, 1:] = -np.inf
    logit_nv[7] = -3.4028235e38
    logit_nv[8] = np.where(np.arange(vocab) % 3, 0.0, -0.0)
    logit_nv[9] = np.where(np.arange(vocab) % 3, 1e-45, -1e-45)
    logit_nv[10, ::2] = 3.4028235e38
    logit_nv[11, ::2] = -3.4028235e38
    for temperature in (0.0, 1.0, 1e-3, 1e-300, 1e-310, 1e38, 1e300, np.inf, np.nan):
        for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.63), (0, np.nan), (0, -1.0), (-5, 2.0)):
            agree(logit_nv, draws(12, temperature, top_k, top_p))


@needs_compiler
def test_equal_logits_stand_in_the_order_of_their_index():
    logit_nv = np.array([[0, 5, 5, 1], [9, 0, 0, 9], [-0.0, 0.0, -0.0, 0.0]], np.float32)
    assert list(agree(logit_nv, draws(3, 0))) == [1, 0, 0]
    assert list(agree(logit_nv, draws(3, 1.0, 1))) == [1, 0, 0]
    halves = np.zeros((1, 4096), np.float32)  # more than are put in order at once; u picks the index
    for position in range(20):
        assert agree(halves, draws(1, position=position))[0] == int(philox_u(1, 0, position) * 4096)


@needs_compiler
@pytest.mark.parametrize("vocab", [1, 2, 8])
def test_a_nucleus_that_ends_on_a_boundary_leaves_the_next_token_out(vocab):
    rows = 40  # probabilities and top_p are sums of powers of two: exact
    for top_p in (0.125, 0.25, 0.5, 0.75, 1 - 2.0**-53):
        token_n = agree(np.zeros((rows, vocab), np.float32), draws(rows, top_p=top_p))
        assert set(token_n) == set(range(math.ceil(vocab * top_p)))


@needs_compiler
@pytest.mark.parametrize("valid", [None, 0, 2, 9])
@pytest.mark.parametrize("vocab", [48, 51])
def test_fewer_rows_and_a_bias(vocab, valid):
    logit_nv, bias_v = logits(5, vocab, "normal"), logits(1, vocab, "ties", 3)[0]
    draw = draws(5, [0, 1, 1, 1, 0], [0, 0, 5, 0, 0], [1, 1, 1, 0.713, 1], given=[-1, -1, -1, -1, 3])
    token_n = agree(logit_nv, draw, bias_v=bias_v, rows=count(valid))
    n = 5 if valid is None else valid
    assert (token_n[n:] == -7).all()
    with_bias = run(sample_twin, logit_nv + bias_v, draw)[0]
    np.testing.assert_array_equal(token_n[:n], with_bias[:n])


@needs_compiler
def test_given_tokens_outside_the_vocabulary_have_no_probability():
    token_n, logprob_n = run(on_cpu, logits(2, 9, "normal"), draws(2, given=[9, 8]))
    assert list(token_n) == [9, 8] and np.isnan(logprob_n[0]) and logprob_n[1] < 0
    agree(logits(2, 9, "normal"), draws(2, given=[9, 8]))


@needs_compiler
def test_a_row_does_not_depend_on_its_company():
    logit_nv, draw = logits(6, 1000, "normal"), draws(6, [0, 1, 1, 0.5, 2, 1], [0, 0, 9, 0, 0, 500], 0.9317)
    token_n, logprob_n = run(on_cpu, logit_nv, draw)
    for n in range(6):
        alone = run(on_cpu, logit_nv[n:n + 1], Draw(*(a[n:n + 1] for a in draw)))
        assert alone[0][0] == token_n[n] and alone[1][0] == logprob_n[n]


@needs_compiler
@pytest.mark.parametrize("kind", ["normal", "few values"])
def test_the_order_of_threads_changes_nothing(monkeypatch, kind):
    logit_nv, draw = logits(3, 2503, kind), draws(3, [0, 1, 1], [0, 0, 200], [1, 1, 0.871])
    same_for_all_seeds(monkeypatch, lambda: run(on_cpu, logit_nv, draw))


def test_blocks_are_whole_warps():
    assert [threads(v) for v in (1, 512, 513, 5000, 8192, 256000)] == [64, 64, 96, 640, 1024, 1024]


def test_no_rows_no_launch():
    run(lambda *a, **o: sample(None, *a, **o), logits(0, 8, "normal"), draws(0))
    run(sample_twin, logits(0, 8, "normal"), draws(0))
