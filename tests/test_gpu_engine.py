"""The whole engine's GPU path without a GPU: on the CuPy look-alike (cuda/lookalike), whose arrays lie in memory that
the CPU cannot touch, whose kernels are the real ones, and whose streams run as late as they may."""

import json

import numpy as np
import pytest

from cudabed import bed
from local import choices, run_job, write_prompts

pytestmark = pytest.mark.skipif(bool(bed.missing()), reason=bed.missing() or "-")
VOCAB, CONTEXT = 97, 128
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 7)


def model_of(name: str):
    from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
    yarn = {"type": "yarn", "theta": 1e4, "factor": 4.0, "original": 16, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.14}
    attention, router, expert, more = {
        "mixtral": (AttentionConfig(4, 2, 16), RouterConfig(16, 2), ExpertConfig(24), {}),
        "full norm, clip, tied": (AttentionConfig(3, 3, 16, qk_norm="full", clip_qkv=0.7), RouterConfig(5, 3, renormalise=False),
                                  ExpertConfig(20, "gelu_tanh"), {"tied": True}),
        "head norm, biases, yarn": (AttentionConfig(6, 2, 16, bias=True, qk_norm="head", rope=yarn), RouterConfig(9, 4),
                                    ExpertConfig(12, "relu"), {}),
        "layer norm, sparsemixer, window": (AttentionConfig(4, 1, 32, bias=True, out_bias=True, window=9),
                                            RouterConfig(6, 2, score="sparsemixer", jitter=0.1), ExpertConfig(16),
                                            {"norm": "layer", "head_bias": True}),
        "sigmoid, groups, bias": (AttentionConfig(2, 1, 16), RouterConfig(16, 4, score="sigmoid", bias=True, groups=4, top_groups=2,
                                                                         scale=2.5), ExpertConfig(8, "gelu"), {}),
    }[name]
    return ModelConfig("mixtral", VOCAB, 40, 2, attention, router, expert, CONTEXT, **more)


def settings(folder, name: str, dtype: str = "fp16", **more) -> dict:
    """A random model, stored as it is computed in, and requests of unequal length."""
    from hpcmoe.data.create import create
    folder.mkdir(exist_ok=True)
    create(str(folder / "model.h5"), model_of(name), dtype=dtype, seed=5)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, VOCAB, n) for n in LENGTHS]
    write_prompts(folder / "requests.jsonl", prompts, max_tokens=[3 + i % 5 for i in range(len(prompts))],
                  temperature=[0.0 if i % 2 else 0.9 for i in range(len(prompts))], seed=[i * 7 for i in range(len(prompts))],
                  top_p=0.9, logprobs=1, ignore_eos=True)
    return {"weights.file": folder / "model.h5", "requests.file": folder / "requests.jsonl", "run.device": "gpu",
            "run.page_tokens": 16} | more


def numbers(choice) -> tuple[list[int], np.ndarray]:
    return choice["token_ids"], np.array(choice["logprobs"]["token_logprobs"])


def score_errors(folder, sets: dict, ranks: int = 1, env=None) -> np.ndarray:
    """|difference| of each token's log-probability from the fp64 oracle's."""
    from hpcmoe.data.weights import WeightsFile
    from hpcmoe.model import reference
    _, rows, report = run_job(ranks, folder, {**sets, "task": "score"}, env=env or bed.lookalike_env(), timeout=400, name="score")
    assert all("look-alike" in rank["device"].lower() for rank in report["per_rank"])
    prompts = [json.loads(line)["body"]["prompt"] for line in open(sets["requests.file"])]
    found, expected = [], []
    with WeightsFile(sets["weights.file"]) as file:
        for prompt, row in zip(prompts, rows):
            if len(prompt) < 2:  # nothing to score
                continue
            logits = reference.logits(file, prompt, CONTEXT)[:-1]
            wide = logits - logits.max(axis=1, keepdims=True)
            expected += list((wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))[range(len(prompt) - 1), prompt[1:]])
            found += [v for v in row["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"] if v is not None]
    return np.abs(np.array(found) - np.array(expected))


@pytest.mark.parametrize("dtype, bound", [("fp16", 0.01), ("bf16", 0.08)])
@pytest.mark.parametrize("name", ["mixtral", "full norm, clip, tied", "head norm, biases, yarn", "layer norm, sparsemixer, window",
                                  "sigmoid, groups, bias"])
def test_every_kind_of_model_scores_as_the_oracle_does(tmp_path, name, dtype, bound):
    errors = score_errors(tmp_path, settings(tmp_path, name, dtype, **{"run.prefill_chunk": 11}))
    assert np.quantile(errors, 0.9) < bound, np.sort(errors)[::-1][:10]  # a token near a tie may go to another expert


