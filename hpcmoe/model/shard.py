"""One tensor shard of a model: which heads, hidden columns and token ids it has, and the model as it sees itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hpcmoe.config import AttentionConfig, ModelConfig


@dataclass(frozen=True)
class Shard:
    """Shard number `number` of `count`: parts of a full model's tensors, and `model`, the configuration of what is left.

    q: rows of the query product; kv: row numbers of the key and value products, those of the KV heads that the
    shard's heads look at (several shards may hold copies of one). f: columns of an expert's hidden width.
    vocab: token ids whose embedding and logits it has. Sums over the shards of what each makes of attention
    and experts are the full model's (Megatron-LM, arXiv 1909.08053, section 3). Heads that do not divide are dealt
    as evenly as they go: with more shards than heads some have none.
    """

    number: int
    count: int
    whole_vocab: int
    model: ModelConfig
    q: slice
    kv: np.ndarray
    f: slice
    vocab: slice

    @staticmethod
    def first(total: int, number: int, count: int) -> int:
        """Where shard `number` begins among so many things; that of shard `count` is the end."""
        return number * total // count

    @classmethod
    def of(cls, model: ModelConfig, number: int, count: int) -> "Shard":
        """The experts' f must be a multiple of count."""
        def part(total: int, size: int = 1) -> slice:
            return slice(cls.first(total, number, count) * size, cls.first(total, number + 1, count) * size)

        a, heads, f, vocab = model.attention, part(model.attention.heads), part(model.expert.f), part(model.vocab)
        kv_heads = _kv_heads(a, range(heads.start, heads.stop))
        kv = (np.array(kv_heads, dtype=int)[:, None] * a.head_dim + np.arange(a.head_dim)).reshape(-1)
        local = replace(model, vocab=vocab.stop - vocab.start, expert=replace(model.expert, f=f.stop - f.start),
                        attention=replace(a, heads=heads.stop - heads.start, kv_heads=len(kv_heads)))
        return cls(number, count, model.vocab, local, part(a.heads, a.head_dim), kv, f, vocab)


def _kv_heads(a: AttentionConfig, heads: range) -> list[int]:
    """The KV heads of these heads, so that each serves equally many: where groups are cut unevenly, one for each head."""
    each = [h // (a.heads // a.kv_heads) for h in heads]
    distinct = sorted(set(each))
    return distinct if len({each.count(k) for k in distinct}) <= 1 else each
