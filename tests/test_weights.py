"""The weights file: what is written is read, a rank reads its own only, damage is named."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from hpcmoe.config import to_dict
from hpcmoe.data import schema
from hpcmoe.data.create import create
from hpcmoe.data.weights import WeightsFile
from hpcmoe.data.weights_check import as_json, describe, verify
from hpcmoe.data.weights_write import Header, WeightsWriter, stamp
from hpcmoe.errors import UserError
from hpcmoe.model.dtypes import STORED, from_fp32, to_fp32
from hpcmoe.model.families import random_config
from hpcmoe.model.tensors import dense_shapes, expert_shapes, parameters, top_shapes

SMALL = dict(layers=3, d=40, f=24, experts=5, top_k=3, heads=5, kv_heads=1, head_dim=6, vocab=97,
             context=64, tied=False)


def small(family="qwen3_moe", **changes):
    return random_config(family, **{**SMALL, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("w") / "w.h5")
    create(path, small(), "fp32", seed=3)
    return path


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copy(made, tmp_path / "copy.h5")


# ---------------------------------------------------------------- storage types
def test_bf16_is_the_nearest_value_ties_to_even():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(2000) * 10.0 ** rng.integers(-30, 30, 2000), [0.0, -0.0]])
    x = x.astype(np.float32)
    bits = from_fp32(x, "bf16")
    below = np.abs(x).view(np.uint32) >> 16
    for value, got in zip(np.abs(x), np.abs(to_fp32(bits))):
        low = (np.float32(value).view(np.uint32) >> 16).astype(np.uint16)
        both = [np.float64(to_fp32(np.array([b], np.uint16))[0]) for b in (low, low + 1)]
        assert abs(np.float64(got) - value) <= min(abs(b - value) for b in both)
    assert below.max() < 0x7F80
    # 1 + 2^-8 lies half-way between two bf16 values: the even one is 1; 1 + 3 * 2^-8 goes up.
    ties = np.array([1 + 2.0 ** -8, 1 + 3 * 2.0 ** -8], np.float32)
    assert to_fp32(from_fp32(ties, "bf16")).tolist() == [1.0, 1 + 2.0 ** -6]


def test_every_bf16_and_fp16_value_survives_widening():
    bits = np.arange(65536, dtype=np.uint16)
    wide = to_fp32(bits)
    back = from_fp32(wide, "bf16")
    nan = np.isnan(wide)
    assert np.array_equal(back[~nan], bits[~nan])
    assert np.isnan(to_fp32(back[nan])).all()
    half = bits.view(np.float16)
    keep = ~np.isnan(half)
    assert np.array_equal(from_fp32(to_fp32(half), "fp16")[keep], half[keep])


# ---------------------------------------------------------------- create, read
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family,tied", [("mixtral", True), ("olmoe", False), ("phimoe", False)])
def test_created_file_has_every_tensor(tmp_path, dtype, family, tied):
    changes = {"top_k": 2, "tied": tied} | ({"head_dim": 8} if family == "olmoe" else {})
    config = small(family, **changes)
    path = str(tmp_path / "w.h5")
    size = create(path, config, dtype, seed=1)
    assert not os.path.exists(path + ".part")
    with WeightsFile(path, verify=True) as file:
        assert file.config == config and file.dtype == dtype
        seen = 0
        for layer in range(config.layers):
            dense = file.dense(layer)
            assert {n: a.shape for n, a in dense.items()} == dense_shapes(config)
            for e in range(config.router.experts):
                expert = file.expert(layer, e)
                assert {n: a.shape for n, a in expert.items()} == expert_shapes(config)
                assert file.expert_nbytes(layer, e) == sum(a.nbytes for a in expert.values())
                seen += file.expert_nbytes(layer, e)
            assert file.dense_nbytes(layer) == sum(a.nbytes for a in dense.values())
            seen += file.dense_nbytes(layer)
        for name, shape in top_shapes(config).items():
            assert file.top(name).shape == shape
            seen += file.top_nbytes(name)
        assert seen == file.bytes_read == size == parameters(config) * STORED[dtype].itemsize
        assert ("head" in top_shapes(config)) != tied
        assert np.array_equal(to_fp32(dense["attn_norm"]), np.ones(config.d, np.float32))
    assert verify(path) == []


def test_random_values_are_scaled_differ_and_follow_the_seed(tmp_path):
    config = small(d=256, f=512, layers=1)
    paths = [str(tmp_path / f"{i}.h5") for i in range(3)]
    for path, seed in zip(paths, (1, 1, 2)):
        create(path, config, "fp32", seed)
    files = [WeightsFile(path) for path in paths]
    up = [f.expert(0, 0)["up"] for f in files]
    assert np.array_equal(up[0], up[1]) and not np.array_equal(up[0], up[2])
    assert not np.array_equal(up[0], files[0].expert(0, 1)["up"])
    assert up[0].std() == pytest.approx(256 ** -0.5, rel=0.05)
    assert files[0].expert(0, 0)["down"].std() == pytest.approx(512 ** -0.5, rel=0.05)
    # Rows that repeat would make the matrix singular.
    assert np.linalg.matrix_rank(up[0]) == 256


def test_an_expert_is_one_range_of_whole_pages_of_its_own(made):
    with WeightsFile(made) as file, h5py.File(made, "r", locking=False) as plain:
        dataset = plain["layers/1/experts"]
        assert dataset.chunks is None and dataset.compression is None
        assert dataset.id.get_offset() % schema.ALIGN == 0
        assert dataset.shape[1] * 4 % schema.ALIGN == 0
        for e in range(5):
            expert = file.expert(1, e)
            flat = np.concatenate([expert[name].ravel() for name in ("gate", "up", "down")])
            assert np.array_equal(dataset[e, :len(flat)], flat)
            start = expert["gate"].__array_interface__["data"][0]
            assert expert["up"].__array_interface__["data"][0] == start + expert["gate"].nbytes
            assert expert["down"].__array_interface__["data"][0] == start + 2 * expert["gate"].nbytes
            assert start % 64 == 0


def test_arrays_are_aligned_read_only_and_outlive_the_file(made):
    with WeightsFile(made) as file:
        arrays = [*file.dense(0).values(), *file.expert(0, 4).values(), file.top("embed"), file.top("norm")]
    for array in arrays:
        assert array.__array_interface__["data"][0] % 4 == 0 and not array.flags.writeable
        with pytest.raises(ValueError):
            array[...] = 0
        assert np.isfinite(array).all()


def test_bytes_read_counts_what_is_handed_out_and_no_other_expert_is_touched(copy):
    """Every other expert of the file is destroyed: reading one's own, verified, does not notice."""
    with h5py.File(copy, "r+") as file:
        for layer in range(3):
            keep = file[f"layers/{layer}/experts"][2]
            file[f"layers/{layer}/experts"][...] = np.nan
            file[f"layers/{layer}/experts"][2] = keep
    with WeightsFile(copy, verify=True) as file:
        assert file.bytes_read == 0
        for layer in range(3):
            assert np.isfinite(file.expert(layer, 2)["down"]).all()
        assert file.bytes_read == 3 * 3 * 24 * 40 * 4
        with pytest.raises(UserError, match="layers/0/experts/1: checksum"):
            file.expert(0, 1)


