"""What is measured, on which model, and what each figure should reach."""

from __future__ import annotations

from typing import NamedTuple

# `hpcmoe weights create` options of the model: 4 layers of 16 experts, 724 M parameters.
MODEL = {"layers": 4, "d": 1024, "f": 3584, "experts": 16, "top-k": 2, "heads": 16, "kv-heads": 4, "vocab": 4096}
TINY = {"layers": 2, "d": 256, "f": 512, "experts": 8, "top-k": 2, "heads": 8, "kv-heads": 2, "vocab": 512}
SEED = 1


class Workload(NamedTuple):
    """sequences of prompt tokens; one repetition times `steps` steps of all of them.

    A prefill step is a new set of prompts from an empty cache to one token each. A decode step is one
    token of every sequence, after the prompts and `warm` such steps.
    """

    name: str
    prefill: bool
    sequences: int
    prompt: int
    steps: int
    warm: int
    goal: dict  # dtype -> wanted ratio to Hugging Face

    @property
    def rows(self) -> int:
        return self.sequences * (self.prompt if self.prefill else 1)

    @property
    def rounds_before(self) -> int:
        """Rounds of the engine before the first timed one: the first prefill, and what warms up."""
        return 1 + self.warm

    def context(self, repetitions: int) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + (1 if self.prefill else self.warm + repetitions * self.steps + 2)


def workloads(prompt: int) -> list[Workload]:
    """The four of the comparison; prompt: tokens before decoding starts."""
    return [Workload("prefill 2048", True, 16, 128, 1, 1, {"fp32": 1.9, "bf16": 1.5}),
            Workload("decode 16", False, 16, prompt, 8, 2, {"fp32": 2.0, "bf16": 1.3}),
            Workload("decode 256", False, 256, prompt, 3, 2, {"fp32": 2.0, "bf16": 1.5}),
            Workload("decode 1024", False, 1024, prompt, 2, 1, {"fp32": 1.8, "bf16": 1.5})]


def tiny_workloads() -> list[Workload]:
    """Small ones, to try the program."""
    return [Workload("prefill 64", True, 4, 16, 1, 1, {}), Workload("decode 16", False, 16, 8, 4, 2, {}),
            Workload("decode 64", False, 64, 8, 2, 1, {})]


def step_flop(model, w: Workload, context: float) -> float:
    """Floating-point operations of one step. context: mean keys that a row looks at; model: ModelConfig."""
    a, r = model.attention, model.router
    wide = a.heads * a.head_dim
    layer = 2 * model.d * (2 * wide + 2 * a.kv_heads * a.head_dim + r.experts) + 6 * r.top_k * model.d * model.expert.f
    return w.rows * model.layers * (layer + 4 * wide * context) + w.sequences * 2.0 * model.d * model.vocab


def step_bytes(model, w: Workload, context: float, experts_hit: float, ranks: int, item: int) -> float:
    """Bytes that one step must read: weights of the experts that got rows, each leader's dense weights, keys and values.

    experts_hit: (layer, expert) pairs with rows; item: bytes of a weight; keys and values are fp32.
    """
    a = model.attention
    dense = model.d * (2 * a.heads + 2 * a.kv_heads) * a.head_dim * model.layers + model.d * model.vocab
    cached = 0 if w.prefill else w.sequences * model.layers * 2 * a.kv_heads * a.head_dim * context * 4
    return item * (experts_hit * 3 * model.d * model.expert.f + ranks * dense) + cached
