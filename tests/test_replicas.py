"""Copies of experts in whole runs: the same tokens, rows shared evenly, every figure by the model's own experts."""

import numpy as np
import pytest

from local import choices, run_job, said, write_prompts

LAYERS, EXPERTS, TOP_K = 4, 8, 2


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A random model, unequal requests, and a run on one rank: folder, settings, its choices, rows per layer and expert."""
    from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
    from hpcmoe.data.create import create
    folder = tmp_path_factory.mktemp("replicas")
    model = ModelConfig("mixtral", 97, 32, LAYERS, AttentionConfig(4, 2, 8), RouterConfig(EXPERTS, TOP_K), ExpertConfig(24), 128)
    create(str(folder / "model.h5"), model, dtype="fp32", seed=5)
    rng = np.random.default_rng(3)
    write_prompts(folder / "requests.jsonl", [rng.integers(3, 97, n) for n in (1, 9, 5, 14, 8, 13, 21, 3, 7, 7)],
                  max_tokens=[3 + i % 4 for i in range(10)], temperature=[0.0, 0.9] * 5, seed=list(range(10)), logprobs=1, ignore_eos=True)
    sets = {"weights.file": folder / "model.h5", "requests.file": folder / "requests.jsonl", "weights.backend": "numpy"}
    _, rows, report = run_job(1, folder, sets, name="base")
    return folder, sets, choices(rows), [layer["rows_per_expert"] for layer in report["expert_load"]["layers"]]


BOTH = pytest.mark.mpi  # the other MPI may differ
MATRIX = [
    (2, {"layout.replicas": 8}, {}), (6, {"layout.dp": 2, "layout.replicas": 2, "layout.leaders": 1}, {}),
    pytest.param(6, {"layout.pp": 2, "layout.ep": 3, "layout.replicas": 3, "run.lanes": 2}, {}, marks=BOTH),
    pytest.param(8, {"layout.tp": 2, "layout.replicas": 5, "run.transport": "pairwise"}, {}, marks=BOTH),
    (8, {"layout.pp": 2, "layout.replicas": 4, "run.transport": "hierarchical", "run.lanes": 2}, {"HPCMOE_RANKS_PER_NODE": "2"}),
    (40, {"layout.pp": 4, "layout.ep": 10}, {}),
]


@pytest.mark.parametrize("ranks, more, env", MATRIX, ids=lambda v: " ".join(f"{k.split('.')[1]}={x}" for k, x in v.items() if "." in k) if isinstance(v, dict) else str(v))
def test_copies_change_no_token(case, ranks, more, env):
    folder, sets, base, rows_le = case
    _, rows, report = run_job(ranks, folder, {**sets, **more}, env=env, timeout=400)
    for mine, want in zip(choices(rows), base, strict=True):
        assert mine["token_ids"] == want["token_ids"]
        np.testing.assert_allclose(mine["logprobs"]["token_logprobs"], want["logprobs"]["token_logprobs"], atol=1e-5)
    replicas = more.get("layout.replicas", more.get("layout.ep", 0) - EXPERTS)
    for layer, expected in zip(report["expert_load"]["layers"], rows_le, strict=True):
        assert layer["rows_per_expert"] == expected
        assert layer["copies_per_expert"] == [1 + replicas // EXPERTS + (e < replicas % EXPERTS) for e in range(EXPERTS)]
    for r in report["per_rank"]:
        assert r["experts"] == [[s % EXPERTS for s in r["slots"]]] * len(r["layers"])
        assert abs(r["weights_bytes"] - r["weights_predicted_bytes"]) <= 0.02 * r["weights_bytes"]
    assert sum(r["expert_rows"] for r in report["per_rank"] if not r["shard"]) == sum(map(sum, rows_le))


def test_a_placement_with_copies_and_one_that_contradicts_the_job(case):
    from hpcmoe.data.placement import Placement, Predicted, Seats, Shape, write_placement
    from hpcmoe.data.weights import WeightsFile
    folder, sets, base, rows_le = case
    rng = np.random.default_rng(0)
    order_ls = np.array([rng.permutation(np.append(np.arange(EXPERTS), [row.index(max(row))] * 2)) for row in rows_le])
    with WeightsFile(sets["weights.file"]) as file:
        shape = Shape.of(file.config)
    figures = (Predicted(1.0, 1.0, 1.0, 1.0, 1.0),) * LAYERS
    write_placement(folder / "p.json", Placement(shape, Seats(1, 5, "all", (0,) * 5), order_ls, figures))
    sets = {**sets, "layout.placement": folder / "p.json"}
    _, rows, report = run_job(5, folder, {**sets, "layout.replicas": 2}, name="placed")
    assert [c["token_ids"] for c in choices(rows)] == [c["token_ids"] for c in base]
    for layer, load in enumerate(report["expert_load"]["layers"]):
        assert load["rows_per_expert"] == rows_le[layer] and max(load["copies_per_expert"]) == 3
        share_e = np.array(rows_le[layer]) / np.bincount(order_ls[layer])
        expected = share_e[order_ls[layer]].reshape(5, 2).sum(axis=1)
        found = [sum(r["experts"][layer] == list(pair) for r in report["per_rank"]) for pair in order_ls[layer].reshape(5, 2)]
        assert min(found) == 1
        assert load["rank_max_over_mean_run"] == pytest.approx(expected.max() / expected.mean(), rel=0.1)
    done, *_ = run_job(5, folder, sets, name="contradicts", check=False)
    assert done.rc == 2 and "p.json: experts[0]" in done.err and "8 slots" in done.err and len(said(done)) == 1
