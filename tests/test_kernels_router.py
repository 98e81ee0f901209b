"""router.cu against its twin, and the twin against a plain loop in fp64."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmoe.config import RouterConfig
from hpcmoe.errors import UserError
from hpcmoe.kernels.router import histogram_shape, router, router_twin, rows_per_block
from tests.cudabed.check import count, guarded, kernels, needs_compiler, same_for_all_seeds

CONFIGS = {
    "mixtral": {},
    "olmoe": {"renormalise": False},
    "gpt-oss": {"over": "selected"},
    "deepseek": {"score": "sigmoid", "bias": True, "groups": 4, "top_groups": 2, "scale": 2.5},
    "groups": {"groups": 4, "top_groups": 3, "renormalise": False, "scale": 16.0},
    "sigmoid": {"score": "sigmoid", "renormalise": False},
    "phi": {"score": "sparsemixer", "jitter": 0.01},
    "phi-wide": {"score": "sparsemixer", "jitter": 0.4},
}


def config_of(name: str, experts: int, k: int) -> RouterConfig:
    return RouterConfig(experts, k, **CONFIGS[name])


def logits(rows: int, experts: int, seed: int = 0, *, size: float = 4.0, ties: bool = False, odd: float = 0.0):
    """Normal logits; ties: multiples of `size` / 8; odd: the share of them that is infinite or NaN."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, size, (rows, experts))
    if ties:
        # Positive ones: sigmoids of a and -a add up to one for every a, but for the rounding.
        x = np.abs(np.rint(x * 8 / size) * size / 8)
    where = rng.random(x.shape) < odd
    x[where] = rng.choice([np.inf, -np.inf, -np.inf, np.nan], where.sum())
    return x.astype(np.float32)


def bias_of(config: RouterConfig, seed: int = 0):
    return np.random.default_rng(seed + 1).normal(0, 0.3, config.experts).astype(np.float32) if config.bias else None


def run(call, logit_te, config: RouterConfig, rows=None, bias_e=None):
    (most, experts), k = logit_te.shape, config.top_k
    expert_tk, same_expert = guarded(np.full((most, k), -9, np.int32))
    weight_tk, same_weight = guarded(np.full((most, k), -9, np.float32))
    hist_be, same_hist = guarded(np.full(histogram_shape(most, experts), -9, np.int32))
    call(logit_te, expert_tk, weight_tk, hist_be, config=config, bias_e=bias_e, rows=count(rows))
    same_expert(), same_weight(), same_hist()
    return expert_tk, weight_tk, hist_be


def on_cpu(*args, **options):
    router(kernels("fp16"), *args, **options)


def assert_agree(logit_te, config, rows=None, bias_e=None):
    got, want = (run(call, logit_te, config, rows, bias_e) for call in (on_cpu, router_twin))
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=3e-6, atol=1e-37)
    np.testing.assert_array_equal(got[2], want[2])


