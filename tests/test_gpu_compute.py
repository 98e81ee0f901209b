"""Parts of the GPU path by themselves, on the CuPy look-alike: products, the workspace of attention, wanted rows, host memory."""

import gc
from types import SimpleNamespace

import numpy as np
import pytest

from cudabed.lookalike_fixtures import cp, needs_lookalike  # noqa: F401
from hpcmoe.compute.graphs import Graphs
from hpcmoe.compute.step import NONE, SAMPLED, SCORED, Batch, Work
from hpcmoe.model.attention import Segments
from hpcmoe.model.dtypes import from_fp32, to_fp32

pytestmark = needs_lookalike


@pytest.fixture(scope="module")
def gpu(cp):  # noqa: F811
    from hpcmoe import device
    device.cupy_status.cache_clear()
    yield device.Gpu(0)
    device.cupy_status.cache_clear()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_products_are_captured_and_replayed(gpu, dtype):
    rng = np.random.default_rng(0)
    x, weight = (from_fp32(rng.normal(size=shape).astype(np.float32), dtype) for shape in ((5, 24), (7, 24)))
    lane = gpu.lane(products=True)
    device_x, device_w, out = gpu.upload(x), gpu.upload(weight), gpu.empty((5, 7), np.float32)
    gpu.settle()
    with lane:
        graph = lane.capture(lambda: gpu.gemm(device_x, device_w, out))
        gpu.copy(out, gpu.upload(np.zeros((5, 7), np.float32)))
        graph.launch(lane.stream)
        gpu.event().record().wait()
    expected = to_fp32(x).astype(np.float64) @ to_fp32(weight).astype(np.float64).T
    np.testing.assert_allclose(out.get(), expected, rtol=1e-5, atol=1e-5)


def test_cupys_own_products_are_refused_in_a_capture(gpu, cp):  # noqa: F811
    lane = gpu.lane(products=True)
    one = np.ones(1, np.float32).ctypes.data
    with lane, pytest.raises(NotImplementedError):
        lane.capture(lambda: cp.cuda.cublas.gemmEx(lane.handle, 1, 0, 1, 1, 1, one, 0, 2, 1, 0, 2, 1, one, 0, 2, 1, 68, -1))


def test_only_lanes_with_products_have_a_workspace(gpu):
    assert "handle" not in vars(gpu.lane()) and "handle" in vars(gpu.lane(products=True))


def test_failed_work_is_no_wait_without_end(gpu, cp, monkeypatch):  # noqa: F811
    event = gpu.event().record()
    monkeypatch.setattr(cp.cuda.runtime, "eventQuery", lambda pointer: 700)
    with pytest.raises(cp.cuda.runtime.CUDARuntimeError):
        event.done


@pytest.mark.parametrize("most, kv_heads, sms", [(1024, 8, 132), (128, 4, 132), (56, 8, 132), (16, 2, 24), (300, 1, 78)])
def test_no_step_needs_more_workspace_than_there_is(most, kv_heads, sms):
    from hpcmoe.compute.gpu_leader import Leader, workspace_most
    from hpcmoe.kernels.attention import workspace_floats
    longest, asked = 4096, []
    model = SimpleNamespace(attention=SimpleNamespace(heads=2 * kv_heads, kv_heads=kv_heads, head_dim=128))
    kernels, graphs = SimpleNamespace(sms=sms), Graphs(None, True)
    there = workspace_most(kernels, model, most, longest)
    step = SimpleNamespace(tiles=0, longest=longest)
    leader = SimpleNamespace(graphs=graphs, sizes=SimpleNamespace(rows=most), model=model, kernels=kernels, gpu=SimpleNamespace(current=None),
                             _of=lambda m: (step, None), _longest=lambda: longest,
                             _attend=lambda m, layer, rows, exact, parts: asked.append((step.decode if exact and step.tiles else rows, parts)))
    for step.rows in range(1, most + 1):
        for step.tiles, step.decode in ((0, step.rows), (1, step.rows // 2)):
            graphs._graphs.clear()
            Leader.attend(leader, 0, 0)
    assert len(asked) == 2 * most and there > 0
    assert max(workspace_floats(rows, 2 * kv_heads, 128, parts) for rows, parts in asked) <= there


def test_wanted_rows(gpu):
    from hpcmoe.compute.gpu_step import Wanted
    from hpcmoe.compute.step import Choices
    rng = np.random.default_rng(1)
    works = [Work(10 + i, rng.integers(0, 50, n), 4, 0.5 * i, i, 0.9, i, (), True) for i, n in enumerate((6, 9, 1, 4))]
    #                                     all of a text | its end | a chunk of it | only row | nothing wanted
    request_q, start_q, count_q = np.array([0, 1, 1, 2, 3]), np.array([0, 5, 1, 0, 0]), np.array([6, 4, 3, 1, 2])
    emit_q = np.array([SCORED, SCORED, SCORED, SCORED, NONE])
    for emit_q in (emit_q, np.array([SAMPLED, NONE, SCORED, SAMPLED, SAMPLED])):
        wanted = Wanted(gpu, 16, Choices.of(works, 14))
        none = np.zeros(5, np.int64)
        given = [[*works[r].tokens[first + 1:], -1][:n] if emit == SCORED else [-1] * n
                 for r, first, n, emit in zip(request_q, start_q, count_q, emit_q)]
        wanted.set(Batch(True, 0, Segments.of(none, start_q, count_q), emit_q, 10 + request_q, none, none[:0], np.concatenate(given)))
        expected, row = [], 0
        for q in range(5):  # one row after the other
            for position in range(start_q[q], start_q[q] + count_q[q]):
                tokens, last = works[request_q[q]].tokens, position + 1 == start_q[q] + count_q[q]
                if emit_q[q] == SCORED and position + 1 < len(tokens):
                    expected.append((row, request_q[q], position + 1, tokens[position + 1]))
                if emit_q[q] == SAMPLED and last:
                    expected.append((row, request_q[q], position + 1, -1))
                row += 1
        gpu.runtime.deviceSynchronize()
        n = wanted.count
        found = zip(wanted.row.get()[:n], wanted.columns[4].get()[:n] - 10, wanted.columns[5].get()[:n], wanted.columns[6].get()[:n])
        assert [tuple(map(int, x)) for x in found] == [tuple(map(int, x)) for x in expected]


def test_host_memory_is_kept_while_copies_out_of_it_are_queued(gpu):
    from hpcmoe.parallel.exchange import Channel
    channel, target = Channel(None, gpu, gpu.lane()), gpu.empty(100, np.uint8)
    with channel.lane:
        channel.host("recv 0", 100)[:] = 7
        gpu.copy(target, channel.host("recv 0", 100))
        channel.host("recv 0", 100_000)[:] = 8
        gc.collect()  # what nobody holds is gone
        gpu.event().record().wait()
    assert (target.get() == 7).all()


@pytest.mark.parametrize("experts, top_k, fits", [(512, 16, True), (513, 8, False), (64, 17, False)])
def test_a_router_that_the_kernels_do_not_have_is_refused_before_the_run(experts, top_k, fits):
    from hpcmoe.compute.gpu import check_model
    from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
    from hpcmoe.errors import UserError
    model = ModelConfig("mixtral", 97, 40, 2, AttentionConfig(4, 2, 16), RouterConfig(experts, top_k), ExpertConfig(24), 128)
    if fits:
        check_model(model)
    else:
        with pytest.raises(UserError, match=f"{experts} experts, {top_k} per token"):
            check_model(model)