@pytest.mark.parametrize("name", ["head norm, biases, yarn", "layer norm, sparsemixer, window"])
def test_tensor_shards_score_as_the_oracle_does(tmp_path, name):
    """Biases of queries, outputs and logits, copies of one KV head, and a stage to hand on to."""
    errors = score_errors(tmp_path, settings(tmp_path, name, **{"run.prefill_chunk": 11, "layout.tp": 2, "layout.pp": 2}), ranks=4)
    assert np.quantile(errors, 0.9) < 0.015, np.sort(errors)[::-1][:10]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    sets = settings(folder, "mixtral")
    _, rows, _ = run_job(1, folder, {**sets, "run.graphs": "false"}, env=bed.lookalike_env(), timeout=400, name="base")
    return folder, sets, choices(rows)


def check_same(rows, base) -> None:
    """The same tokens; where a rounding turned one, log-probabilities agree up to there, and it is rare."""
    turned = 0
    for mine, expected in zip(choices(rows), base):
        (tokens, logprobs), (want, want_logprobs) = numbers(mine), numbers(expected)
        same = next((i for i, (a, b) in enumerate(zip(tokens, want)) if a != b), len(want))
        turned += same < len(want)
        np.testing.assert_allclose(logprobs[:same], want_logprobs[:same], atol=0.01)
    assert turned <= 1


LAYOUTS = [
    (1, {}), (1, {"run.batch_tokens": 4, "run.prefill_chunk": 3}), (2, {}), (2, {"layout.pp": 2}), (2, {"layout.dp": 2}),
    (3, {"run.max_sequences": 3}), (4, {"layout.leaders": 1}), (4, {"layout.pp": 2, "layout.leaders": 1, "run.schedule": "plain"}),
    (5, {"layout.ep": 5, "layout.replicas": 8}), (8, {"layout.pp": 2, "run.prefill_chunk": 4}), (16, {}),
    (2, {"layout.tp": 2}), (4, {"layout.tp": 4, "run.batch_tokens": 5}), (4, {"layout.tp": 2, "layout.leaders": 1}),
    (8, {"layout.tp": 2, "layout.pp": 2, "run.lanes": 2, "run.micro_batches": 5}), (4, {"layout.tp": 2, "layout.dp": 2}),
    (2, {"run.lanes": 3, "run.micro_batches": 5}), (4, {"layout.pp": 2, "run.lanes": 2, "run.micro_batches": 5}),
    (2, {"layout.dp": 2, "run.max_sequences": 1}), (4, {"layout.dp": 2, "layout.pp": 2, "run.max_sequences": 2}),
]
ALONE = {"run.lanes": 1, "run.micro_batches": 1}


def words(v) -> str:
    return " ".join(f"{k.split('.')[1]}={x}" for k, x in v.items()) if isinstance(v, dict) else str(v)


@pytest.mark.parametrize("ranks, more", LAYOUTS, ids=words)
def test_the_layout_changes_no_token_through_host_memory(case, ranks, more):
    """An MPI that cannot read device memory: rows are staged. Several seeds of what runs when."""
    folder, sets, base = case
    _, rows, report = run_job(ranks, folder, {**sets, **more}, env=bed.lookalike_env(LOOKALIKE_SEED=str(ranks)), timeout=400)
    check_same(rows, base)
    assert report["run"]["transport"] == "staged"


@pytest.mark.parametrize("mpi", bed.MPIS)
@pytest.mark.parametrize("ranks, more", [(2, {}), (4, {"run.transport": "pairwise", "layout.pp": 2}), (4, {"layout.leaders": 2}),
                                         (16, {"run.transport": "ialltoallv"}), (4, {"layout.tp": 2}),
                                         (8, {"run.transport": "pairwise", "layout.tp": 4, "layout.pp": 2})], ids=words)
def test_the_layout_changes_no_token_on_device_pointers(case, mpi, ranks, more):
    if bed.missing_mpi(mpi):
        pytest.skip(bed.missing_mpi(mpi))
    folder, sets, base = case
    env = bed.lookalike_env(mpi, HPCMOE_CUDA_AWARE="1", LOOKALIKE_SEED=str(ranks))
    _, rows, report = run_job(ranks, folder, {**sets, **more}, env=env, timeout=400, name=f"cuda-{mpi}")
    check_same(rows, base)
    assert report["run"]["transport"] == more.get("run.transport", "ialltoallv")


@pytest.mark.parametrize("mpi, ranks, per_node, more", [
    (None, 8, 4, {"layout.tp": 2}), (None, 8, 2, {"layout.pp": 2, "run.lanes": 2, "run.micro_batches": 5}),
    ("mpich", 5, 3, {"layout.ep": 5, "layout.leaders": "node", "run.batch_tokens": 9}), ("openmpi", 4, 2, {})], ids=words)