# ---------------------------------------------------------------- damage, by name
def refused(path, *words, read=False):
    with pytest.raises(UserError) as caught:
        with WeightsFile(path) as file:
            if read:
                for unit in schema.units(file.config):
                    file.unit(unit)
    for word in (str(path), *words):
        assert word in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


def test_no_such_file_folder_or_hdf5(tmp_path):
    refused(tmp_path / "none.h5", "no such file")
    refused(tmp_path, "a folder")
    other = tmp_path / "text.h5"
    other.write_text("not HDF5")
    refused(other, "not an HDF5 file")
    other.write_bytes(b"")
    refused(other, "not an HDF5 file")
    with h5py.File(other, "w") as file:
        file["x"] = 1
    refused(other, "an HDF5 file, but not one of model weights")


def test_damaged_structure(copy):
    with open(copy, "r+b") as file:
        file.seek(5000)
        file.write(b"\x07")
    refused(copy, "damaged: checksum of its structure", "expected")
    with open(copy, "r+b") as file:
        file.seek(30)
        file.write(b"x")
    refused(copy, "damaged: its first 4096 bytes")


def test_truncated(copy):
    os.truncate(copy, os.path.getsize(copy) - 1)
    refused(copy, "truncated")


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 0.999))
def test_truncated_anywhere(made, tmp_path_factory, share):
    path = tmp_path_factory.mktemp("t") / "cut.h5"
    shutil.copy(made, path)
    os.truncate(path, int(os.path.getsize(path) * share))
    refused(path)


@contextlib.contextmanager
def edited(path):
    """The file open for changes of its structure, which is stamped as sound afterwards."""
    with h5py.File(path, "r+") as file:
        yield file
    stamp(path)


def change(path, name, value):
    with edited(path) as file:
        file.attrs[name] = np.bytes_(value) if isinstance(value, str) else value


