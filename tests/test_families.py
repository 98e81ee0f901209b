"""Hugging Face configurations -> ModelConfig, against the published sizes of real models."""

import dataclasses
import json

import pytest
from hypothesis import given, settings, strategies as st

from hpcmoe.config import ModelConfig, from_dict, to_dict
from hpcmoe.errors import UserError
from hpcmoe.model.families import FAMILIES, model_config, random_config
from hpcmoe.model.sources import sources
from hpcmoe.model.tensors import expert_shapes, parameters

# The shape-giving fields of the models' published config.json, and their published parameter counts.
PUBLISHED = {
    "Mixtral-8x7B-v0.1": (46_702_792_704, {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 32000,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "hidden_act": "silu",
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "router_aux_loss_coef": 0.02, "torch_dtype": "bfloat16"}),
    "OLMoE-1B-7B-0924": (6_919_161_856, {
        "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "vocab_size": 50304,
        "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "hidden_act": "silu",
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "norm_topk_prob": False, "clip_qkv": None, "max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False,
        "eos_token_id": 50279, "pad_token_id": 1}),
    "Qwen3-30B-A3B": (30_532_122_624, {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936,
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "hidden_act": "silu", "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "decoder_sparse_step": 1, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "rope_scaling": None,
        "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": False,
        "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645}),
    "Phi-3.5-MoE-instruct": (41_873_153_344, {
        "model_type": "phimoe", "architectures": ["PhiMoEForCausalLM"], "vocab_size": 32064,
        "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32, "hidden_act": "silu",
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 16,
        "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "router_jitter_noise": 0.01, "input_jitter_noise": 0.01,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64,
                         "short_mscale": 1.243163121016122, "long_mscale": 1.243163121016122,
                         "original_max_position_embeddings": 4096},
        "sliding_window": 131072, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 32000}),
}


def base(family):
    return next(dict(hf) for _, hf in PUBLISHED.values() if hf["model_type"] == family)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    count, hf = PUBLISHED[name]
    config = model_config(hf, name)
    assert parameters(config) == count
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config))), name) == config


def test_what_distinguishes_the_families():
    configs = {hf["model_type"]: model_config(hf, name) for name, (_, hf) in PUBLISHED.items()}
    router = {family: config.router for family, config in configs.items()}
    assert (router["mixtral"].score, router["mixtral"].renormalise) == ("softmax", True)
    assert (router["olmoe"].score, router["olmoe"].renormalise) == ("softmax", False)
    assert router["qwen3_moe"].renormalise
    assert (router["phimoe"].score, router["phimoe"].jitter) == ("sparsemixer", 0.01)
    assert [configs[f].attention.qk_norm for f in ("mixtral", "olmoe", "qwen3_moe", "phimoe")] == \
        ["none", "full", "head", "none"]
    phi = configs["phimoe"]
    assert phi.norm == "layer" and phi.head_bias and phi.attention.bias and phi.attention.out_bias
    assert phi.attention.window == 131072 and phi.stop_ids == (32000,)
    assert phi.attention.rope["type"] == "longrope" and phi.attention.rope["original"] == 4096
    assert phi.attention.rope["short_mscale"] == 1.243163121016122
    assert configs["qwen3_moe"].attention.head_dim == 128 and configs["qwen3_moe"].expert.f == 768


def test_end_tokens_of_the_generation_config_go_first():
    hf = base("qwen3_moe")
    assert model_config(hf, "x").stop_ids == (151645,)
    assert model_config(hf, "x", {"eos_token_id": [151645, 151643]}).stop_ids == (151645, 151643)
    assert model_config({**hf, "eos_token_id": None}, "x").stop_ids == ()


REFUSED = [
    ("mixtral", {"model_type": "deepseek_v3"}, "model_type = 'deepseek_v3'"),
    ("mixtral", {"model_type": None}, "supported family: mixtral, olmoe, phimoe, qwen3_moe"),
    ("mixtral", {"architectures": ["MixtralForSequenceClassification"]}, "MixtralForSequenceClassification"),
    ("mixtral", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ("mixtral", {"hidden_act": "xielu"}, "hidden_act = 'xielu'"),
    ("mixtral", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ("mixtral", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
    ("mixtral", {"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, "rope_theta = 'big'"),
    ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("mixtral", {"attention_bias": True}, "attention_bias = True"),
    ("mixtral", {"hidden_size": "4096"}, "hidden_size = '4096'"),
    ("mixtral", {"hidden_size": None}, "hidden_size is missing"),
    ("mixtral", {"num_key_value_heads": 5}, "kv_heads = 5"),
    ("mixtral", {"num_experts_per_tok": 9}, "router.top_k = 9"),
    ("mixtral", {"sliding_window": -1}, "sliding_window = -1"),
    ("mixtral", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
    ("mixtral", {"num_attention_heads": 30}, "hidden_size = 4096"),
    ("mixtral", {"head_dim": 129}, "head_dim = 129"),
    ("mixtral", {"eos_token_id": "</s>"}, "eos_token_id = '</s>'"),
    ("olmoe", {"head_dim": 64}, "head_dim = 64"),
    ("olmoe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers = [0]"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("phimoe", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
    ("phimoe", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 64}},
     "short_factor"),
    ("phimoe", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [1.0] * 64}},
     "short_mscale is missing"),
]


@pytest.mark.parametrize("family,change,words", REFUSED)
def test_what_is_not_supported_is_refused_by_name(family, change, words):
    with pytest.raises(UserError) as caught:
        model_config({**base(family), **change}, "dir/config.json")
    assert words in str(caught.value) and "dir/config.json" in str(caught.value)


JSON = st.recursive(st.none() | st.booleans() | st.integers(-10, 1 << 40) | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                    max_leaves=5)
ROPE = st.dictionaries(st.sampled_from(["rope_type", "type", "rope_theta", "factor", "short_factor", "long_factor",
                                        "short_mscale", "original_max_position_embeddings", "low_freq_factor",
                                        "high_freq_factor", "mscale", "mscale_all_dim", "beta_fast", "truncate"]),
                       JSON | st.sampled_from(["linear", "yarn", "llama3", "longrope", 4, [1.0] * 64]))


@settings(max_examples=60, deadline=None)
@given(family=st.sampled_from(sorted(FAMILIES)), data=st.data())
def test_any_configuration_gives_a_model_or_one_message(family, data):
    hf = base(family)
    for name in data.draw(st.lists(st.sampled_from(sorted(hf)), max_size=3)):
        hf[name] = data.draw(JSON)
    if data.draw(st.booleans()):
        hf[data.draw(st.sampled_from(["rope_scaling", "rope_parameters"]))] = data.draw(ROPE)
    try:
        config = model_config(hf, "config.json", data.draw(st.dictionaries(st.just("eos_token_id"), JSON)))
    except UserError as error:
        assert "config.json" in str(error) and "\n" not in str(error)
    else:
        assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config))), "x") == config


