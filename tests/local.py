"""A job on one rank in this process, with the logits it computed; and jobs on several ranks through the command line."""

from __future__ import annotations

import json
import os

import numpy as np

from mpi import run_ranks, started


def job_config(weights, requests, out, task="generate", **run):
    from hpcmoe.config import JobConfig, OutputJob, RequestsJob, RunJob, WeightsJob
    return JobConfig(task=task, weights=WeightsJob(str(weights)), requests=RequestsJob(str(requests)),
                     output=OutputJob(str(out), quiet=True), run=RunJob(**run))


def write_prompts(path, prompts, **body) -> None:
    """Token-id prompts as a JSONL file in the OpenAI batch form; values of `body` may be lists, one per prompt."""
    with open(path, "w") as file:
        for i, prompt in enumerate(prompts):
            row = {name: value[i] if isinstance(value, list) else value for name, value in body.items()}
            file.write(json.dumps({"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions",
                                   "body": {"prompt": [int(t) for t in prompt], **row}}) + "\n")


def run_local(config):
    """(results by request, Session) of a job run in this process, the only rank; session.seen_logits
    holds (rows of normed x, logits) of every call of the head, in order."""
    from hpcmoe import job
    from hpcmoe.prepare import prepare
    prepared = prepare(config, 1)
    session = job.Session(started().COMM_SELF, prepared, prepared, lambda step: None, lambda text: None)
    session.load()
    head, session.seen_logits = session.held.head, []

    def watched(x_nd):
        logit_nv = head(x_nd)
        session.seen_logits.append(np.array(logit_nv))
        return logit_nv

    session.held.head = watched
    results = session.execute(0.0)
    return sorted(results, key=lambda r: r.index), session


def run_job(ranks: int, folder, sets: dict, env=None, timeout=180, name="job", check=True):
    """`hpcmoe run` on so many ranks with these settings; (Done, rows of outputs.jsonl, report)."""
    out = os.path.join(folder, f"{name}-{ranks}")
    arguments = ["-m", "hpcmoe", "run", "--quiet", "--output", out]
    for key, value in sets.items():
        arguments += ["--set", f"{key}={value}"]
    done = run_ranks(ranks, arguments, timeout=timeout, env=env)
    if not check:
        return done, None, None
    done.check()
    with open(os.path.join(out, "outputs.jsonl")) as file:
        rows = [json.loads(line) for line in file]
    with open(os.path.join(out, "report.json")) as file:
        return done, rows, json.load(file)


def said(done) -> list[str]:
    """What the program wrote to stderr; launchers add words of their own."""
    return [line for line in done.err.splitlines() if line.startswith("hpcmoe:")]


def choices(rows) -> list[dict]:
    return [row["response"]["body"]["choices"][0] for row in rows]


