"""Tensor shards: what they hold adds up to the model, and what they make adds up to what one rank makes."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
from hpcmoe.data.create import create
from hpcmoe.data.shards import ShardedFile
from hpcmoe.data.weights import WeightsFile
from hpcmoe.model.shard import Shard
from local import run_job, write_prompts

CONTEXT = 64
MODELS = {
    "plain": (AttentionConfig(8, 4, 8), RouterConfig(5, 2), ExpertConfig(16), {}),
    "biases, head norm": (AttentionConfig(8, 2, 8, bias=True, out_bias=True, qk_norm="head"), RouterConfig(6, 2, score="sigmoid", bias=True),
                          ExpertConfig(8, "gelu"), {"norm": "layer", "head_bias": True}),
    "one KV head, tied": (AttentionConfig(4, 1, 16, out_bias=True, window=9), RouterConfig(4, 1), ExpertConfig(24), {"tied": True})}


def model_of(name: str) -> ModelConfig:
    attention, router, expert, more = MODELS[name]
    return ModelConfig("mixtral", 53, 32, 2, attention, router, expert, CONTEXT, **more)


@pytest.fixture(scope="module", params=MODELS)
def weights(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "model.h5"
    create(str(path), model_of(request.param), dtype="fp32", seed=2)
    return path


@given(kv_heads=st.integers(1, 6), group=st.integers(1, 8), tp=st.integers(1, 9), vocab=st.integers(9, 99))
def test_shards_are_a_partition_of_heads_columns_and_vocabulary(kv_heads, group, tp, vocab):
    heads = kv_heads * group
    model = ModelConfig("mixtral", vocab, 32, 1, AttentionConfig(heads, kv_heads, 4), RouterConfig(4, 1), ExpertConfig(tp * 3), 64)
    shards = [Shard.of(model, j, tp) for j in range(tp)]
    for name, total in (("q", heads * 4), ("f", tp * 3), ("vocab", vocab)):
        parts = [range(total)[getattr(s, name)] for s in shards]
        assert [i for part in parts for i in part] == list(range(total))
    assert max(s.model.attention.heads for s in shards) - min(s.model.attention.heads for s in shards) <= 1
    for s in shards:  # as grouped-query attention pairs them: local head h looks at local KV head h // (heads / kv_heads)
        a = s.model.attention
        assert len(s.kv) == a.kv_heads * 4 and (a.kv_heads == 0 if a.heads == 0 else a.heads % a.kv_heads == 0)
        for h in range(a.heads):
            local = h // (a.heads // a.kv_heads)
            assert s.kv[local * 4:local * 4 + 4].tolist() == [(s.q.start // 4 + h) // group * 4 + c for c in range(4)]


@pytest.mark.parametrize("tp", [2, 4])
def test_an_expert_is_the_sum_of_its_shards(weights, tp):
    """down(act(gate x) * up x) by plain loops over the hidden columns of each shard."""
    with WeightsFile(weights) as file:
        x = np.random.default_rng(0).normal(size=32)
        whole, found = file.expert(1, 3), np.zeros(32)
        for j in range(tp):
            part = ShardedFile(file, Shard.of(file.config, j, tp)).expert(1, 3)
            for f in range(len(part["gate"])):
                found += part["down"][:, f] * np.tanh(part["gate"][f] @ x) * (part["up"][f] @ x)
        np.testing.assert_allclose(found, whole["down"] @ (np.tanh(whole["gate"] @ x) * (whole["up"] @ x)), rtol=1e-5)


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_attention_is_the_sum_of_its_shards(weights, tp):
    """CPU attention over a sequence on each shard, summed, against the whole's."""
    from hpcmoe import linear
    from hpcmoe.compute.holdings import Share, load
    from hpcmoe.model.attention import Segments
    from hpcmoe.model.kvcache import KVCache
    x_td = np.random.default_rng(1).normal(size=(7, 32)).astype(np.float32)
    segments = Segments.of(np.array([0]), np.array([0]), np.array([7]))

    def attend(file, model, shard):
        held = load(file, model, linear.choose("numpy"), Share([0], [], True, False, False, shard), CONTEXT)
        cache = KVCache(np, [0], 1, model.attention.kv_heads, model.attention.head_dim, CONTEXT)
        return held.blocks[0].attention(x_td, segments, cache, 0)

    with WeightsFile(weights) as file:
        shards = [Shard.of(file.config, j, tp) for j in range(tp)]
        total = sum(attend(ShardedFile(file, s), s.model, s) for s in shards)
        np.testing.assert_allclose(total, attend(file, file.config, Shard.of(file.config, 0, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.mpi
@pytest.mark.parametrize("ranks, more", [(2, {"layout.tp": 2}), (4, {"layout.tp": 4, "layout.pp": 1}), (4, {"layout.tp": 2, "layout.pp": 2}),
                                         (8, {"layout.tp": 8})],
                         ids=lambda v: str(v).replace("'", ""))
def test_every_kind_of_model_scores_as_the_plain_reference_does(weights, tmp_path, ranks, more):
    from hpcmoe.model import reference
    prompts = [np.random.default_rng(3).integers(3, 53, n) for n in (2, 5, 13, 21)]
    write_prompts(tmp_path / "requests.jsonl", prompts, max_tokens=1, logprobs=1)
    sets = {"weights.file": weights, "requests.file": tmp_path / "requests.jsonl", "task": "score", "run.prefill_chunk": 4}
    _, rows, report = run_job(ranks, tmp_path, {**sets, **more})
    with WeightsFile(weights) as file:
        for prompt, row in zip(prompts, rows):
            logits = reference.logits(file, prompt, CONTEXT)[:-1]
            wide = logits - logits.max(axis=1, keepdims=True)
            expected = (wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))[range(len(prompt) - 1), prompt[1:]]
            found = [v for v in row["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"] if v is not None]
            np.testing.assert_allclose(found, expected, atol=1e-5)
    assert report["run"]["layout"]["tp"] == more["layout.tp"]
