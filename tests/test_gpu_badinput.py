"""GPU jobs that cannot run as asked, on the CuPy look-alike: one message, exit code 2, no rank left; and memory that is
taken before a run, not in it."""

import pytest

from cudabed import bed
from local import run_job
from mpi import run_ranks
from test_gpu_engine import model_of, settings

pytestmark = pytest.mark.skipif(bool(bed.missing()), reason=bed.missing() or "-")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return settings(tmp_path_factory.mktemp("bad"), "mixtral")


def odd_heads(folder) -> dict:
    import dataclasses

    from hpcmoe.data.create import create
    model = model_of("mixtral")
    create(str(folder / "odd.h5"), dataclasses.replace(model, attention=dataclasses.replace(model.attention, head_dim=24)), dtype="fp16")
    return {"weights.file": folder / "odd.h5"}


def beyond_fp16(folder) -> dict:
    """fp32 weights with one number that fp16 does not have."""
    import h5py
    from hpcmoe.data.create import create
    from hpcmoe.data.weights_write import stamp
    path = folder / "wide.h5"
    create(str(path), model_of("mixtral"), dtype="fp32", seed=1)
    with h5py.File(path, "r+") as file:
        found = []
        file.visititems(lambda name, item: found.append(name) if name.startswith("layers/1") and name.endswith("/o") else None)
        file[found[0]][3, 4] = 1e6
    stamp(str(path))
    return {"weights.file": path, "weights.dtype": "fp16", "weights.verify": "false"}


def wide_experts(folder) -> dict:
    import dataclasses

    from hpcmoe.config import ExpertConfig
    from hpcmoe.data.create import create
    create(str(folder / "wide.h5"), dataclasses.replace(model_of("mixtral"), expert=ExpertConfig(2048)), dtype="fp16")
    return {"weights.file": folder / "wide.h5"}


CASES = {
    "no GPU": ({}, {"FAKECUDA_DEVICES": "0"}, ["run.device = 'gpu'", "no GPU"]),
    "fp32 on a GPU": ({"weights.dtype": "fp32"}, {}, ["weights.dtype", "fp32", "fp16, bf16"]),
    "capacity factor": ({"run.capacity_factor": "1.5"}, {}, ["run.capacity_factor = 1.5", "0 on a GPU"]),
    "device buffers without a CUDA-aware MPI": ({"run.transport": "pairwise"}, {}, ["run.transport", "CUDA-aware", "HPCMOE_CUDA_AWARE"]),
    "odd heads": (odd_heads, {}, ["attention.head_dim = 24", "multiple of 16"]),
    "a weight beyond fp16": (beyond_fp16, {}, ["wide.h5", "layer 1", "65504", "bf16"]),
    "no room for the weights": (wide_experts, {"FAKECUDA_TOTAL_MIB": "2"}, ["wide.h5", "GiB in fp16", "would fit", "layout.ep"]),
    "no room for buffers": ({"run.batch_tokens": 100000}, {"FAKECUDA_TOTAL_MIB": "64"}, ["out of GPU memory", "run.batch_tokens"]),
    "no room for one sequence": ({"run.memory_gb": 0.000001}, {}, ["KV cache", "one sequence of", "run.context"]),
    "pages of 20 tokens": ({"run.page_tokens": 20}, {}, ["run.page_tokens", "20", "multiple of 16"]),
    "more than all memory": ({"run.gpu_memory_fraction": 1.5}, {}, ["run.gpu_memory_fraction", "1.5"]),
    "unknown device": ({"run.device": "tpu"}, {}, ["run.device", "tpu", "auto, cpu, gpu"]),
}


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_one_message_and_exit_code_2(sets, tmp_path, name, ranks):
    more, env, words = CASES[name]
    if name.startswith("device buffers") and ranks == 1:
        pytest.skip("one rank has nobody to send to")
    more = more(tmp_path) if callable(more) else more
    done, _, _ = run_job(ranks, tmp_path, {**sets, **more}, env=bed.lookalike_env(**env), check=False, timeout=200)
    assert done.rc == 2 and done.out == "", done.err
    assert done.err.count("hpcmoe: ") == 1 and len(done.err.splitlines()) == 1, done.err
    assert all(word in done.err for word in words), done.err
    assert not list(tmp_path.glob("job-*/outputs.jsonl"))