# ------------------------------------------------------------ a plain loop over one row
def best(values: list, k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def by_loop(logit_e, config: RouterConfig, bias_e) -> tuple[list[int], list[float]]:
    logit = [float(x) for x in logit_e]
    if config.score == "sparsemixer":
        return phi_by_loop(logit, config)
    if config.score == "sigmoid":
        score = [1 / (1 + math.exp(-x)) for x in logit]
    else:
        among = logit if config.over == "all" else [logit[e] for e in best(logit, config.top_k)]
        score = [math.exp(x - max(logit)) / sum(math.exp(y - max(logit)) for y in among) for x in logit]
    choice = [s + (0 if bias_e is None else float(bias_e[e])) for e, s in enumerate(score)]
    size = len(logit) // config.groups
    sums = [sum(sorted(choice[g * size:(g + 1) * size])[-2:]) for g in range(config.groups)]
    kept = best(sums, config.top_groups)
    expert = best([c if e // size in kept else -math.inf for e, c in enumerate(choice)], config.top_k)
    weight = [score[e] for e in expert]
    whole = sum(weight) if config.renormalise else 1.0
    return expert, [w / whole * config.scale for w in weight]


def phi_by_loop(logit: list, config: RouterConfig) -> tuple[list[int], list[float]]:
    expert, weight = [], []
    for _ in range(config.top_k):
        e = best([-math.inf if i in expert else x for i, x in enumerate(logit)], 1)[0]
        near = [x for i, x in enumerate(logit)
                if i not in expert and (logit[e] - x) / max(abs(x), logit[e], 1e-30) <= 2 * config.jitter]
        weight.append(math.exp(logit[e]) / sum(math.exp(x) for x in near))
        expert.append(e)
    return expert, weight


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("experts,k", [(8, 1), (8, 2), (60, 4), (64, 8)])
def test_the_twin_follows_a_plain_loop(name, experts, k):
    config = config_of(name, experts, k)
    logit_te, bias_e = logits(40, experts), bias_of(config)
    expert_tk, weight_tk, hist_be = run(router_twin, logit_te, config, 37, bias_e)
    counts = np.zeros_like(hist_be)
    for t in range(37):
        expert, weight = by_loop(logit_te[t], config, bias_e)
        assert list(expert_tk[t]) == expert
        np.testing.assert_allclose(weight_tk[t], weight, rtol=1e-5)
        for e in expert:
            counts[t // rows_per_block(40, experts), e] += 1
    np.testing.assert_array_equal(hist_be, counts)
    assert (expert_tk[37:] == -9).all() and (weight_tk[37:] == -9).all()


@pytest.mark.parametrize("over", ["all", "selected"])
@pytest.mark.parametrize("call", [router_twin, pytest.param(on_cpu, marks=needs_compiler)])
def test_equal_logits_go_to_the_lowest_index(call, over):
    """-0 and 0 are equal, also where the logits themselves are the scores."""
    logit_te = np.array([[1, 3, 3, -0.0, 3, 0]], np.float32)
    expert_tk, weight_tk, _ = run(call, logit_te, RouterConfig(6, 5, over=over))
    assert list(expert_tk[0]) == [1, 2, 4, 0, 3]
    assert weight_tk[0, 0] == weight_tk[0, 1] == weight_tk[0, 2]


# ------------------------------------------------------------ the kernel and its twin
@needs_compiler
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("experts,k", [(8, 2), (20, 3), (64, 8), (128, 8), (160, 6), (256, 8), (512, 10), (384, 16)])
def test_kernel_and_twin_agree(name, experts, k):
    config = config_of(name, experts, k)
    assert_agree(logits(9, experts, experts), config, bias_e=bias_of(config))


@needs_compiler
@pytest.mark.parametrize("experts", [5, 31, 32, 33, 65, 129, 257, 511])
def test_experts_that_fill_no_warp(experts):
    for k in range(1, 9 if experts > 8 else 6):
        for name in ("mixtral", "sigmoid", "phi"):
            assert_agree(logits(3, experts, k), config_of(name, experts, k))


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(rows=st.integers(0, 40), valid=st.none() | st.integers(0, 42), name=st.sampled_from(sorted(CONFIGS)),
       quarter=st.integers(2, 33), k=st.integers(1, 8), size=st.sampled_from([0.1, 4.0, 100.0, 1e30]),
       ties=st.booleans(), odd=st.sampled_from([0.0, 0.0, 0.03, 0.5, 1.0]), seed=st.integers(0, 999))
def test_kernel_and_twin_agree_on_any_rows(rows, valid, name, quarter, k, size, ties, odd, seed):
    config = config_of(name, 4 * quarter, k)
    if CONFIGS[name].get("groups"):
        ties = True
    assert_agree(logits(rows, 4 * quarter, seed, size=size, ties=ties, odd=odd), config, valid, bias_of(config, seed))


@needs_compiler
@pytest.mark.parametrize("groups,top_groups", [(8, 4), (64, 3), (32, 1), (2, 2), (40, 8)])
def test_groups_of_every_size(groups, top_groups):
    for experts in (groups, 2 * groups, 6 * groups):
        k = min(4, top_groups * experts // groups)
        config = RouterConfig(experts, k, score="sigmoid", groups=groups, top_groups=top_groups)
        assert_agree(logits(5, experts, groups), config)


@needs_compiler
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_extremes(name):
    """All equal, all -inf, one inf, all NaN, fewer numbers than choices, the largest floats."""
    rows = np.zeros((8, 12), np.float32)
    rows[1], rows[2, 5], rows[3], rows[4, 2:] = -np.inf, np.inf, np.nan, -np.inf
    rows[5, ::2], rows[6], rows[7, 4:] = 3e38, -3e38, np.nan
    config = config_of(name, 12, 4)
    assert_agree(rows, config, bias_e=bias_of(config))


@needs_compiler
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 100])
def test_histograms_are_written_whole(rows):
    assert histogram_shape(rows, 5) == (-(-rows // 16), 5)
    for valid in (None, 0, 1, rows // 2):
        assert_agree(logits(rows, 5, rows), RouterConfig(5, 2), valid)


@needs_compiler
def test_a_block_of_more_rows_than_warps():
    rows = 128 * 17 + 5
    assert rows_per_block(rows, 6) == 18 and rows_per_block(rows, 512) == -(-rows // 64)
    assert_agree(logits(rows, 6), RouterConfig(6, 2))


@needs_compiler
def test_no_order_of_threads_matters(monkeypatch):
    for name in ("deepseek", "phi", "gpt-oss"):
        config = config_of(name, 40, 4)
        logit_te, bias_e = logits(35, 40, ties=True), bias_of(config)
        same_for_all_seeds(monkeypatch, lambda: run(on_cpu, logit_te, config, 33, bias_e))


@needs_compiler
def test_one_launch():
    m = kernels("fp16")
    before = m.launches
    run(on_cpu, logits(50, 8), RouterConfig(8, 2))
    assert m.launches == before + 1


@pytest.mark.parametrize("experts,k", [(513, 2), (64, 17)])
def test_more_than_the_kernel_takes_is_an_error(experts, k):
    with pytest.raises(UserError, match="at most 512 experts and 16"):
        router(None, np.zeros((1, experts), np.float32), None, None, None, config=RouterConfig(experts, k))
