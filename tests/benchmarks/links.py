"""Exchange times on hosts with shaped links beside what the simulator's network model says of them from a link file.

    python tests/benchmarks/links.py --bed ../shared/testbed/netns/cluster.sh --hosts 2,4 --rate-mbit 200 --delay-ms 1

For each number of hosts the bed is brought up, `hpcmoe calibrate links` measures pings between hosts and exchanges within one, and a layer's
exchanges (counts, dispatch, experts that cost nothing, combine, merge) are timed on --ranks of each by every transport (parallel/trial.py),
median of the slowest rank. Predictions are made from the link file that was measured, and from one that has the bed's own shaping numbers
for what passes between hosts. Nothing is fitted to the exchanges.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
PAYLOAD = 0.94     # of an Ethernet frame of 1,538 bytes on the wire: 1,448 bytes of TCP
SWITCH_US = 75.0   # the bed's user-space switch adds 50 to 100 us (its README)
CALIBRATION = ROOT / "inputs" / "calibrations" / "demo_core.toml"  # its ops' times are taken off where the engine's are measured
TRANSPORTS = ("ialltoallv", "pairwise", "hierarchical")


# ---------------------------------------------------------------- on the ranks
def measure(args) -> None:
    from mpi4py import MPI

    from hpcmoe import memory
    from hpcmoe.compute.madeup import MadeUpRows
    from hpcmoe.config import RouterConfig
    from hpcmoe.parallel.layout import Layout
    from hpcmoe.parallel.trial import Trial
    from hpcmoe.parallel.world import World, node_names
    comm, found = MPI.COMM_WORLD, []
    world = World(comm, Layout(1, 1, comm.size), 1, node_names(comm))
    experts = list(world.layout.slots_of(world.here.place, args.experts))
    for top_k in args.top_k:
        for count in args.rows:
            router = RouterConfig(args.experts, top_k)
            rows = MadeUpRows(router, args.d, 4 * args.d, count, experts, 1 + comm.rank)
            trial = Trial(world, router, rows, TRANSPORTS, comm.size > memory.cores())
            seconds = trial.medians(args.repeats, float("inf"))
            sent = {name: int(comm.allreduce(sum(trial.records[name].bytes_inter.values()))) // args.repeats for name in TRANSPORTS}
            trial.close()
            choices = comm.gather(rows.expert_tk.tolist())
            found.append({"top_k": top_k, "rows": count, "choices": choices, "seconds": seconds, "bytes_between": sent})
    if comm.rank == 0:
        Path(args.measure).write_text(json.dumps({"node_of_rank": world.node_of_rank, "owner_e": list(world.layout.owner_of_slot(args.experts)),
                                                  "cases": found}))


# ---------------------------------------------------------------- around the bed
class Bed:
    """The hosts: cluster.sh of the test bed."""

    def __init__(self, script: str):
        self.script, self.env = script, dict(os.environ, CLUSTER_NAME=f"l{os.getpid() % 10**6}", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1",
                                             OPENBLAS_NUM_THREADS="1")

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run([self.script, *arguments], env=self.env, capture_output=True, text=True, timeout=400, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def run(self, ranks: int, *arguments: str) -> str:
        mpiexec = Path(sys.prefix, "bin", "mpiexec")
        return self("run", str(ranks), "--timeout", "300", "--mpiexec", str(mpiexec), sys.executable, *arguments)


def shaped(measured: str, rate_mbit: float, delay_ms: float) -> str:
    """The link file that was measured, with the bed's own numbers between hosts."""
    wanted = {"bandwidth_gb_per_s": f"{rate_mbit / 8e3}\nefficiency = {PAYLOAD}", "latency_us": str(1e3 * delay_ms + SWITCH_US),
              "announce_us": str(2e3 * delay_ms)}
    head, between, rest = re.split(r"(?m)^(\[nic\]\n(?:.+\n)+)", measured)
    for key, value in wanted.items():
        between = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", between)
    return head + between + rest


