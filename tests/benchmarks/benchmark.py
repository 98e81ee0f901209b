"""hpcmoe's speed beside Hugging Face transformers, the machine's peak, and the goals of a release (docs/speed.md).

Run it through run.sh, which makes the environment. It writes benchmark.json and benchmark.txt to --out.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from compare import Comparison, machine_peak, unavailable
from peers import Peers
from table import render
from whole_jobs import first_token, loading, many_ranks
from workloads import MODEL, SEED, TINY, tiny_workloads, workloads

from hpcmoe import memory
from hpcmoe.data.weights import WeightsFile
from hpcmoe.facts import version

ROOT = Path(__file__).resolve().parent.parent.parent


def main() -> int:
    args = _arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", file=sys.stderr, flush=True)

    weights = _weights(Path(args.weights) if args.weights else out / ("tiny.h5" if args.tiny else "mixtral.h5"), args.tiny, say)
    results = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "cpu": _cpu(), "cores": memory.cores(),
               "ranks": args.ranks, "versions": {n: version(n) for n in ("hpcmoe", "numpy", "onednn-cpu-gomp", "transformers", "torch")},
               "python": platform.python_version(), "busy_before": _busy(), "model": TINY if args.tiny else MODEL, "dtypes": {}, "jobs": {}}
    if results["busy_before"] > 0.05:
        say(f"other programs take {results['busy_before']:.0%} of the cores: figures will be too low")
    wanted = args.parts.split(",")
    if "model" in wanted:
        _compare(args, weights, results, say)
    if "load" in wanted:
        results["jobs"]["loading"] = loading(weights, out / "job", args.ranks, args.repetitions, say)
    if "start" in wanted:
        results["jobs"]["first_token"] = first_token(Path(args.small_model), out / "job", 16, args.repetitions, say)
    if "ranks" in wanted:
        results["jobs"]["many_ranks"] = many_ranks(Path(args.small_model), out / "job", 64, 64, say)
    text = render(results)
    (out / "benchmark.json").write_text(json.dumps(results, indent=1, default=_plain) + "\n")
    (out / "benchmark.txt").write_text(text)
    print(text)
    return 0


def _compare(args, weights: Path, results: dict, say) -> None:
    """Fills results["dtypes"]."""
    with WeightsFile(weights) as file:
        model = file.config
    chosen = tiny_workloads() if args.tiny else workloads(args.prompt)
    chosen = [w for w in chosen if args.only in w.name]
    context = max(w.context(args.repetitions) for w in chosen)
    for dtype in args.dtypes.split(","):
        reason = unavailable(dtype)
        if reason:
            results["dtypes"][dtype] = {"reason": reason}
            say(f"{dtype}: not measured: {reason}")
            continue
        with Peers(weights, args.ranks, context, not args.without_transformers, memory.cores()) as peers:
            names = []
            if peers.hf:
                about = peers.ask(peers.hf, "load", dtype, memory.cores())
                names = about["implementations"]
                say(f"{dtype}: transformers {about['transformers']} with torch {about['torch']} has the weights")
            part = results["dtypes"][dtype] = {"peak": machine_peak(peers, dtype, 0.2 if args.tiny else 2.0), "workloads": []}
            say(f"{dtype}: peak {part['peak']}")
            comparison = Comparison(peers, model, dtype, args.repetitions, part["peak"], say)
            comparison.names = names
            for w in chosen:
                part["workloads"].append(comparison.run(w))


def _weights(path: Path, tiny: bool, say) -> Path:
    """The file of random weights, made unless it is there."""
    if not path.exists():
        say(f"making {path}")
        options = [part for name, value in (TINY if tiny else MODEL).items() for part in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "-m", "hpcmoe", "weights", "create", str(path), "--dtype", "fp32", "--quiet",
                        "--seed", str(SEED), *options], check=True, cwd=ROOT)
    return path.resolve()


def _cpu() -> str:
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    return f"{facts.get('model name', platform.machine())} (family {facts.get('cpu family', '-')}, model {facts.get('model', '-')})"


def _busy(seconds: float = 2.0) -> float:
    """Share of the cores' time that other programs (or other guests of the host) take, while this one sleeps."""
    def times() -> list[int]:
        return [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    before = times()
    time.sleep(seconds)
    spent = [b - a for a, b in zip(before, times())]
    return 1 - (spent[3] + spent[4]) / max(1, sum(spent))  # idle, and waiting for a disk


def _plain(value):
    return value.tolist()


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog="example: bash tests/benchmarks/run.sh --repetitions 3 --parts model,load")
    p.add_argument("--out", default="hpcmoe-out/benchmark", help="folder for weights and results (default %(default)s)")
    p.add_argument("--weights", help="weights file to use (default: made in --out, 2.9 GB)")
    p.add_argument("--small-model", default=str(ROOT / "inputs/demo/model.h5"), help="model of the start-up and 64-rank jobs")
    p.add_argument("--parts", default="model,load,start,ranks", help="which of model, load, start, ranks (default: all)")
    p.add_argument("--dtypes", default="fp32,bf16", help="data types to compare in (default %(default)s)")
    p.add_argument("--only", default="", help="only workloads whose name contains this text")
    p.add_argument("--prompt", type=int, default=32, help="tokens before decoding (default %(default)s)")
    p.add_argument("--repetitions", type=int, default=5, help="turns of each program (default %(default)s)")
    p.add_argument("--ranks", type=int, default=2, help="ranks of hpcmoe, one thread each (default %(default)s)")
    p.add_argument("--without-transformers", action="store_true", help="hpcmoe alone")
    p.add_argument("--tiny", action="store_true", help="a small model, to try the program")
    return p.parse_args()


if __name__ == "__main__":
    sys.exit(main())
