"""A weights file as one tensor shard sees it."""

from __future__ import annotations

import numpy as np

from hpcmoe.model.shard import Shard

ROWS = {"q": "q", "q_bias": "q", "k": "kv", "k_bias": "kv", "v": "kv", "v_bias": "kv", "gate": "f", "gate_bias": "f", "up": "f",
        "up_bias": "f", "embed": "vocab", "head": "vocab"}
COLUMNS = {"o": "q", "down": "f"}


class ShardedFile:
    """The tensors of a WeightsFile cut to a shard, by the same methods; what is not cut is handed out whole: norms,
    router, and biases of what is summed over the shards or drawn from.

    A tensor's checksum covers all of it, so with `verify` every shard reads the whole tensors of its experts.
    """

    def __init__(self, file, shard: Shard):
        self.file, self.shard, self.path = file, shard, file.path

    def top(self, name: str) -> np.ndarray:
        return self._cut(name, self.file.top(name))

    def dense(self, layer: int) -> dict[str, np.ndarray]:
        return {name: self._cut(name, tensor) for name, tensor in self.file.dense(layer).items()}

    def expert(self, layer: int, e: int) -> dict[str, np.ndarray]:
        return {name: self._cut(name, tensor) for name, tensor in self.file.expert(layer, e).items()}

    def _cut(self, name: str, tensor: np.ndarray) -> np.ndarray:
        if name in ROWS:
            return tensor[getattr(self.shard, ROWS[name])]
        if name in COLUMNS:
            return np.ascontiguousarray(tensor[:, getattr(self.shard, COLUMNS[name])])
        return tensor