def test_wrong_version_dtype_and_config(copy):
    with open(copy, "r+b") as file:
        file.write(b"hpcmoe weights 2\n")
    refused(copy, "schema version 2", "reads version 1")
    stamp(copy)
    change(copy, "version", 3)
    refused(copy, "schema version 3", "reads version 1")
    change(copy, "version", 1)
    change(copy, "dtype", "fp8")
    refused(copy, "dtype = 'fp8'", "expected one of fp16, bf16, fp32")
    change(copy, "dtype", "fp32")
    good = to_dict(small())
    for field, value, words in (("config", "{", ["attribute config is not JSON"]),
                                ("config", "[1]", ["expected a JSON object"]),
                                ("config", json.dumps({**good, "wide": 1}), ["config.wide", "one of the keys"]),
                                ("config", json.dumps({**good, "d": "40"}), ["config.d", "an integer"]),
                                ("config", json.dumps({**good, "norm": "batch"}), ["norm", "rms, layer"])):
        change(copy, field, value)
        refused(copy, *words)


def test_config_that_does_not_match_the_weights(copy):
    change(copy, "config", json.dumps({**to_dict(small()), "vocab": 98}))
    refused(copy, "embed: shape [97, 40]: expected [98, 40]", read=True)
    wider = to_dict(small())
    wider["expert"]["f"] = 400
    change(copy, "config", json.dumps(wider))
    refused(copy, "layers/0/experts: shape", "by the file's configuration", read=True)
    change(copy, "config", json.dumps({**to_dict(small()), "layers": 4}))
    refused(copy, "tensor layers/3 is missing")


def test_missing_tensors(copy):
    with edited(copy) as file:
        del file["layers/1/k_norm"]
    refused(copy, "tensor layers/1/k_norm is missing")
    with edited(copy) as file:
        del file["head"]
    refused(copy, "tensor head is missing")


def test_other_layout_of_a_dataset(copy):
    with edited(copy) as file:
        data = file["embed"][...]
        del file["embed"]
        file.create_dataset("embed", data=data, compression="gzip")
    refused(copy, "embed: expected a contiguous dataset", read=True)
    with edited(copy) as file:
        del file["embed"]
        file["embed"] = data.astype(np.float64)
    refused(copy, "embed: expected a dataset of fp32, fp16 or bf16", read=True)


def test_verify_names_checksums_nan_and_shapes(copy):
    with h5py.File(copy, "r+") as file:
        row = [n.decode() for n in file["checksums"]["name"]].index("layers/2/v")
        file["layers/2/v"][0, 0] += 1
    assert [line.split(": ")[1:3] for line in verify(copy)] == [
        ["layers/2/v", "checksum " + line.split("checksum ")[1].split(":")[0]] for line in verify(copy)]
    assert len(verify(copy)) == 1
    with WeightsFile(copy, verify=True) as file:
        file.dense(1)
        with pytest.raises(UserError, match="layers/2/v: checksum .*expected"):
            file.dense(2)
    # NaN with a right checksum: as a broken training run would save it.
    import xxhash
    with h5py.File(copy, "r+") as file:
        file["layers/2/v"][1, 3] = np.nan
        file["layers/2/v"][0, 1] = np.inf
        table = file["checksums"][...]
        table["xxh3_64"][row] = xxhash.xxh3_64_intdigest(file["layers/2/v"][...].tobytes())
        file["checksums"][...] = table
    problems = verify(copy)
    assert len(problems) == 2
    assert "layers/2/v: 1 of 240 values are NaN" in problems[0]
    assert "layers/2/v: 1 of 240 values are infinite" in problems[1]


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_damage_gives_arrays_or_one_message(made, tmp_path_factory, data):
    """Random bytes are overwritten: where they are structure, the file is refused; values are values."""
    path = tmp_path_factory.mktemp("f") / "f.h5"
    with open(made, "rb") as file:
        raw = bytearray(file.read())
    with h5py.File(made, "r", locking=False) as file:
        first = min(file[name].id.get_offset() for name in ("embed", "checksums", "layers/0/q", "complete"))
    whole = bytes(raw)
    for _ in range(data.draw(st.integers(1, 20))):
        place = data.draw(st.one_of(st.integers(0, first - 1), st.integers(0, len(raw) - 1)))
        raw[place] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        with WeightsFile(path) as file:
            for unit in schema.units(file.config):
                file.unit(unit)
        verify(str(path))
        assert raw[schema.STAMP_SIZE:first] == whole[schema.STAMP_SIZE:first]
    except UserError as error:
        assert str(path) in str(error)


# ---------------------------------------------------------------- cut and continued
CUT = """
import os, signal, sys
from hpcmoe.data.create import create
from hpcmoe.model.families import random_config
def progress(done, total, name):
    if name == "layers/1/experts/2":
        os.kill(os.getpid(), signal.SIGKILL)
create(sys.argv[1], random_config("qwen3_moe", **{settings}), "fp32", 3, progress)
"""


