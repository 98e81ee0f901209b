"""The job of a candidate as a file of `hpcmoe run`, and a script that Slurm starts it with: jobs/*.sbatch with its layout and its nodes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from hpcmoe.config import JobConfig, to_dict
from hpcmoe.plan.candidates import Candidate, job_of
from hpcmoe.simulate.run import Told

ALWAYS = {"layout": ("dp", "pp", "ep", "tp", "leaders"), "run": ("micro_batches", "lanes", "batch_tokens", "max_sequences"),
          "throughput": ("sequences", "prompt_tokens", "output_tokens"), "weights": ("file",)}
LEFT_OUT = ("output",)  # folders are the script's


def job_toml(told: Told, c: Candidate, cluster: str) -> str:
    """The text of the job file: what was searched, and whatever else differs from the defaults."""
    job = job_of(told, c)
    model = Path(told.job.weights.file)
    values, plain = to_dict(job), to_dict(JobConfig())
    if model.suffix not in (".h5", ".hdf5"):
        values["weights"]["file"] = f"{model.stem}.h5"
    lines = [f"# {model.name} on {told.gpus} ranks of {told.cluster.name} ({cluster}); made by hpcmoe plan.",
             "# Requests of your own: hpcmoe run ... --set task=generate --requests batch.jsonl"]
    if model.suffix not in (".h5", ".hdf5"):
        lines.append(f"# {model} has no weights: name yours here, or with --weights (hpcmoe weights convert makes them).")
    lines.append('task = "throughput"')
    for section, keys in values.items():
        if not isinstance(keys, dict) or section in LEFT_OUT:
            continue
        shown = {key: value for key, value in keys.items() if key in ALWAYS.get(section, ()) or value != plain[section][key]}
        if shown:
            lines += ["", f"[{section}]"] + [f"{key} = {json.dumps(value)}" for key, value in shown.items()]
    return "\n".join(lines) + "\n"


def sbatch(told: Told, c: Candidate, cluster: str, job: Path) -> str:
    """The text of the script for `sbatch`, from the checkout."""
    per_node = min(told.cluster.nodes.ranks_per_node, told.gpus)
    nodes = -(-told.gpus // per_node)
    base = "jobs/large_ep_64.sbatch" if told.gpu else "jobs/cpu_16.sbatch"
    options = [f"--nodes={nodes}", f"--ntasks-per-node={per_node}"]
    options += [f"--ntasks={told.gpus}", "--distribution=block"] if nodes * per_node != told.gpus else []
    options += ["--gpus-per-task=1", "--cpus-per-task=8"] if told.gpu else ["--cpus-per-task=1"]
    lines = ["#!/usr/bin/env bash",
             f"# {told.job.weights.file} on {told.gpus} ranks of {told.cluster.name} ({cluster}); made by hpcmoe plan.",
             f"# From the checkout: sbatch SCRIPT [hpcmoe options]; {base} says what else can be set, and does the work.",
             "#SBATCH --job-name=hpcmoe-plan", *(f"#SBATCH {option}" for option in options),
             "#SBATCH --time=01:00:00", "#SBATCH --output=hpcmoe-%j.log", "set -euo pipefail",
             'cd "${SLURM_SUBMIT_DIR:-$PWD}"',
             f"export JOB=${{JOB:-{shlex.quote(str(job))}}} RANKS={told.gpus} LAYOUT=\"{c.shape.layout}\"",
             f'exec bash {base} "$@"']
    return "\n".join(lines) + "\n"