# ---------------------------------------------------------------- names of tensors
def shapes_of(config, block="mlp", words=("gate_proj", "up_proj", "down_proj"), router="gate"):
    """A checkpoint's tensors, written down from the families' own naming."""
    a, d, f = config.attention, config.d, config.expert.f
    shapes = {"model.embed_tokens.weight": (config.vocab, d), "model.norm.weight": (d,),
              "lm_head.weight": (config.vocab, d)}
    for layer in range(config.layers):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": (d,), at + "post_attention_layernorm.weight": (d,),
                   at + "self_attn.q_proj.weight": (a.heads * a.head_dim, d),
                   at + "self_attn.k_proj.weight": (a.kv_heads * a.head_dim, d),
                   at + "self_attn.v_proj.weight": (a.kv_heads * a.head_dim, d),
                   at + "self_attn.o_proj.weight": (d, a.heads * a.head_dim),
                   at + f"{block}.{router}.weight": (config.router.experts, d)}
        for e in range(config.router.experts):
            for word, shape in zip(words, ((f, d), (f, d), (d, f))):
                shapes[at + f"{block}.experts.{e}.{word}.weight"] = shape
    return shapes


TINY = random_config("mixtral", layers=2, d=8, f=6, experts=3, top_k=2, heads=2, kv_heads=1, head_dim=4,
                     vocab=11, context=16, tied=False)


def test_spellings_of_one_model_give_the_same_slabs():
    new = sources(TINY, shapes_of(TINY), "x")
    old = sources(TINY, shapes_of(TINY, "block_sparse_moe", ("w1", "w3", "w2")), "x")
    assert [p.tensor.rsplit(".", 2)[1] for p in new["layers/1/experts/2"]] == ["gate_proj", "up_proj", "down_proj"]
    assert [p.tensor.rsplit(".", 2)[1] for p in old["layers/1/experts/2"]] == ["w1", "w3", "w2"]
    assert new.keys() == old.keys()
    assert sum(p.count for pieces in new.values() for p in pieces) == parameters(TINY)
    stacked = {name: shape for name, shape in shapes_of(TINY).items() if ".experts." not in name}
    for layer in range(2):
        stacked[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = (3, 12, 8)
        stacked[f"model.layers.{layer}.mlp.experts.down_proj"] = (3, 8, 6)
    both, down = sources(TINY, stacked, "x")["layers/1/experts/2"]
    assert (both.start, both.count, down.start, down.count) == (2 * 96, 96, 2 * 48, 48)
    assert both.count + down.count == sum(a * b for a, b in expert_shapes(TINY).values())


def test_missing_left_over_and_misshapen_tensors_are_named():
    shapes = shapes_of(TINY)
    for change, words in (({"model.layers.1.mlp.experts.2.up_proj.weight": None}, "experts.2.up_proj.weight or"),
                          ({"lm_head.weight": None}, "tensor lm_head.weight is missing"),
                          ({"model.layers.0.mlp.gate.weight": None}, "model.layers.0.mlp.gate.weight or"),
                          ({"model.norm.weight": (9,)}, "model.norm.weight: shape [9]: expected [8]"),
                          ({"model.layers.0.self_attn.q_proj.bias": (8,)}, "self_attn.q_proj.bias does not belong"),
                          ({"model.layers.2.input_layernorm.weight": (8,)}, "model.layers.2.input_layernorm")):
        changed = {name: shape for name, shape in {**shapes, **change}.items() if shape}
        with pytest.raises(UserError, match=words.replace("[", r"\[")) as caught:
            sources(TINY, changed, "dir")
        assert str(caught.value).startswith("dir: tensor ")


def test_a_tied_head_may_be_saved_twice_and_rotary_tables_are_ignored():
    tied = dataclasses.replace(TINY, tied=True)
    found = sources(tied, {**shapes_of(TINY), "model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}, "x")
    assert "head" not in found
