"""Where each of our tensors comes from in a Hugging Face checkpoint: names and ranges, no bytes.

Checkpoints of one family come in several spellings: `block_sparse_moe` or `mlp`, w1/w3/w2 or
gate/up/down_proj, one tensor per expert or all experts of a layer stacked
(`experts.gate_up_proj` [e, 2f, d], `experts.down_proj` [e, d, f]). What a checkpoint holds decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Mapping

from hpcmoe.config import ModelConfig
from hpcmoe.errors import UserError
from hpcmoe.model.tensors import dense_shapes, expert_shapes, top_shapes

TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "norm_bias": "model.norm.bias",
       "head": "lm_head.weight", "head_bias": "lm_head.bias"}
DENSE = {"attn_norm": "input_layernorm.weight", "attn_norm_bias": "input_layernorm.bias",
         "ffn_norm": "post_attention_layernorm.weight", "ffn_norm_bias": "post_attention_layernorm.bias",
         "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight"}
DENSE |= {name: f"self_attn.{name}_proj.weight" for name in "qkvo"}
DENSE |= {name + "_bias": f"self_attn.{name}_proj.bias" for name in "qkvo"}
BLOCKS = ("mlp", "block_sparse_moe")
ROUTERS = ("gate.weight", "router.weight")
EXPERT = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
# Computed from the configuration, though some checkpoints carry it.
IGNORED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Piece:
    """`count` elements from element `start` of a checkpoint's tensor, row after row."""

    tensor: str
    start: int
    count: int


class _Finder:
    """Looks tensors up by any of their names, and remembers which were used."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], where: str):
        self.shapes, self.where, self.used = shapes, where, set()

    def has(self, name: str) -> bool:
        return name in self.shapes

    def take(self, names: list[str], shape: tuple[int, ...]) -> str:
        for name in names:
            if name in self.shapes:
                if tuple(self.shapes[name]) != shape:
                    raise UserError(f"{self.where}: tensor {name}: shape {list(self.shapes[name])}: "
                                    f"expected {list(shape)} by config.json")
                self.used.add(name)
                return name
        raise UserError(f"{self.where}: tensor {' or '.join(names)} is missing")

    def whole(self, names: list[str], shape: tuple[int, ...]) -> list[Piece]:
        return [Piece(self.take(names, shape), 0, math.prod(shape))]


def sources(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, list[Piece]]:
    """The pieces that make up each tensor and each expert's slab.

    shapes: the checkpoint's tensors; where: it, for errors. Keys: "embed", "layers/0/q",
    "layers/0/experts/3", ... UserError for a tensor that is missing, of another shape, or left over
    (a part of the model that this program would not compute).
    """
    finder = _Finder(shapes, where)
    found = {name: finder.whole([TOP[name]], shape) for name, shape in top_shapes(config).items()}
    dense = dense_shapes(config)
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        for name, shape in dense.items():
            names = [prefix + DENSE[name]] if name in DENSE else \
                [f"{prefix}{block}.{router}" for block in BLOCKS for router in ROUTERS]
            found[f"layers/{layer}/{name}"] = finder.whole(names, shape)
        for expert in range(config.router.experts):
            found[f"layers/{layer}/experts/{expert}"] = _expert(config, finder, prefix, expert)
    ignored = ("lm_head.weight",) if config.tied else ()
    left = [name for name in shapes
            if name not in finder.used and not name.endswith(IGNORED) and name not in ignored]
    if left:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise UserError(f"{where}: tensor {left[0]}{more} does not belong to family {config.family} "
                        "with this config.json: not supported")
    return found


def _expert(config: ModelConfig, finder: _Finder, prefix: str, expert: int) -> list[Piece]:
    """gate, up, down of one expert, from its own tensors or as slices of stacked ones."""
    e, f, d = config.router.experts, config.expert.f, config.d
    for block in BLOCKS:
        stacked = f"{prefix}{block}.experts."
        if finder.has(stacked + "gate_up_proj"):
            both = finder.take([stacked + "gate_up_proj"], (e, 2 * f, d))
            down = finder.take([stacked + "down_proj"], (e, d, f))
            return [Piece(both, expert * 2 * f * d, 2 * f * d), Piece(down, expert * d * f, d * f)]
    pieces = []
    for name, shape in expert_shapes(config).items():
        names = [f"{prefix}{block}.experts.{expert}.{word}.weight" for block in BLOCKS for word in EXPERT[name]]
        pieces += finder.whole(names, shape)
    return pieces
