"""permute.cu against its twin and plain loops; e4m3 against the definition of the format."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcmoe.kernels.e4m3 import decode, encode, fp8_pack, fp8_unpack, fp8_width
from hpcmoe.kernels.loader import Kernels
from hpcmoe.kernels.permute import permute, permute_twin, unpack_fp8, unpack_fp8_twin
from hpcmoe.kernels.router import histogram_shape, rows_per_block
from hpcmoe.model.copies import Copies
from hpcmoe.model.dtypes import to_fp32
from tests.cudabed import cudacpu
from tests.cudabed.check import DTYPES, assert_close, count, guarded, kernels, needs_compiler, same_for_all_seeds, stored

# Value of every code: (-1)^sign 2^(exponent - 7) 1.mantissa, 2^-6 0.mantissa where the exponent is 0, two NaN.
TABLE = [(-1.0) ** (c >> 7) * (2.0 ** ((c >> 3 & 15) - 7) * (1 + (c & 7) / 8) if c >> 3 & 15 else 2.0 ** -6 * (c & 7) / 8)
         for c in range(256)]
TABLE[0x7F] = TABLE[0xFF] = float("nan")
NUMBERS = [c for c in range(256) if c & 0x7F != 0x7F]
# Every positive value and the middle between it and the next: (value, the code it becomes, the even one of two).
MIDDLES = [((TABLE[c] + TABLE[c + 1]) / 2, c + c % 2) for c in range(0x7E)]


def choices(rows: int, k: int, experts: int, seed: int = 0, skew: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if skew:
        return np.minimum(rng.geometric(0.7, (rows, k)) - 1, experts - 1).astype(np.int32)
    return rng.integers(0, experts, (rows, k)).astype(np.int32)


def values(rows: int, d: int, dtype: str, seed: int = 0) -> np.ndarray:
    return stored(np.random.default_rng(seed).normal(0, 3, (rows, d)), dtype)


def histogram(expert_tk, experts: int, rows: int | None) -> np.ndarray:
    hist_be = np.zeros(histogram_shape(len(expert_tk), experts), np.int32)
    for t, expert_k in enumerate(expert_tk[:rows]):
        for e in expert_k:
            hist_be[t // rows_per_block(len(expert_tk), experts), e] += 1
    return hist_be


def some_turns(experts: int, more: int, leader: int, seed: int) -> np.ndarray:
    """Copies.turns of a layer with so many spare slots, experts in any order."""
    rng = np.random.default_rng(seed)
    expert_s = rng.permutation(np.append(np.arange(experts), rng.integers(0, min(experts, 4), more)))
    return Copies(expert_s, experts).turns(leader)


def run(call, x_td, expert_tk, experts: int, rows=None, fp8=False, turns=None):
    d, pairs = x_td.shape[1], expert_tk.size
    slots = experts if turns is None else (len(turns) - experts - 1) // 3
    slot_tk, same_slot = guarded(np.full(expert_tk.shape, -9, np.int32))
    n_send_e, same_n = guarded(np.full(slots, -9, np.int32))
    x_sd, same_x = guarded(np.full((pairs, fp8_width(d)), 9, np.uint8) if fp8 else np.full((pairs, d), 9, x_td.dtype))
    call(x_td, expert_tk, histogram(expert_tk, experts, rows), slot_tk, x_sd, n_send_e, fp8=fp8, rows=count(rows), turns=turns)
    same_slot(), same_n(), same_x()
    return slot_tk, n_send_e, x_sd


def on_cpu(dtype: str, sms: int = 4):
    m = kernels(dtype) if sms == 4 else Kernels(dtype, cudacpu.Module, sms=sms)
    return lambda *args, **options: permute(m, *args, **options)


def assert_agree(x_td, expert_tk, experts: int, dtype: str, sms: int = 4, **options):
    got, want = (run(call, x_td, expert_tk, experts, **options) for call in (on_cpu(dtype, sms), permute_twin))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


# ------------------------------------------------------------ the format
def test_codes_have_the_values_of_the_definition():
    np.testing.assert_array_equal(decode(np.arange(256)), TABLE)
    assert np.nanmax(TABLE) == 448 and TABLE[1] == 2.0 ** -9 and np.signbit(decode(0x80))


def test_every_value_has_its_code():
    np.testing.assert_array_equal(encode([TABLE[c] for c in NUMBERS]), NUMBERS)
    assert encode([np.nan, -np.nan]).tolist() == [0x7F, 0x7F]
    assert encode([448.1, 464, 1e9, np.inf, -np.inf, -500]).tolist() == [0x7E] * 4 + [0xFE] * 2


def test_values_between_go_to_the_nearest_and_the_middle_to_the_even():
    middle, even = np.array([m for m, _ in MIDDLES], np.float32), np.array([e for _, e in MIDDLES])
    low = np.arange(len(middle))
    np.testing.assert_array_equal(encode(middle), even)
    np.testing.assert_array_equal(encode(np.nextafter(middle, np.float32(0))), low)
    np.testing.assert_array_equal(encode(np.nextafter(middle, np.float32(1e9))), low + 1)
    np.testing.assert_array_equal(encode(-middle), even | 0x80)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=20))
def test_the_nearest_of_all_values(x):
    table = np.array([TABLE[c] for c in NUMBERS])
    for value, code in zip(x, encode(x)):
        assert abs(TABLE[code] - value) == np.abs(table - value).min()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_row_is_within_a_sixteenth(dtype):
    x_id = values(6, 45, dtype)
    x_id[4] = 0
    x_iw = np.full((6, fp8_width(45)), 9, np.uint8)
    fp8_pack(x_id, x_iw)
    x = to_fp32(x_id)
    np.testing.assert_array_equal(x_iw[:, -16:-12].copy().view(np.float32)[:, 0],
                                  [np.abs(row).max() / np.float32(448) if row.any() else 1 for row in x])
    assert not x_iw[:, 45:-16].any() and not x_iw[:, -12:].any()
    # Half of a mantissa's last place, or half of the least of all values, 2^-9 of the scale.
    allowed = np.maximum(np.abs(x) / 16, np.abs(x).max(axis=1, keepdims=True) / 448 * 2.0 ** -10) * 1.0001
    assert (np.abs(fp8_unpack(x_iw, 45) - x) <= allowed).all()


# ------------------------------------------------------------ permute
def test_the_twin_sorts_stably():
    x_td, expert_tk = values(30, 5, "fp16"), choices(30, 3, 6, skew=True)
    slot_tk, n_send_e, x_sd = run(permute_twin, x_td, expert_tk, 6, rows=28)
    pairs = sorted((expert_tk[t, k], t, k) for t in range(28) for k in range(3))
    for slot, (_, t, k) in enumerate(pairs):
        assert slot_tk[t, k] == slot
        np.testing.assert_array_equal(x_sd[slot], x_td[t])
    assert n_send_e.tolist() == [sum(e == p[0] for p in pairs) for e in range(6)]
    assert (slot_tk[28:] == -9).all() and (x_sd[len(pairs):] == 9).all()


@pytest.mark.parametrize("leader", [0, 3])
def test_the_twin_deals_rows_to_copies_by_turns(leader):
    x_td, expert_tk, expert_s = values(30, 5, "fp16"), choices(30, 3, 4, skew=True), [1, 0, 0, 2, 3, 0, 1]
    slot_tk, n_send_e, x_sd = run(permute_twin, x_td, expert_tk, 4, rows=28, turns=Copies(expert_s, 4).turns(leader))
    seen, pairs = [0] * 4, []
    for t in range(28):
        for k in range(3):
            e = expert_tk[t, k]
            slots = [s for s, held in enumerate(expert_s) if held == e]
            pairs.append((slots[(seen[e] + leader) % len(slots)], t, k))
            seen[e] += 1
    for at, (_, t, k) in enumerate(sorted(pairs)):
        assert slot_tk[t, k] == at
        np.testing.assert_array_equal(x_sd[at], x_td[t])
    assert n_send_e.tolist() == [sum(s == p[0] for p in pairs) for s in range(7)]


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(rows=st.integers(0, 70), k=st.integers(1, 8), d=st.integers(1, 40) | st.sampled_from([64, 128]),
       experts=st.integers(5, 40) | st.sampled_from([255, 256, 512]), dtype=st.sampled_from(DTYPES),
       valid=st.none() | st.integers(0, 72), fp8=st.booleans(), skew=st.booleans(),
       sms=st.sampled_from([1, 3, 4, 9]), seed=st.integers(0, 99), more=st.integers(-1, 40), leader=st.integers(0, 5))
def test_kernel_and_twin_agree_on_any_rows(rows, k, d, experts, dtype, valid, fp8, skew, sms, seed, more, leader):
    turns = None if more < 0 or experts + more > 512 else some_turns(experts, more, leader, seed)
    assert_agree(values(rows, d, dtype, seed), choices(rows, k, experts, seed, skew), experts, dtype, sms,
                 rows=valid, fp8=fp8, turns=turns)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("d", [1, 8, 24, 1000, 1023, 1024, 1032, 2050, 4104])
def test_rows_of_every_width(dtype, fp8, d):
    """Wider than a warp copies at once, so that blocks share rows; with and without 16-byte accesses."""
    assert_agree(values(7, d, dtype), choices(7, 2, 8), 8, dtype, sms=5, fp8=fp8)


@needs_compiler
@pytest.mark.parametrize("rows,experts,k", [(2100, 6, 2), (700, 511, 8), (3000, 512, 1)])
def test_many_rows_and_experts(rows, experts, k):
    """More rows than a block's 256; several rounds of ranking; histograms of more than 16 rows."""
    assert_agree(values(rows, 3, "fp16"), choices(rows, k, experts), experts, "fp16", rows=rows - 9)


