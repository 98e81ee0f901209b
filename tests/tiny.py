"""A job small enough for tests of scripts and faults: a random model of 4 layers and 16 experts, and a few prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from local import write_prompts

VOCAB = 97


def tiny_model(path: Path) -> None:
    from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
    from hpcmoe.data.create import create
    model = ModelConfig("mixtral", VOCAB, 32, 4, AttentionConfig(4, 2, 8), RouterConfig(16, 2), ExpertConfig(24), 128)
    create(str(path), model, dtype="fp32", seed=1)


def tiny_job(folder: Path, requests: int = 8, max_tokens: int = 6) -> Path:
    """Writes model.h5, requests.jsonl and job.toml in `folder`; the path of job.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(folder / "model.h5")
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, VOCAB, 3 + i % 5) for i in range(requests)]
    write_prompts(folder / "requests.jsonl", prompts, max_tokens=max_tokens, ignore_eos=True)
    job = folder / "job.toml"
    job.write_text(f'task = "generate"\n[weights]\nfile = "{folder}/model.h5"\n[requests]\nfile = "{folder}/requests.jsonl"\n')
    return job
