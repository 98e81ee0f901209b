"""Exchange times on hosts with shaped links beside what the simulator's network model says of them from a link file.

    python tests/benchmarks/links.py --bed ../shared/testbed/netns/cluster.sh --hosts 2,4 --rate-mbit 200 --delay-ms 1

For each number of hosts the bed is brought up, and a layer's exchanges (counts, dispatch, experts that cost nothing, combine, merge) are
timed on --ranks of each by every transport (parallel/trial.py), median of the slowest rank. The link file has the bed's own numbers, and
of what passes inside a host those that were measured there with the links unused (calibrate links). Nothing is fitted to the times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
PAYLOAD = 0.94     # of an Ethernet frame of 1,538 bytes on the wire: 1,448 bytes of TCP
SWITCH_US = 75.0   # the bed's user-space switch adds 50 to 100 us (its README)
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
        return self("run", str(ranks), "--timeout", "300", "--mpiexec", str(mpiexec), sys.executable, "-m", "mpi4py", *arguments)


def link_file(path: Path, hosts: int, ranks: int, rate_mbit: float, delay_ms: float, inside: dict) -> None:
    """The bed as a cluster file."""
    path.write_text(f"""name = "{hosts} hosts, {rate_mbit:g} Mbit/s, {delay_ms:g} ms"
[nodes]
count = {hosts}
ranks_per_node = {ranks}
[rank]
memory_gib = 1.0
tflop_per_s = 0.1
[inside]
rank_gb_per_s = {inside["rank_gb_per_s"]}
latency_us = {inside["latency_us"]}
[nic]
bandwidth_gb_per_s = {rate_mbit / 8e3}
efficiency = {PAYLOAD}
latency_us = {1e3 * delay_ms + SWITCH_US}
[mpi]
message_us = {inside["message_us"]}
exchange_us = {inside["exchange_us"]}
""")


def predict(cluster: Path, measured: dict, d: int) -> list[dict]:
    """Every case and transport: measured and predicted ms, and bytes between nodes."""
    from hpcmoe.cluster.clusterfile import read_cluster
    from hpcmoe.cluster.layer import between_bytes, flat_layer, hierarchical_layer
    from hpcmoe.cluster.network import Network
    network, found = Network(read_cluster(cluster), measured["node_of_rank"]), []
    for case in measured["cases"]:
        choices = [np.array(tk) for tk in case["choices"]]
        for name in TRANSPORTS:
            exchanges = (hierarchical_layer if name == "hierarchical" else flat_layer)(network, choices, measured["owner_e"], 4.0 * d, 4.0 * d)
            found.append({"hosts": len(set(measured["node_of_rank"])), "top_k": case["top_k"], "rows": case["rows"], "transport": name,
                          "measured_ms": 1e3 * case["seconds"][name], "predicted_ms": 1e3 * sum(map(network.seconds, exchanges)),
                          "bytes_between": case["bytes_between"][name], "bytes_between_predicted": between_bytes(network, exchanges)})
    return found


def compare(bed: Bed, args, inside: dict) -> list[dict]:
    found, options = [], [f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}" for name, value in (
        ("rows", args.rows), ("top-k", args.top_k), ("experts", args.experts), ("d", args.d), ("repeats", args.repeats))]
    with tempfile.TemporaryDirectory() as folder:
        for hosts in args.hosts:
            bed("up", str(hosts), "--rate", f"{args.rate_mbit:g}mbit", "--delay", f"{args.delay_ms:g}ms")
            try:
                out = Path(folder, "measured.json")
                bed.run(args.ranks, str(Path(__file__).resolve()), "--measure", str(out), *options)
            finally:
                bed("down")
            cluster = Path(folder, "links.toml")
            link_file(cluster, hosts, args.ranks, args.rate_mbit, args.delay_ms, inside)
            found += predict(cluster, json.loads(out.read_text()), args.d)
    return found


INSIDE = {"rank_gb_per_s": 2.5, "latency_us": 5.0, "message_us": 1.1, "exchange_us": 37.0}  # calibrate links, 2 ranks of a 2-core machine


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
    found = compare(Bed(args.bed), args, INSIDE)
    print(f"{args.ranks} ranks on each host, {args.rate_mbit:g} Mbit/s, {args.delay_ms:g} ms, {args.experts} experts, rows of {4 * args.d} bytes; ms of a layer's "
          f"exchanges; load average {os.getloadavg()[0]:.1f}\nhosts  top-k   rows  {'transport':<14} measured  predicted    error  MB between  predicted")
    for f in found:
        print(f"{f['hosts']:5d}{f['top_k']:7d}{f['rows']:7d}  {f['transport']:<14}{f['measured_ms']:9.1f}{f['predicted_ms']:11.1f}"
              f"{100 * (f['predicted_ms'] / f['measured_ms'] - 1):+8.1f}%{f['bytes_between'] / 1e6:12.3f}{f['bytes_between_predicted'] / 1e6:11.3f}", flush=True)
    errors = {name: float(np.mean([abs(f["predicted_ms"] / f["measured_ms"] - 1) for f in found if f["transport"] == name])) for name in TRANSPORTS}
    print("mean absolute error: " + ", ".join(f"{name} {100 * e:.1f} %" for name, e in errors.items()))
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