@needs_compiler
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rows,d", [(100, 16), (40, 2056), (100, 13)])
def test_warps_that_take_several_rows(fp8, rows, d):
    assert_agree(values(rows, d, "fp16"), choices(rows, 2, 8), 8, "fp16", sms=1, fp8=fp8)


@needs_compiler
@pytest.mark.parametrize("fp8", [False, True])
def test_one_expert_gets_all(fp8):
    assert_agree(values(40, 16, "bf16"), np.full((40, 1), 3, np.int32), 5, "bf16", fp8=fp8)


@needs_compiler
@pytest.mark.parametrize("rows,valid", [(0, None), (20, 0)])
def test_without_rows_nothing_is_sent(rows, valid):
    slot_tk, n_send_e, x_sd = run(on_cpu("fp16"), values(rows, 8, "fp16"), choices(rows, 2, 6), 6, rows=valid)
    assert not n_send_e.any() and (slot_tk == -9).all() and (x_sd == 9).all()


@needs_compiler
def test_no_order_of_threads_matters(monkeypatch):
    x_td, expert_tk = values(50, 40, "fp16"), choices(50, 4, 9, skew=True)
    for fp8, turns in ((False, None), (True, None), (False, some_turns(9, 40, 1, 0))):
        same_for_all_seeds(monkeypatch, lambda: run(on_cpu("fp16", 3), x_td, expert_tk, 9, rows=47, fp8=fp8, turns=turns))