def predict(links: dict[str, Path], measured: dict, d: int) -> list[dict]:
    """Every case and transport: measured ms, and bytes between nodes; predicted ones from each of the link files."""
    from hpcmoe.cluster.clusterfile import read_cluster
    from hpcmoe.cluster.layer import between_bytes, flat_layer, hierarchical_layer
    from hpcmoe.cluster.network import Network
    networks, found = {name: Network(read_cluster(path), measured["node_of_rank"]) for name, path in links.items()}, []
    for case in measured["cases"]:
        choices = [np.array(tk) for tk in case["choices"]]
        for name in TRANSPORTS:
            layer = hierarchical_layer if name == "hierarchical" else flat_layer
            row = {"hosts": len(set(measured["node_of_rank"])), "top_k": case["top_k"], "rows": case["rows"], "transport": name,
                   "measured_ms": 1e3 * case["seconds"][name], "bytes_between": case["bytes_between"][name]}
            for links_name, network in networks.items():
                exchanges = layer(network, choices, measured["owner_e"], 4.0 * d, 4.0 * d)
                row |= {links_name: 1e3 * sum(map(network.seconds, exchanges)), "bytes_between_predicted": between_bytes(network, exchanges)}
            found.append(row)
    return found


def compare(bed: Bed, args) -> list[dict]:
    found, options = [], [f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in (
        ("rows", args.rows), ("top-k", args.top_k), ("experts", args.experts), ("d", args.d), ("repeats", args.repeats))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for hosts in args.hosts:
            bed("up", str(hosts), "--rate", f"{args.rate_mbit:g}mbit", "--delay", f"{args.delay_ms:g}ms")
            try:
                bed.run(args.ranks, "-m", "hpcmoe", "calibrate", "links", "--calibration", str(CALIBRATION), "--output", str(folder / "measured.toml"),
                        "--ranks-per-node", str(args.ranks))
                bed.run(args.ranks, "-m", "mpi4py", str(Path(__file__).resolve()), "--measure", str(folder / "measured.json"), *options)
            finally:
                bed("down")
            text = (folder / "measured.toml").read_text()
            (folder / "shaped.toml").write_text(shaped(text, args.rate_mbit, args.delay_ms))
            print(f"# {hosts} hosts: " + " ".join(re.findall(r"(?m)^\w+_(?:us|gb_per_s) = .*$", text)), file=sys.stderr)
            found += predict({"shaped": folder / "shaped.toml", "measured": folder / "measured.toml"}, json.loads((folder / "measured.json").read_text()), args.d)
    return found


def error(row: dict, links: str) -> float:
    return row[links] / row["measured_ms"] - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = dict(type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--bed", help="cluster.sh of the test bed")
    parser.add_argument("--hosts", default=[2, 4], **numbers)
    parser.add_argument("--ranks", default=2, type=int, help="on each host")
    parser.add_argument("--rate-mbit", default=200.0, type=float)
    parser.add_argument("--delay-ms", default=1.0, type=float)
    parser.add_argument("--rows", default=[16, 64], help="of a leader", **numbers)
    parser.add_argument("--top-k", default=[2, 8], **numbers)
    parser.add_argument("--experts", default=16, type=int)
    parser.add_argument("--d", default=1024, type=int, help="width of a row, fp32")
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--out", help="write the figures as JSON")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args)
        return 0
    if not args.bed:
        parser.error("--bed is missing: cluster.sh of the test bed")
    found = compare(Bed(args.bed), args)
    print(f"{args.ranks} ranks on each host, {args.rate_mbit:g} Mbit/s, {args.delay_ms:g} ms, {args.experts} experts, rows of {4 * args.d} bytes; ms of a layer's "
          f"exchanges, predicted from the shaping numbers and from links that were measured; load average {os.getloadavg()[0]:.1f}\n"
          f"hosts  top-k   rows  {'transport':<14} measured  by shaping    error    by links    error  MB between  predicted")
    for f in found:
        print(f"{f['hosts']:5d}{f['top_k']:7d}{f['rows']:7d}  {f['transport']:<14}{f['measured_ms']:9.1f}"
              + "".join(f"{f[name]:12.1f}{100 * error(f, name):+8.1f}%" for name in ("shaped", "measured"))
              + f"{f['bytes_between'] / 1e6:12.3f}{f['bytes_between_predicted'] / 1e6:11.3f}", flush=True)
    for links in ("shaped", "measured"):
        means = {name: np.mean([abs(error(f, links)) for f in found if f["transport"] == name]) for name in TRANSPORTS}
        print(f"mean absolute error, links {links}: " + ", ".join(f"{name} {100 * e:.1f} %" for name, e in means.items()))
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
