"""Starts `hpcmoe run` as users do, one process or several, and reads what it wrote."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from hpcmoe.bench.timing import Deadline

ROOT = Path(__file__).resolve().parent.parent.parent
TAIL = 4000  # characters of a failed program's words


class JobFailed(Exception):
    """A started program failed; the text is its last words."""


def demo(name: str) -> Path:
    """A file of inputs/demo. JobFailed where this is no checkout of the project."""
    path = ROOT / "inputs" / "demo" / name
    if not path.exists():
        raise JobFailed(f"inputs/demo/{name} is not beside the package: run from a checkout of the project")
    return path


def start(command: list[str], deadline: Deadline, text: str | None = None) -> str:
    """Standard output of a program that must end well within the deadline. Raises JobFailed."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])))
    try:
        done = subprocess.run(command, input=text, env=env, capture_output=True, text=True, timeout=max(1.0, deadline.left()),
                              check=False)
    except subprocess.TimeoutExpired as error:
        raise JobFailed(f"{shlex.join(command[:6])} ...: not done within its time") from error
    except OSError as error:
        raise JobFailed(f"{command[0]}: {error}") from error
    if done.returncode:
        raise JobFailed(f"{shlex.join(command[:6])} ...: exit code {done.returncode}\n{(done.stdout + done.stderr)[-TAIL:].rstrip()}")
    return done.stdout


def run(folder: str | Path, sets: dict, deadline: Deadline, ranks: int = 1, mpiexec: str = "") -> tuple[dict, list[dict]]:
    """`hpcmoe run` with these settings, its output in `folder`: (report, rows of outputs.jsonl). Raises JobFailed."""
    command = [*shlex.split(mpiexec), "-n", str(ranks)] if mpiexec else []
    command += [sys.executable, "-m", "hpcmoe", "run", "--quiet", "--output", str(folder)]
    for key, value in sets.items():
        command += ["--set", f"{key}={str(value).lower() if isinstance(value, bool) else value}"]
    start(command, deadline)
    report = json.loads((Path(folder) / "report.json").read_text())
    rows = [json.loads(line) for line in (Path(folder) / "outputs.jsonl").read_text().splitlines()]
    return report, rows


def bodies(rows: list[dict]) -> list[dict]:
    """The answers of all requests. Raises JobFailed where one has none."""
    wrong = [row for row in rows if row["response"] is None]
    if wrong:
        raise JobFailed(f"{len(wrong)} of {len(rows)} requests failed, the first: {wrong[0]['error']}")
    return [row["response"]["body"] for row in rows]


def requests(path: Path, prompts: list[list[int]], **body) -> None:
    """Writes prompts of token ids as a requests file."""
    with open(path, "w", encoding="utf-8") as file:
        for i, tokens in enumerate(prompts):
            row = {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"prompt": tokens, **body}}
            file.write(json.dumps(row) + "\n")