def test_ranks_that_share_a_gpu_are_told_once_how_to_bind(sets, tmp_path):
    arguments = ["-m", "hpcmoe", "run", "--output", tmp_path / "out"] + [a for k, v in sets.items() for a in ("--set", f"{k}={v}")]
    done = run_ranks(2, arguments, env=bed.lookalike_env(), timeout=200).check()
    assert done.err.count("ranks of a node share 1 GPU") == 1 and "one rank per GPU is" in done.err, done.err


def test_auto_takes_the_cpu_where_one_rank_sees_no_gpu(sets, tmp_path):
    _, _, report = run_job(2, tmp_path, {**sets, "run.device": "auto"}, env=bed.lookalike_env(FAKECUDA_DEVICES="0"))
    assert [r["device"] for r in report["per_rank"]] == ["CPU", "CPU"] and report["run"]["gpus"] == []


@pytest.mark.parametrize("transport, ranks", [("auto", 2), ("hierarchical", 4)])
def test_no_device_memory_is_taken_during_a_run(sets, tmp_path, transport, ranks):
    """What the pool holds when the loop ends is what it held when it began. (Trials before it run the engine as well.)"""
    done = run_ranks(ranks, f"""
        import sys
        import cupy
        from hpcmoe import cli
        from hpcmoe.parallel.engine import Engine
        run, seen = Engine.run, []

        def watched(self, *args):
            pool = cupy.get_default_memory_pool()
            before = pool.used_bytes(), pool.total_bytes()
            run(self, *args)
            seen.append((before == (pool.used_bytes(), pool.total_bytes()), before))

        Engine.run = watched
        sets = {[f"{k}={v}" for k, v in (sets | {"run.transport": transport}).items()]!r}
        code = cli.main(["run", "--quiet", "--output", {str(tmp_path / 'out')!r}] + [a for s in sets for a in ("--set", s)])
        print("POOL", *seen[-1])
        sys.exit(code)
    """, env=bed.lookalike_env(PYTHONPATH=bed.lookalike_env()["PYTHONPATH"] + ":.", HPCMOE_RANKS_PER_NODE="2"), timeout=200).check()
    assert done.out.count("POOL True") == ranks, done.out


@pytest.mark.parametrize("graphs", ["false", "true"])
def test_at_most_16_launches_per_layer_in_decode(sets, tmp_path, graphs):
    """One expert per rank. Counted where they are queued: kernels, products, copies; a replayed graph is one."""
    from local import write_prompts
    write_prompts(tmp_path / "requests.jsonl", [[5], [7], [9], [11]] * 4, max_tokens=6, ignore_eos=True)
    job = {**sets, "requests.file": tmp_path / "requests.jsonl", "run.graphs": graphs}
    arguments = ["tests/programs/count_launches.py", "run", "--quiet", "--output", tmp_path / "out"]
    arguments += [a for k, v in job.items() for a in ("--set", f"{k}={v}")]
    done = run_ranks(16, arguments, env=bed.lookalike_env(PYTHONPATH=bed.lookalike_env()["PYTHONPATH"] + ":."), timeout=300).check()
    rows = {words[1]: words[2:] for line in done.out.splitlines() if (words := line.split())[:1] == ["LAUNCHES"]}
    # embedding and the copy of the step's facts stand before the first layer; staged chunks are the transport's
    own = {kind: sum(int(part.rpartition("x")[2]) for part in parts[1:] if not part.startswith(("memcpy", "embed")))
           for kind, parts in rows.items()}
    layer = sum(own[kind] for kind in ("ATTEND", "GATE", "EXPERT", "MERGE")) + 2  # own rows: a copy out and one back
    assert layer <= 16, rows
    assert (own["ATTEND"] == 1 and own["GATE"] == 1) if graphs == "true" else own["ATTEND"] > 3, rows