@needs_compiler
def test_one_launch():
    m = kernels("fp16")
    before = m.launches
    run(on_cpu("fp16"), values(50, 8, "fp16"), choices(50, 2, 6), 6)
    assert m.launches == before + 1


def test_slots_without_their_turns_are_an_error():
    for turns in (None, np.zeros(9, np.int32)):
        with pytest.raises(ValueError, match="7 slots for 6 experts"):
            permute(None, np.zeros((40, 8)), np.zeros((40, 2)), np.zeros((3, 6)), None, None, np.zeros(7), turns=turns)


def test_histograms_of_other_rows_are_an_error():
    with pytest.raises(ValueError, match="hist_be"):
        permute(None, np.zeros((40, 8)), np.zeros((40, 2)), np.zeros((1, 6)), None, None, np.zeros(6))


# ------------------------------------------------------------ fp8 on the device
@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_rounds_as_the_definition_says(dtype):
    """Rows whose largest value is 448 have scale 1: their codes are known without the twin."""
    middle, even = np.array([m for m, _ in MIDDLES]), [e for _, e in MIDDLES]
    x = np.array([[TABLE[c] for c in NUMBERS], [*middle, 448.0, *-middle, -448.0]])
    x_sw = run(on_cpu(dtype), stored(x, dtype), np.array([[0], [1]], np.int32), 5, fp8=True)[2]
    np.testing.assert_array_equal(x_sw[0, :254], NUMBERS)
    np.testing.assert_array_equal(x_sw[1, :254], [*even, 0x7E, *(e | 0x80 for e in even), 0xFE])
    out_id = np.empty((2, 254), x.astype(np.float16).dtype if dtype == "fp16" else np.uint16)
    unpack_fp8(kernels(dtype), x_sw, out_id)
    np.testing.assert_array_equal(to_fp32(out_id)[0], x[0])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [13, 24, 32])
def test_extremes_are_packed_alike(dtype, d):
    x = np.random.default_rng(0).normal(size=(8, d))
    x[0], x[1, 3], x[2, 5], x[3, 2:4], x[4], x[5] = 0, np.inf, np.nan, (-np.inf, np.nan), 6e-8, 65504
    x[6], x[7] = np.nan, x[7] * 1e-40  # as bf16: scales below the least normal number
    assert_agree(stored(x, dtype), choices(8, 2, 5), 5, dtype, fp8=True)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 30), d=st.integers(1, 70) | st.sampled_from([8, 16, 24, 40]), valid=st.none() | st.integers(0, 32), dtype=st.sampled_from(DTYPES),
       seed=st.integers(0, 99))
def test_unpacked_by_kernel_and_twin(rows, d, valid, dtype, seed):
    """All codes, NaN too, at scales that are no powers of two."""
    x_iw = np.random.default_rng(seed).integers(0, 256, (rows, fp8_width(d))).astype(np.uint8)
    x_iw[:, -16:-12] = np.random.default_rng(seed).uniform(0.001, 30, (rows, 1)).astype(np.float32).view(np.uint8)
    outs = []
    for call in (lambda *a, **o: unpack_fp8(kernels(dtype), *a, **o), unpack_fp8_twin):
        out_id, same = guarded(np.full((rows, d), 9, stored([0], dtype).dtype))
        call(x_iw, out_id, rows=count(valid))
        same()
        outs.append(out_id)
    assert_close(outs[0], outs[1], dtype, ulps=0)
    if valid is not None:
        assert (outs[0][valid:] == 9).all()
