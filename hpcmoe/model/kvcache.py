"""Keys and values of the sequences that a leader holds, for its stage's layers."""

from __future__ import annotations

import numpy as np


def bytes_per_sequence(layers: int, kv_heads: int, head_dim: int, context: int) -> int:
    """Bytes of fp32 keys and values of one sequence of `context` tokens in `layers` layers."""
    return 2 * layers * kv_heads * context * head_dim * 4


class KVCache:
    """k and v, each [layer][slot, kv head, position, head_dim] fp32; a slot holds one sequence.

    Pages of the arrays that no token has reached yet take no memory (they are zero-mapped).
    """

    def __init__(self, xp, layers: list[int], slots: int, kv_heads: int, head_dim: int, context: int):
        shape = (slots, kv_heads, context, head_dim)
        self.k = {layer: xp.zeros(shape, dtype=np.float32) for layer in layers}
        self.v = {layer: xp.zeros(shape, dtype=np.float32) for layer in layers}
        self.slots, self.context = slots, context

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.k.values()) + sum(a.nbytes for a in self.v.values())

    def append(self, layer: int, slot_t, position_t, k_thc, v_thc) -> None:
        """Stores rows k, v [t, kv head, head_dim] at (slot_t, position_t)."""
        self.k[layer][slot_t, :, position_t] = k_thc
        self.v[layer][slot_t, :, position_t] = v_thc
