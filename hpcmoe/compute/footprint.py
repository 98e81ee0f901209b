"""What a rank's share of a model takes in memory, from the configuration alone."""

from __future__ import annotations

import math

from hpcmoe.compute.holdings import Share
from hpcmoe.config import ModelConfig
from hpcmoe.model.tensors import dense_shapes, expert_shapes, top_shapes

FP32 = 4  # bytes of norms, biases, and the router on a CPU


def weights_bytes(model: ModelConfig, share: Share, item: int, stored: int, gpu: bool) -> int:
    """Bytes of the weights of a share.

    model: as the share's tensor shard sees it; item: bytes of a number in products; stored: of one in the file, as which
    a CPU keeps the embedding. What a library adds for its own layout, and tables of rotary positions, come on top.
    """
    count = (len(share.layers) * len(share.slots) + share.spares) * _bytes(expert_shapes(model), item, item)
    if not share.leader:
        return count
    count += len(share.layers) * _bytes(dense_shapes(model), item, item if gpu else FP32)
    top = top_shapes(model)
    table = math.prod(top["embed"])
    if share.first:
        count += table * (item if gpu else stored)
    if share.last:
        shared = gpu and model.tied and share.first  # one table for both ends
        count += table * item * (not shared) + _bytes({n: s for n, s in top.items() if n not in ("embed", "head")}, item, item)
    return count


def _bytes(shapes: dict, item: int, router: int) -> int:
    """Of tensors of these shapes: matrices in `item` bytes a number, but for the router's, vectors in fp32."""
    return sum(math.prod(shape) * (FP32 if len(shape) == 1 else router if name == "router" else item) for name, shape in shapes.items())
