"""The order of ops and waits in a real trace of several ranks against the simulated one."""

import numpy as np

from hpcmoe.cluster.clusterfile import read_cluster
from hpcmoe.cluster.kernels import read_calibration
from hpcmoe.jobfile import read_job
from hpcmoe.report.trace import read_trace
from hpcmoe.simulate.loads import read_shares
from hpcmoe.simulate.modelfile import read_model
from hpcmoe.simulate.run import Told, simulate
from local import run_job, write_prompts
from mpi import ROOT
from tiny import VOCAB, tiny_model

LENGTHS = [(1 + 5 * i % 13, 1 + i % 4) for i in range(9)]
CLUSTER = """name = "eight"
calibration = "demo_core"
[nodes]
count = 1
ranks_per_node = 8
[rank]
memory_gib = 1.0
tflop_per_s = 0.141
[inside]
latency_us = 1.0
rank_gb_per_s = 1.0
[mpi]
message_us = 1.0
"""


def test_order_of_a_real_run_of_eight_ranks(tmp_path):
    """Two stages of two places of two tensor shards, one leader each, two lanes, a pipeline that wraps around: all kinds of ops, on all
    ranks. Of stage 0, shards but the first await what a step is, in RECV, which is not modelled."""
    tiny_model(tmp_path / "m.h5")
    write_prompts(tmp_path / "r.jsonl", [np.full(p, 3 + i) % VOCAB for i, (p, _) in enumerate(LENGTHS)], max_tokens=[n for _, n in LENGTHS],
                  ignore_eos=True)
    sets = {"layout.pp": 2, "layout.ep": 2, "layout.tp": 2, "layout.leaders": 1, "run.micro_batches": 3, "run.lanes": 2, "run.batch_tokens": 8,
            "run.prefill_chunk": 4, "run.max_sequences": 6}
    run_job(8, tmp_path, {**sets, "weights.file": tmp_path / "m.h5", "requests.file": tmp_path / "r.jsonl", "output.trace": tmp_path / "t.json"})
    (tmp_path / "c.toml").write_text(CLUSTER)
    model = read_model(str(tmp_path / "m.h5"))
    job = read_job(None, [f"{key}={value}" for key, value in sets.items()] + ["weights.file=-", "task=throughput", "output.trace=t"])
    done = simulate(Told(job, model, read_cluster(tmp_path / "c.toml", True), read_calibration(ROOT / "inputs/calibrations/demo_core.toml"), 8,
                         LENGTHS, *read_shares("uniform", model, 8), []))
    real = read_trace(tmp_path / "t.json")
    assert len(real) == len(done.records) == 8
    kinds = set()
    for record, (_, spans) in zip(sorted(done.records, key=lambda r: r.rank), real):
        told = record.stage == 0 and record.shard > 0
        ours, theirs = ([(s.kind, s.layer, s.micro, s.step, s.wait) for s in some if not (told and s.kind == "RECV" and s.wait)]
                        for some in (record.spans, _in_order(spans)))
        kinds |= {(kind, wait) for kind, *_, wait in theirs}
        assert ours == theirs, record.rank
    assert len({kind for kind, _ in kinds}) == 13


def _in_order(spans):
    """As they were recorded: a file has them by micro-batch."""
    return sorted(spans, key=lambda s: (s.start_s, s.end_s))
