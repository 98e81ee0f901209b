"""What a user gets for bad input of a run: one message, exit code 2, on any number of ranks, and no outputs."""

import json
import os
import shutil

import pytest

from local import write_prompts
from mpi import run_ranks
from test_run import make_model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    from hpcmoe.data.create import create
    folder = tmp_path_factory.mktemp("bad")
    make_model(create, folder / "model.h5")
    write_prompts(folder / "requests.jsonl", [[3, 4, 5], [6, 7]], max_tokens=4)
    return folder


def flip(path, offset_from_end: int) -> None:
    with open(path, "r+b") as file:
        file.seek(-offset_from_end, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0xFF]))


def damage_expert(path) -> None:
    """One bit of layer 2, expert 9, which only some ranks read."""
    import h5py
    with h5py.File(path) as file:
        found = []
        file.visititems(lambda name, item: found.append((name, item.id.get_offset(), item.id.get_storage_size()))
                        if hasattr(item, "shape") and "/experts" in name and name.startswith("layers/2") else None)
    name, offset, size = sorted(found)[-1]
    with open(path, "r+b") as file:
        file.seek(offset + size // 2)
        byte = file.read(1)
        file.seek(offset + size // 2)
        file.write(bytes([byte[0] ^ 1]))


CASES = {
    "no such weights": ({"weights.file": "{d}/none.h5"}, None, ["none.h5"]),
    "weights are no HDF5 file": ({"weights.file": "{d}/requests.jsonl"}, None, ["requests.jsonl", "HDF5"]),
    "weights cut short": ({}, lambda d: os.truncate(d / "model.h5", os.path.getsize(d / "model.h5") // 2), ["model.h5"]),
    "a damaged expert": ({}, lambda d: damage_expert(d / "model.h5"), ["model.h5", "checksum"]),
    "no such requests": ({"requests.file": "{d}/none.jsonl"}, None, ["none.jsonl"]),
    "no request can run": ({}, lambda d: (d / "requests.jsonl").write_text("{\n"), ["requests.jsonl", "line 1", "outputs.jsonl"]),
    "layout that does not fit": ({"layout.ep": 3}, None, ["ep=3", "does not fit", "nearest"]),
    "context beyond the model's": ({"run.context": 4000}, None, ["run.context", "4000", "128"]),
    "KV cache too large": ({"run.memory_gb": 0.00001, "run.max_sequences": 40}, None, ["KV cache", "sequences fit", "run.max_sequences"]),
    "more sequences than rows": ({"run.batch_tokens": 2, "run.max_sequences": 40}, None, ["run.max_sequences", "40", "run.batch_tokens"]),
    "bf16 where there is none": ({"weights.dtype": "bf16", "weights.backend": "numpy"}, None, ["bf16", "numpy"]),
    "fp16 on a CPU": ({"weights.dtype": "fp16"}, None, ["fp16", "fp32"]),
    "unknown backend": ({"weights.backend": "abacus"}, None, ["abacus", "onednn"]),
    "unknown key": ({"run.lines": 2}, None, ["run.lines", "lanes"]),
    "output is a file": ({"output.dir": "{d}/requests.jsonl"}, None, ["requests.jsonl"]),
    "trace cannot be written": ({"output.trace": "{d}/model.h5/trace.json"}, None, ["model.h5"]),
}


@pytest.mark.mpi
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [1, 4])
def test_one_message_and_exit_code_2(good, tmp_path, name, ranks):
    sets, prepare, words = CASES[name]
    for file in ("model.h5", "requests.jsonl"):
        shutil.copy(good / file, tmp_path / file)
    if prepare:
        prepare(tmp_path)
    values = {"weights.file": "{d}/model.h5", "requests.file": "{d}/requests.jsonl", "output.dir": "{d}/out", **sets}
    arguments = ["-m", "hpcmoe", "run", "--quiet"]
    for key, value in values.items():
        arguments += ["--set", f"{key}={str(value).format(d=tmp_path)}"]
    done = run_ranks(ranks, arguments, timeout=60)
    lines = [line for line in done.err.splitlines() if line.startswith("hpcmoe: ")]
    assert done.rc == 2, done.err
    assert len(lines) == 1 and "Traceback" not in done.err, done.err
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.mpi
def test_malformed_requests_become_error_rows_and_the_others_run(good, tmp_path):
    rows = (good / "requests.jsonl").read_text().splitlines()
    (tmp_path / "mixed.jsonl").write_text("\n".join([rows[0], "not JSON", '{"custom_id": "r0", "body": {"prompt": [3]}}', rows[1],
                                                     '{"custom_id": "x", "body": {"prompt": [99999]}}']))
    done = run_ranks(4, ["-m", "hpcmoe", "run", "--set", f"weights.file={good / 'model.h5'}", "--set",
                         f"requests.file={tmp_path / 'mixed.jsonl'}", "--output", str(tmp_path / "out")]).check()
    out = [json.loads(line) for line in (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()]
    assert [row["error"] is None for row in out] == [True, False, False, True, False]
    assert [row["error"]["line"] for row in out if row["error"]] == [2, 3, 5]
    assert "3 of 5 requests did not run" in done.err