def test_a_killed_writer_is_continued(made, tmp_path):
    path = str(tmp_path / "w.h5")
    cut = subprocess.run([sys.executable, "-c", CUT.replace("{settings}", repr(SMALL)), path])
    assert cut.returncode == -signal.SIGKILL
    assert not os.path.exists(path) and os.path.exists(path + ".part")
    refused(path + ".part", "unfinished")
    header = Header(small(), "fp32", fingerprint="random 3")
    with WeightsWriter(path, header) as writer:
        names = [unit.name for _, unit in writer.pending()]
        assert writer.resumed and writer.restarted == ""
        assert "layers/1/experts/2" not in names and "layers/1/experts/3" in names
    # A tensor that was damaged meanwhile is written again.
    with h5py.File(path + ".part", "r+") as file:
        file["embed"][0, 0] = 7.0
    create(path, small(), "fp32", 3)
    assert verify(path) == []
    with WeightsFile(path) as file, WeightsFile(made) as whole:
        for unit in schema.units(file.config):
            a, b = file.unit(unit), whole.unit(unit)
            assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_part_file_of_something_else_is_not_continued(tmp_path):
    path = str(tmp_path / "w.h5")
    with WeightsWriter(path, Header(small(), "fp32", fingerprint="random 3")) as writer:
        row, unit = writer.pending()[0]
        writer.write(row, [np.zeros(unit.elements, np.float32)])
    with WeightsWriter(path, Header(small(), "fp32", fingerprint="random 4")) as writer:
        assert writer.resumed == 0 and "another model or conversion" in writer.restarted
        row, unit = writer.pending()[0]
        writer.write(row, [np.zeros(unit.elements, np.float32)])
    with open(path + ".part", "r+b") as file:
        file.seek(schema.STAMP_SIZE)
        file.write(b"damage")
    with WeightsWriter(path, Header(small(), "fp32", fingerprint="random 4")) as writer:
        assert writer.resumed == 0 and "not usable" in writer.restarted


def test_two_writers_of_one_file(tmp_path):
    path = str(tmp_path / "w.h5")
    header = Header(small(), "fp32")
    with WeightsWriter(path, header):
        with pytest.raises(UserError, match="another process is writing"):
            WeightsWriter(path, header)


def test_an_output_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="cannot write: No such file or directory"):
        create(str(tmp_path / "nowhere" / "w.h5"), small(), "fp32")


# ---------------------------------------------------------------- commands
def command(*args):
    return subprocess.run([sys.executable, "-m", "hpcmoe", "weights", *map(str, args)],
                          capture_output=True, text=True)


def test_inspect_lists_tensors_and_what_a_rank_reads(made):
    text = "\n".join(describe(made))
    for word in ("qwen3_moe", "[97, 40]", "layers/*/experts/*/down", "[40, 24]", "11.52 kB", "ep=5"):
        assert word in text, text
    data = json.loads(as_json(made))
    assert data["expert_bytes"] == 3 * 24 * 40 * 4 and data["parameters"] == parameters(small())


def test_commands_and_exit_codes(tmp_path):
    path = tmp_path / "w.h5"
    geometry = "--layers 2 --d 32 --f 16 --experts 4 --heads 4 --kv-heads 2 --vocab 64 --dtype bf16".split()
    made = command("create", path, *geometry)
    assert made.returncode == 0 and "random bf16 weights" in made.stdout, made.stderr
    again = command("create", path, *geometry)
    assert again.returncode == 2 and "exists already" in again.stderr
    assert command("create", path, *geometry, "--force", "--quiet").stdout == ""
    good = command("verify", path)
    assert good.returncode == 0 and "sound" in good.stdout
    assert "mixtral" in command("inspect", path).stdout
    with h5py.File(path, "r+") as file:
        file["embed"][0, 0] = 1
    bad = command("verify", path)
    assert bad.returncode == 2 and "embed: checksum" in bad.stderr and "Traceback" not in bad.stderr
    wrong = command("create", tmp_path / "x.h5", *geometry, "--kv-heads", "3")
    assert wrong.returncode == 2 and "attention.kv_heads = 3" in wrong.stderr
    assert not list(tmp_path.glob("x.h5*"))
    missing = command("inspect", tmp_path / "none.h5")
    assert missing.returncode == 2 and "no such file" in missing.stderr and "Traceback" not in missing.stderr


@pytest.mark.parametrize("name", ["convert", "inspect", "verify", "create"])
def test_help_has_an_example(name):
    shown = command(name, "--help")
    assert shown.returncode == 0 and f"hpcmoe weights {name}" in shown.stdout.split("example")[1]
