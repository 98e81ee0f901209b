"""Sampling: the generator's published vectors, the distribution, and independence of the batch."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from hpcmoe.model.sampler import Sampling, log_probability, philox, sample, uniform


@pytest.mark.parametrize("counter, key, words", [  # Random123's kat_vectors for philox4x32, 10 rounds
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1])])
def test_philox_gives_the_published_words(counter, key, words):
    out = philox(np.array(counter, dtype=np.uint64)[:, None], np.array(key, dtype=np.uint64)[:, None])
    assert [int(w) for w in out[:, 0]] == words


def params(n, temperature=1.0, top_k=0, top_p=1.0, seed=0) -> Sampling:
    full = lambda value, dtype: np.full(n, value, dtype=dtype)  # noqa: E731
    return Sampling(full(temperature, float), full(top_k, int), full(top_p, float), full(seed, np.uint64), np.arange(n, dtype=np.uint64))


def test_uniform_numbers_are_uniform_and_distinct():
    n = 20000
    u = uniform(np.zeros(n, np.uint64), np.arange(n) % 100, np.arange(n) // 100)
    assert 0 <= u.min() and u.max() < 1 and len(np.unique(u)) == n
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    assert ((counts - n / 50) ** 2 / (n / 50)).sum() < 86.7  # chi-squared, 49 degrees of freedom, p = 0.001


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.6), (1.3, 4, 0.8)])
def test_frequencies_follow_the_cut_distribution(temperature, top_k, top_p):
    n, logit = 40000, np.array([0.3, 2.0, -1.0, 1.0, 0.0, 1.5], dtype=np.float32)
    p = np.exp(logit.astype(float) / temperature)
    order = np.argsort(-p)
    keep = order[:top_k] if top_k else order
    p = np.array([p[i] if i in keep else 0.0 for i in range(6)])
    p /= p.sum()
    before, kept = 0.0, []
    for i in order:
        if before < top_p and p[i] > 0:
            kept.append(i)
        before += p[i]
    p = np.array([p[i] if i in kept else 0.0 for i in range(6)])
    p /= p.sum()
    tokens = sample(np.tile(logit, (n, 1)), params(n, temperature, top_k, top_p), np.full(n, 7))
    found = np.bincount(tokens, minlength=6) / n
    assert set(np.flatnonzero(found)) <= set(kept)
    np.testing.assert_allclose(found, p, atol=4 * np.sqrt(0.25 / n))


def test_greedy_takes_the_first_of_the_largest():
    logit = np.array([[0, 5, 5, 1], [9, 0, 0, 9]], dtype=np.float32)
    assert sample(logit, params(2, temperature=0.0), np.zeros(2, int)).tolist() == [1, 0]


@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
@settings(deadline=None, max_examples=30)
def test_a_row_is_sampled_the_same_alone_and_in_any_company(seed, n):
    rng = np.random.default_rng(seed)
    logit = rng.normal(size=(n, 50)).astype(np.float32) * 3
    s = Sampling(rng.choice([0.0, 0.7, 1.5], n), rng.choice([0, 5], n), rng.choice([1.0, 0.9], n),
                 rng.integers(0, 2**63, n).astype(np.uint64), rng.permutation(n).astype(np.uint64))
    position = rng.integers(0, 1000, n)
    together = sample(logit, s, position)
    order = rng.permutation(n)
    assert (sample(logit[order], Sampling(*(a[order] for a in s)), position[order]) == together[order]).all()
    for i in range(n):
        assert sample(logit[i:i + 1], Sampling(*(a[i:i + 1] for a in s)), position[i:i + 1])[0] == together[i]


def test_seed_request_and_position_each_change_the_number():
    base = uniform(*(np.array([v], dtype=np.uint64) for v in (5, 6, 7)))
    for changed in ((4, 6, 7), (5, 5, 7), (5, 6, 8), (5 + 2**32, 6, 7), (5, 6 + 2**32, 7)):
        assert uniform(*(np.array([v], dtype=np.uint64) for v in changed)) != base


def test_log_probability_is_that_of_the_plain_softmax():
    logit = np.random.default_rng(1).normal(size=(4, 9)).astype(np.float32) * 5
    wide = logit.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    token = np.array([0, 3, 8, 8])
    np.testing.assert_allclose(log_probability(logit, token), expected[np.arange(4), token], atol=1e-6)