def test_rows_by_way_of_forwarders_change_no_token(case, mpi, ranks, per_node, more):
    """Through host memory (no mpi named), or on device pointers; every (token, choice) pair reaches its expert."""
    if mpi and bed.missing_mpi(mpi):
        pytest.skip(bed.missing_mpi(mpi))
    folder, sets, base = case
    env = bed.lookalike_env(mpi, HPCMOE_RANKS_PER_NODE=str(per_node), LOOKALIKE_SEED=str(ranks), **({"HPCMOE_CUDA_AWARE": "1"} if mpi else {}))
    _, rows, report = run_job(ranks, folder, {**sets, **more, "run.transport": "hierarchical"}, env=env, timeout=400, name=f"by-way-{mpi}")
    check_same(rows, base)
    assert report["run"]["transport"] == "hierarchical"
    tokens = sum(n + len(choice["token_ids"]) - 1 for n, choice in zip(LENGTHS, base))
    dispatch = report["traffic"]["dispatch"]
    assert dispatch["rows_own"] + dispatch["rows_within_nodes"] == tokens * 2 * 2 * more.get("layout.tp", 1)  # choices, layers
    assert 0 < dispatch["rows_between_nodes"] <= tokens * 2 * more.get("layout.tp", 1)  # two nodes of a stage


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """A model of five experts, three per token, and enough steps to move them."""
    folder = tmp_path_factory.mktemp("five")
    sets = settings(folder, "full norm, clip, tied")
    write_prompts(folder / "requests.jsonl", [[5 + i % 2] * 4 for i in range(8)], max_tokens=[12 + i % 4 for i in range(8)], logprobs=1,
                  ignore_eos=True)
    _, rows, report = run_job(1, folder, sets, env=bed.lookalike_env(), timeout=400, name="base")
    return folder, sets, choices(rows), [layer["rows_per_expert"] for layer in report["expert_load"]["layers"]]


@pytest.mark.parametrize("mpi, ranks, more", [
    (None, 6, {"layout.ep": 6}), (None, 4, {"layout.pp": 2, "layout.replicas": 1, "run.lanes": 2, "run.micro_batches": 5}),
    ("mpich", 6, {"layout.ep": 6}), ("openmpi", 4, {"layout.replicas": 3, "run.graphs": "false"})], ids=words)
def test_experts_that_take_other_seats_change_no_token(five, mpi, ranks, more):
    """Weights travel through host memory (no mpi named), or from device to device; one slot per rank (graphs), and two."""
    if mpi and bed.missing_mpi(mpi):
        pytest.skip(bed.missing_mpi(mpi))
    from hpcmoe.data.routing import read_routing
    folder, sets, base, rows_le = five
    env = bed.lookalike_env(mpi, LOOKALIKE_SEED=str(ranks), **({"HPCMOE_CUDA_AWARE": "1"} if mpi else {}))
    eager = {"run.rebalance_every": 2, "run.rebalance_gb_per_s": 1e6, "run.routing_statistics": "true"}
    _, rows, report = run_job(ranks, folder, {**sets, **eager, **more}, env=env, timeout=400, name=f"seats-{mpi}")
    check_same(rows, base)
    assert [sum(layer["rows_per_expert"]) for layer in report["expert_load"]["layers"]] == [sum(rows_e) for rows_e in rows_le]
    counted = read_routing(folder / f"seats-{mpi}-{ranks}" / "routing.h5", model_of("full norm, clip, tied"))  # by the router, whatever the seats
    assert counted.rows_le.tolist() == [layer["rows_per_expert"] for layer in report["expert_load"]["layers"]]
    moved = [x for x in report["rebalancing"] if x["switch_step"] is not None and x["experts_moved"]]
    assert moved and all(x["heaviest_over_mean_after_predicted"] < x["heaviest_over_mean_before_predicted"] for x in moved)
    for r in report["per_rank"]:
        assert abs(r["weights_bytes"] - r["weights_predicted_bytes"]) <= 0.02 * r["weights_bytes"] + 64 * 16 * 8, r


@pytest.mark.parametrize("ranks, transport", [(1, "auto"), (4, "auto"), (4, "hierarchical")])
def test_fp8_dispatch_changes_little(case, ranks, transport):
    folder, sets, _ = case
    env = bed.lookalike_env(HPCMOE_RANKS_PER_NODE="2")
    errors = score_errors(folder, {**sets, "run.dispatch_dtype": "fp8", "run.transport": transport}, ranks, env)
    assert 1e-4 < np.median(errors) < 0.02 and np.quantile(errors, 0.9) < 0.05


def test_replicas_share_texts_that_are_scored(case):
    folder, sets, _ = case
    errors = score_errors(folder, {**sets, "layout.dp": 2, "layout.pp": 2, "run.max_sequences": 2}, 4)
    assert np.quantile(errors, 0.9) < 0.01


@pytest.mark.parametrize("ranks", [1, 2])
def test_few_pages_admit_few_sequences_and_none_is_lost(case, ranks):
    """Memory for four pages: sequences wait for theirs, and get the same tokens; so do replicas."""
    folder, sets, base = case
    page = 2 * 2 * 2 * 16 * 16 * 2
    more = {"run.memory_gb": 4.5 * page / 2**30, "layout.dp": ranks}
    _, rows, report = run_job(ranks, folder, {**sets, **more}, env=bed.lookalike_env(), timeout=400, name="pages")
    check_same(rows, base)
    assert max(r["kv_bytes"] for r in report["per_rank"]) == 4 * page
