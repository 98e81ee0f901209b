"""The engine against Hugging Face transformers: logits, and greedy tokens with the KV cache.

By default the committed references are used (tests/parity/make_references.py made them); with the
mark `parity` fresh random models are drawn and computed live.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

from local import choices, job_config, run_job, run_local, write_prompts
from parity import cases

TOLERANCE = 1e-4  # of the largest logit, fp32


def convert(folder: str, out) -> str:
    from hpcmoe.data.convert import convert as convert_checkpoint
    path = os.path.join(out, "model.h5")
    convert_checkpoint(folder, path)
    return path


def compare_logits(reference, weights, tmp_path) -> float:
    """Largest relative error of the engine's logits at every position of every prompt, in one batch."""
    write_prompts(tmp_path / "score.jsonl", reference.prompts, max_tokens=1)
    scored = [i for i, p in enumerate(reference.prompts) if len(p) > 1]
    write_prompts(tmp_path / "long.jsonl", [reference.prompts[i] for i in scored])
    worst = 0.0
    _, session = run_local(job_config(weights, tmp_path / "score.jsonl", tmp_path / "a"))
    mine = np.concatenate(session.seen_logits)  # the last position of each prompt
    assert len(mine) == len(reference.prompts)
    for row, logits in zip(mine, reference.logits):
        worst = max(worst, np.abs(row - logits[-1]).max() / np.abs(logits).max())
    _, session = run_local(job_config(weights, tmp_path / "long.jsonl", tmp_path / "b", task="score"))
    mine = np.split(np.concatenate(session.seen_logits), np.cumsum([len(reference.prompts[i]) - 1 for i in scored])[:-1])
    for rows, i in zip(mine, scored):  # all positions before the last
        logits = reference.logits[i]
        assert rows.shape == logits[:-1].shape
        worst = max(worst, np.abs(rows - logits[:-1]).max() / np.abs(logits).max())
    return worst


def compare_tokens(reference, weights, tmp_path, ranks, **sets) -> None:
    write_prompts(tmp_path / "generate.jsonl", reference.prompts, max_tokens=cases.NEW_TOKENS, ignore_eos=True)
    _, rows, _ = run_job(ranks, tmp_path, {"weights.file": weights, "requests.file": tmp_path / "generate.jsonl", **sets})
    for choice, expected in zip(choices(rows), reference.tokens):
        assert choice["token_ids"] == expected.tolist()


@pytest.mark.parametrize("name", cases.names())
def test_logits_and_greedy_tokens_are_those_of_transformers(name, tmp_path):
    reference = cases.load(name)
    weights = convert(reference.folder, tmp_path)
    assert compare_logits(reference, weights, tmp_path) <= TOLERANCE


@pytest.mark.mpi
@pytest.mark.parametrize("name, ranks, sets", [
    (name, 3, {"run.prefill_chunk": 5}) for name in cases.names()] + [
    ("mixtral", 5, {"run.max_sequences": 5, "run.batch_tokens": 20}),
    ("phimoe", 4, {"layout.pp": 2, "run.lanes": 2, "layout.leaders": 1}),
    ("qwen3_moe-yarn", 8, {"layout.pp": 2, "layout.ep": 4}),
    ("olmoe", 2, {"layout.dp": 2})])
def test_ranks_generate_the_tokens_of_transformers(name, ranks, sets, tmp_path):
    reference = cases.load(name)
    compare_tokens(reference, convert(reference.folder, tmp_path), tmp_path, ranks, **sets)


@pytest.mark.parity
def test_live_parity_on_fresh_random_models(tmp_path):
    """All families, drawn anew: the seed is printed so that a failure can be had again."""
    seed = int.from_bytes(os.urandom(3), "little")
    print(f"make_references.py --seed {seed}")
    script = os.path.join(os.path.dirname(cases.__file__), "make_references.py")
    subprocess.run([sys.executable, script, "--out", str(tmp_path / "live"), "--seed", str(seed)], check=True)
    for name in cases.names():
        reference = cases.load(name, str(tmp_path / "live"))
        folder = tmp_path / name
        folder.mkdir()
        weights = convert(reference.folder, folder)
        error = compare_logits(reference, weights, folder)
        print(f"{name:22s} relative error of logits {error:.1e}")
        assert error <= TOLERANCE, (name, seed)
        compare_tokens(reference, weights, folder, 3)
