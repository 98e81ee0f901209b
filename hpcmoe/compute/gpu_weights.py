"""A rank's share of the model in a GPU's memory, in the 16-bit type of the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpcmoe.compute.footprint import weights_bytes
from hpcmoe.compute.holdings import Share
from hpcmoe.config import ModelConfig
from hpcmoe.device import Gpu
from hpcmoe.errors import UserError
from hpcmoe.model.dense import Rope
from hpcmoe.model.dtypes import from_fp32, name_of, to_fp32


@dataclass
class GpuBlock:
    """The dense part of one layer: 16-bit weights [out, in]; norms and biases fp32. q_norm, k_norm, biases: None where there are none."""

    attn_norm: Any
    attn_norm_bias: Any
    qkv: Any
    qkv_bias: Any
    q_norm: Any
    k_norm: Any
    out: Any
    out_bias: Any
    ffn_norm: Any
    ffn_norm_bias: Any
    router: Any
    router_bias: Any


class GpuExpert:
    """both: gate and below it up, [2 f, d]; down [d, f]; in the 16-bit type of the run."""

    def __init__(self, both, down):
        self.both, self.down = both, down

    def weights(self) -> list:
        """As bytes: written over, they make another expert of the same shape."""
        return [part.reshape(-1).view(np.uint8) for part in (self.both, self.down)]

    def layout(self) -> str:
        """The same on two ranks where weights lie in memory in the same way."""
        return f"{self.both.dtype} {self.both.shape} {self.down.shape}"


@dataclass
class GpuHoldings:
    """blocks by layer (leaders); experts by (layer, slot); spares: memory for experts that come from other ranks.

    cos, sin fp32 [position, pair]; embed on leaders of the first stage; norm, head (and their biases) on
    those of the last.
    """

    blocks: dict[int, GpuBlock] = field(default_factory=dict)
    experts: dict[tuple[int, int], GpuExpert] = field(default_factory=dict)
    spares: list[GpuExpert] = field(default_factory=list)
    cos: Any = None
    sin: Any = None
    embed: Any = None
    norm: Any = None
    norm_bias: Any = None
    head: Any = None
    head_bias: Any = None
    nbytes: int = 0


class Loader:
    """Reads a rank's share into a GPU's memory. dtype: "fp16" or "bf16"."""

    def __init__(self, gpu: Gpu, file, model: ModelConfig, dtype: str):
        self.gpu, self.file, self.model, self.dtype = gpu, file, model, dtype
        self.t_dtype = np.float16 if dtype == "fp16" else np.uint16
        self.nbytes = 0

    def load(self, share: Share, context: int) -> GpuHoldings:
        """Raises UserError as the file does, where the share does not fit, or fp16 cannot hold a weight."""
        self._check_room(share)
        held, model = GpuHoldings(), self.model
        for layer in share.layers:
            for slot in share.slots:
                e = share.expert(layer, slot)
                t = self.file.expert(layer, e)
                where = f"layer {layer}, expert {e}"
                held.experts[layer, slot] = GpuExpert(self._weight(where, t["gate"], t["up"]), self._weight(where, t["down"]))
        held.spares = [self._spare() for _ in range(share.spares)]
        if share.leader:
            rope = Rope(model.attention.rope, model.attention.head_dim, context)
            held.cos, held.sin = self._up(rope.cos), self._up(rope.sin)
            for layer in share.layers:
                held.blocks[layer] = self._block(self.file.dense(layer), f"layer {layer}")
            if share.first or (share.last and model.tied):
                embed = self._weight("embed", self.file.top("embed"))
                held.embed = embed if share.first else None
                held.head = embed if share.last and model.tied else None
            if share.last:
                self._load_end(held)
        held.nbytes = self.nbytes
        return held

    def _load_end(self, held: GpuHoldings) -> None:
        model, top = self.model, self.file.top
        if not model.tied:
            held.head = self._weight("head", top("head"))
        held.norm = self._fp32(top("norm"))
        held.norm_bias = self._fp32(top("norm_bias")) if model.norm == "layer" else None
        held.head_bias = self._fp32(top("head_bias")) if model.head_bias else None

    def _block(self, t: dict, where: str) -> GpuBlock:
        def maybe(name: str):
            return self._fp32(t[name]) if name in t else None

        bias = self._up(np.concatenate([to_fp32(t[n]) for n in ("q_bias", "k_bias", "v_bias")])) if "q_bias" in t else None
        return GpuBlock(maybe("attn_norm"), maybe("attn_norm_bias"), self._weight(where, t["q"], t["k"], t["v"]), bias,
                        maybe("q_norm"), maybe("k_norm"), self._weight(where, t["o"]), maybe("o_bias"), maybe("ffn_norm"),
                        maybe("ffn_norm_bias"), self._weight(where, t["router"]), maybe("router_bias"))

    def _check_room(self, share: Share) -> None:
        need = weights_bytes(self.model, share, 2, 2, True)
        free, total = self.gpu.memory()
        if need > free:
            times = -(-need // max(free, 1))
            raise UserError(f"{self.file.path}: this rank's {len(share.layers)} layers x {len(share.slots)} experts need "
                            f"{need / 2**30:.3g} GiB in {self.dtype}, {free / 2**30:.3g} of {total / 2**30:.3g} GiB are free on "
                            f"{self.gpu.name}: {times} times as many ranks (layout.pp or layout.ep) would fit")

    # ------------------------------------------------------------ into the GPU
    def _spare(self) -> GpuExpert:
        d, f = self.model.d, self.model.expert.f
        made = GpuExpert(self.gpu.empty((2 * f, d), self.t_dtype), self.gpu.empty((d, f), self.t_dtype))
        self.nbytes += made.both.nbytes + made.down.nbytes
        return made

    def _weight(self, where: str, *parts: np.ndarray):
        """Parts [n, k] below each other, in the run's 16-bit type."""
        target = self.gpu.empty((sum(len(p) for p in parts), parts[0].shape[1]), self.t_dtype)
        first = 0
        for part in parts:
            stored = part if name_of(part.dtype) == self.dtype else self._convert(where, part)
            target[first:first + len(part)].set(np.ascontiguousarray(stored))
            first += len(part)
        self.nbytes += target.nbytes
        return target

    def _convert(self, where: str, part: np.ndarray) -> np.ndarray:
        stored = from_fp32(to_fp32(part), self.dtype)
        if self.dtype == "fp16" and not np.isfinite(stored).all():
            raise UserError(f"{self.file.path}: {where} has weights beyond 65504, the largest number of fp16: expected "
                            "weights.dtype = bf16")
        return stored

    def _fp32(self, array: np.ndarray):
        return self._up(np.array(to_fp32(array)))

    def _up(self, array: np.ndarray):
        self.nbytes += array.nbytes
        return self.gpu.upload(array)
