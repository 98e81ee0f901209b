"""The bubble of a pipeline: predicted from the schedule, measured in runs, and in closed form; prints the table of docs/overlap.md.

    python tests/benchmarks/bubble.py --repeats 3

Runs of a tiny model of 4 layers on stages of 2 ranks whose attention and experts sleep (tests/programs/sleeping.py): ranks that share
cores would otherwise give theirs to the others while they wait. As many sequences as fill the micro-batches, of 1 and of 9 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from local import write_prompts
from mpi import ROOT, run_ranks

LAYERS, EP = 4, 2


def make(folder: Path, most: int) -> None:
    """The model; for each number of micro-batches and tokens, a request per micro-batch and leader."""
    from hpcmoe.config import AttentionConfig, ExpertConfig, ModelConfig, RouterConfig
    from hpcmoe.data.create import create
    model = ModelConfig("mixtral", 61, 16, LAYERS, AttentionConfig(2, 2, 8), RouterConfig(EP, EP), ExpertConfig(8), 64)
    create(str(folder / "model.h5"), model, dtype="fp32", seed=1)
    for tokens in (1, 9):
        for micros in range(1, most + 1):
            write_prompts(folder / f"requests-{micros}-{tokens}.jsonl", [[3]] * (EP * micros), max_tokens=tokens, ignore_eos=True)


def bubble(folder: Path, pp: int, micros: int, tokens: int, sleep_s: float) -> tuple[float, float]:
    """(predicted, measured) of one run."""
    import json
    sets = {"weights.file": folder / "model.h5", "requests.file": folder / f"requests-{micros}-{tokens}.jsonl", "output.dir": folder / "out",
            "layout.pp": pp, "layout.ep": EP, "run.micro_batches": micros, "run.lanes": 1, "weights.backend": "numpy", "output.quiet": "true",
            "run.schedule": "plain"}
    arguments = [str(ROOT / "tests/programs/sleeping.py"), "run"]
    for key, value in sets.items():
        arguments += ["--set", f"{key}={value}"]
    run_ranks(pp * EP, arguments, env={"HPCMOE_TEST_SLEEP_S": str(sleep_s), "PYTHONPATH": str(ROOT)}).check()
    found = json.loads((folder / "out" / "report.json").read_text())["communication"]
    return found["bubble_predicted_share"], found["bubble_share"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", default="1,2,4")
    parser.add_argument("--micro-batches", default="1,2,3,4,6,8")
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--sleep-ms", default=20.0, type=float, help="of each attention and each expert")
    args = parser.parse_args()
    from hpcmoe.parallel.replay import Cost, bubble_share, replay
    from hpcmoe.parallel.schedule import build
    stages, micros = ([int(n) for n in text.split(",")] for text in (args.stages, args.micro_batches))
    print("| pp | micro-batches | (pp-1)/(pp-1+m) | one round: schedule | predicted | measured | 9 rounds: schedule | predicted | measured |\n" + "|---" * 9 + "|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, max(micros))
        for pp in stages:
            for m in micros:
                cells = [f"{pp}", f"{m}", f"{(pp - 1) / (pp - 1 + m):.3f}"]
                for tokens in (1, 9):
                    ideal = replay(build("plain", pp, LAYERS, m), lambda role, op: Cost(float(op.kind in ("ATTEND", "EXPERT"))), tokens)
                    runs = [bubble(folder, pp, m, tokens, args.sleep_ms / 1e3) for _ in range(args.repeats)]
                    cells += [f"{bubble_share(ideal):.3f}", *(f"{statistics.median(values):.3f}" for values in zip(*runs))]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
