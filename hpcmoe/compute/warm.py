"""Products before the run: cuBLAS loads a kernel when it is first chosen, which took 0.3 s of the first steps on an H200."""

from __future__ import annotations


def warm_up(compute) -> None:
    """Queues each kind of product of this rank at all powers of two of rows, and waits. compute: a GpuCompute with its buffers."""
    gpu, counted = compute.device, compute.device.gemms
    with compute.lanes[0]:
        for x_tk, weight_nk, out_tn in _products(compute):
            most = min(len(x_tk), len(out_tn))
            for rows in sorted({most, *(1 << i for i in range(most.bit_length()))}):
                gpu.gemm(x_tk[:rows], weight_nk, out_tn[:rows])
        gpu.event().record().wait()
    gpu.gemms = counted


def _products(compute):
    """(rows, weights, where their product goes): of one layer's experts and dense blocks, and of the head."""
    layer, held, bench = compute.layers[0], compute.held, compute.experts.bench(0)
    if compute.slots:
        expert = held.experts[layer, compute.slots[0]]
        yield bench.x_id, expert.both, bench.both_if
        yield bench.h_if, expert.down, bench.y_id
    if compute.leader:
        block, buffers = held.blocks[layer], compute.leader.buffers[0]
        yield buffers.normed_td, block.qkv, buffers.qkv_tx
        yield buffers.mixed_tx, block.out, buffers.o_td
        yield buffers.normed_td, block.router, buffers.logit_te
        if held.head is not None:
            yield buffers.head_in, held.head, buffers.logit_nv
