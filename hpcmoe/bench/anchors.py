"""Times that others measured on the same kinds of GPU, beside which ours are printed.

Source: the performance database of NVIDIA's AIConfigurator (ai-dynamo/aiconfigurator, commit
095f58a51, Apache-2.0), systems/data/{h100,h200}_sxm: BF16, torch.nn.functional.linear (cuBLAS) for
products; vLLM 0.24.0's fused MoE (Triton) for experts.
"""

from __future__ import annotations

from hpcmoe.cluster.kernels import kind_of

SOURCE = "AIConfigurator, commit 095f58a51, vLLM 0.24.0 data, BF16"

# rows -> (ms of [rows, 5120] x [5120, 16384], ms of [rows, 8192] x [8192, 5120]): an expert's two products
GEMM_MS = {
    "H100": {4: (0.0569742, 0.0323093), 16: (0.0673476, 0.0331182), 64: (0.0722133, 0.0349191),
             128: (0.0712222, 0.0316151), 256: (0.0762142, 0.0366036), 1024: (0.207804, 0.102372)},
    "H200": {4: (0.0415502, 0.0257573), 16: (0.0468249, 0.0256044), 64: (0.0481849, 0.0280951),
             128: (0.0503893, 0.02548), 256: (0.0600907, 0.0383858), 1024: (0.206525, 0.105716)},
}

# rows per expert -> ms of one GPU's share, hidden 5120, width 8192, top-1 of 128 experts over 128 GPUs
# (one expert each), balanced: the kernel also sorts all 128 x rows tokens of the group
FUSED_MOE_MS = {
    "H100": {4: 0.230784, 16: 0.354784, 64: 0.782432, 128: 1.36153},
    "H200": {4: 0.219899, 16: 0.346363, 64: 0.717856, 128: 1.22957},
}


def expert(name: str, rows: int) -> dict[str, float]:
    """The figures for one expert of hidden 5120, width 8192 on the GPU of that name; {} where there are none."""
    kind = kind_of(name)
    found = {}
    if rows in GEMM_MS.get(kind, {}):
        found["public_pair_ms"] = sum(GEMM_MS[kind][rows])
    if rows in FUSED_MOE_MS.get(kind, {}):
        found["public_fused_moe_ms"] = FUSED_MOE_MS[kind][rows]
    return found
