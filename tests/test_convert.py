"""Conversion of Hugging Face checkpoints, compared with what the safetensors library reads."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from safetensors.numpy import load_file, save_file

from hpcmoe.data import schema
from hpcmoe.data.checkpoint import Checkpoint
from hpcmoe.data.convert import convert
from hpcmoe.data.weights import WeightsFile
from hpcmoe.data.weights_check import verify
from hpcmoe.errors import UserError
from hpcmoe.model.dtypes import from_fp32, to_fp32
from parity import cases

CONFIG = {"model_type": "mixtral", "vocab_size": 31, "hidden_size": 12, "intermediate_size": 10,
          "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "num_local_experts": 5,
          "num_experts_per_tok": 3, "max_position_embeddings": 32, "rope_theta": 1e4, "eos_token_id": 2}


def tensors(config=CONFIG, seed=0, scale=1.0):
    """A classic Mixtral checkpoint, fp32."""
    rng = np.random.default_rng(seed)
    d, f, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    wide, narrow = d // heads * heads, d // heads * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,),
              "lm_head.weight": (config["vocab_size"], d)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": (d,), at + "post_attention_layernorm.weight": (d,),
                   at + "self_attn.q_proj.weight": (wide, d), at + "self_attn.k_proj.weight": (narrow, d),
                   at + "self_attn.v_proj.weight": (narrow, d), at + "self_attn.o_proj.weight": (d, wide),
                   at + "block_sparse_moe.gate.weight": (config["num_local_experts"], d)}
        for e in range(config["num_local_experts"]):
            expert = at + f"block_sparse_moe.experts.{e}."
            shapes |= {expert + "w1.weight": (f, d), expert + "w2.weight": (d, f), expert + "w3.weight": (f, d)}
    return {name: scale * rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def checkpoint(folder, data=None, config=CONFIG, **files):
    """Writes a checkpoint folder; files: name (with _ for .) -> JSON."""
    os.makedirs(folder, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if data is not None:
        save_file(data, folder / "model.safetensors")
    for name, content in files.items():
        (folder / (name + ".json")).write_text(json.dumps(content))
    return str(folder)


def expected(data, config=CONFIG):
    """Our names -> the checkpoint's arrays, written down once more by hand."""
    want = {"embed": data["model.embed_tokens.weight"], "norm": data["model.norm.weight"],
            "head": data["lm_head.weight"]}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        want |= {f"layers/{layer}/{name}": data[f"{at}self_attn.{name}_proj.weight"] for name in "qkvo"}
        want |= {f"layers/{layer}/attn_norm": data[at + "input_layernorm.weight"],
                 f"layers/{layer}/ffn_norm": data[at + "post_attention_layernorm.weight"],
                 f"layers/{layer}/router": data[at + "block_sparse_moe.gate.weight"]}
        for e in range(config["num_local_experts"]):
            expert = at + f"block_sparse_moe.experts.{e}."
            for part, word in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
                want[f"layers/{layer}/experts/{e}/{part}"] = data[f"{expert}{word}.weight"]
    return want


def content(path):
    """All arrays of a weights file by name, checksums proved."""
    found = {}
    with WeightsFile(path, verify=True) as file:
        for unit in schema.units(file.config):
            for part, array in file.unit(unit).items():
                found[unit.name if unit.expert < 0 else f"{unit.name}/{part}"] = array
    return found


def same(path, want, tolerance=0.0):
    found = content(path)
    assert found.keys() == want.keys()
    for name, array in want.items():
        assert found[name].shape == array.shape
        error = np.abs(to_fp32(found[name]) - array)
        assert (error <= tolerance * np.abs(array) + (1e-7 if tolerance else 0)).all(), name


# ---------------------------------------------------------------- what is converted
def test_classic_checkpoint(tmp_path):
    data = tensors()
    made = convert(checkpoint(tmp_path / "hf", data), str(tmp_path / "o.h5"))
    assert made.dtype == "fp32" and made.resumed == 0
    same(tmp_path / "o.h5", expected(data))
    assert verify(str(tmp_path / "o.h5")) == []


def test_stacked_experts_give_the_same_file(tmp_path):
    data = tensors()
    convert(checkpoint(tmp_path / "a", data), str(tmp_path / "a.h5"))
    stacked = {name: array for name, array in data.items() if ".experts." not in name}
    for layer in range(2):
        old, new = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        stacked[new + "gate.weight"] = stacked.pop(old + "gate.weight")
        each = [[data[f"{old}experts.{e}.{w}.weight"] for w in ("w1", "w3", "w2")] for e in range(5)]
        stacked[new + "experts.gate_up_proj"] = np.stack([np.concatenate(x[:2]) for x in each])
        stacked[new + "experts.down_proj"] = np.stack([x[2] for x in each])
    convert(checkpoint(tmp_path / "b", stacked), str(tmp_path / "b.h5"))
    one, other = content(tmp_path / "a.h5"), content(tmp_path / "b.h5")
    assert one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("name", cases.names())
def test_what_transformers_saves(tmp_path, name):
    """Every value of a checkpoint that save_pretrained wrote is in the file, once."""
    folder = cases.load(name).folder
    convert(folder, str(tmp_path / "o.h5"))
    saved = {}
    for file in os.listdir(folder):
        if file.endswith(".safetensors"):
            saved |= load_file(os.path.join(folder, file))
    found = content(tmp_path / "o.h5")
    assert sum(a.size for a in found.values()) == sum(a.size for a in saved.values())
    assert sorted(a.tobytes() for a in found.values()) == sorted(a.tobytes() for a in saved.values())
    down = next(n for n in saved if n.endswith(("experts.3.w2.weight", "experts.3.down_proj.weight")) and ".layers.1." in n)
    assert np.array_equal(found["layers/1/experts/3/down"], saved[down])


def test_shards(tmp_path):
    data = tensors()
    folder = tmp_path / "hf"
    names = sorted(data)
    checkpoint(folder)
    weight_map = {}
    for i in range(3):
        part = {name: data[name] for name in names[i::3]}
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(str(folder), str(tmp_path / "o.h5"))
    same(tmp_path / "o.h5", expected(data))
    os.rename(folder / "model-00002-of-00003.safetensors", tmp_path / "away")
    refused(folder, tmp_path, "model-00002-of-00003.safetensors: no such file")


@pytest.mark.parametrize("dtype,tolerance", [("fp32", 0.0), ("fp16", 2.0 ** -11), ("bf16", 2.0 ** -8)])
def test_precision_is_changed_on_demand(tmp_path, dtype, tolerance):
    data = tensors()
    convert(checkpoint(tmp_path / "hf", data), str(tmp_path / "o.h5"), dtype)
    same(tmp_path / "o.h5", expected(data), tolerance)
    with WeightsFile(tmp_path / "o.h5") as file:
        assert file.dtype == dtype


def save_bf16(path, data):
    """The safetensors library has no bf16 for NumPy: the file by hand."""
    header, blobs, offset = {}, [], 0
    for name, array in data.items():
        raw = array.tobytes()
        header[name] = {"dtype": "BF16" if array.dtype == np.uint16 else "F32", "shape": list(array.shape),
                        "data_offsets": [offset, offset + len(raw)]}
        blobs.append(raw)
        offset += len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def test_each_tensor_keeps_its_type_by_default(tmp_path):
    """bf16 with an fp32 router, as some models are published."""
    wide = tensors()
    data = {name: array if "gate.weight" in name else from_fp32(array, "bf16") for name, array in wide.items()}
    folder = checkpoint(tmp_path / "hf")
    save_bf16(tmp_path / "hf" / "model.safetensors", data)
    made = convert(folder, str(tmp_path / "o.h5"))
    assert made.dtype == "bf16" and "2 x router fp32" in made.notes[-1]
    found, want = content(tmp_path / "o.h5"), expected(data)
    assert all(np.array_equal(found[n], want[n]) and found[n].dtype == want[n].dtype for n in want)
    convert(folder, str(tmp_path / "half.h5"), "fp16")
    same(tmp_path / "half.h5", {n: to_fp32(a) for n, a in want.items()}, 2.0 ** -11)


def test_tokenizer_template_and_end_tokens(tmp_path):
    text = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"é": 0}}, "post_processor": {
        "type": "Sequence", "processors": [{"type": "ByteLevel"}, {
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]}}}]}}, ensure_ascii=False)
    folder = checkpoint(tmp_path / "hf", tensors(), tokenizer_config={
        "bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": None,
        "chat_template": [{"name": "tool", "template": "x"}, {"name": "default", "template": "{{ 'ü' }}"}]},
        generation_config={"eos_token_id": [3, 4]})
    (tmp_path / "hf" / "tokenizer.json").write_text(text, encoding="utf-8")
    made = convert(folder, str(tmp_path / "o.h5"))
    assert made.notes == ()
    with WeightsFile(tmp_path / "o.h5") as file:
        assert file.tokenizer_json == text and file.chat_template == "{{ 'ü' }}"
        assert file.special == {"bos_token": "<s>", "eos_token": "</s>"}
        assert file.config.stop_ids == (3, 4) and file.config.bos_id == 7
    (tmp_path / "hf" / "chat_template.jinja").write_text("from its own file")
    assert Checkpoint(folder).chat_template == "from its own file"
    (tmp_path / "hf" / "tokenizer.json").write_text('{"post_processor": 5}')
    refused(folder, tmp_path, "tokenizer.json: malformed")
    os.remove(tmp_path / "hf" / "tokenizer.json")
    checkpoint(tmp_path / "hf", config={**CONFIG, "bos_token_id": 1}, tokenizer_config={"add_bos_token": True})
    assert Checkpoint(folder).bos_id == 1


# ---------------------------------------------------------------- what is refused, before anything is written
def refused(folder, tmp_path, *words, dtype=None):
    with pytest.raises(UserError) as caught:
        convert(str(folder), str(tmp_path / "refused.h5"), dtype)
    for word in words:
        assert word in str(caught.value), caught.value
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("refused*"))


def test_folder_that_is_no_checkpoint(tmp_path):
    refused(tmp_path / "none", tmp_path, "no such folder")
    file = tmp_path / "file"
    file.write_text("")
    refused(file, tmp_path, "expected a folder with config.json")
    refused(tmp_path, tmp_path, "config.json: no such file")
    folder = tmp_path / "hf"
    checkpoint(folder)
    refused(folder, tmp_path, "neither model.safetensors nor")
    (folder / "config.json").write_text("{")
    refused(folder, tmp_path, "config.json: cannot be read as JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, tmp_path, "config.json: expected a JSON object")


def test_unsupported_family_option_tensor_and_type(tmp_path):
    data = tensors()
    folder = tmp_path / "hf"
    checkpoint(folder, data, {**CONFIG, "model_type": "gpt_oss"})
    refused(folder, tmp_path, "config.json: model_type = 'gpt_oss'", "mixtral, olmoe, phimoe, qwen3_moe")
    checkpoint(folder, data, {**CONFIG, "quantization_config": {"bits": 4}})
    refused(folder, tmp_path, "quantization_config")
    checkpoint(folder, {**data, "model.layers.1.mlp.shared_expert.up_proj.weight": data["model.norm.weight"]})
    refused(folder, tmp_path, "model.layers.1.mlp.shared_expert.up_proj.weight does not belong to family mixtral")
    lost = {name: array for name, array in data.items() if name != "model.layers.1.block_sparse_moe.experts.4.w3.weight"}
    checkpoint(folder, lost)
    refused(folder, tmp_path, "layers.1.block_sparse_moe.experts.4.w3.weight is missing")
    checkpoint(folder, {**data, "model.norm.weight": np.ones(13, np.float32)})
    refused(folder, tmp_path, "model.norm.weight: shape [13]: expected [12] by config.json")
    checkpoint(folder, {**data, "model.norm.weight": np.ones(12, np.int8)})
    refused(folder, tmp_path, "model.norm.weight: type I8 is not supported")


def test_damaged_shards(tmp_path):
    folder = tmp_path / "hf"
    checkpoint(folder, tensors())
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused(folder, tmp_path, "model.safetensors: truncated")
    path.write_bytes(whole[:100])
    refused(folder, tmp_path, "not a safetensors file, or a truncated one")
    path.write_bytes(b"\x10" + bytes(7) + b"not JSON at all!")
    refused(folder, tmp_path, "model.safetensors: not a safetensors file")
    path.write_bytes(whole.replace(b'"shape":[12]', b'"shape":[13]', 1))
    refused(folder, tmp_path, "bytes: expected the size of [13] in F32")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_of_a_shard_gives_a_file_or_one_message(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("d")
    checkpoint(folder / "hf", tensors({**CONFIG, "num_hidden_layers": 1}), {**CONFIG, "num_hidden_layers": 1})
    path = folder / "hf" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.sampled_from(b'0123456789"{}[],:aF\x00\xff'))
    path.write_bytes(raw)
    try:
        convert(str(folder / "hf"), str(folder / "o.h5"))
    except UserError as error:
        assert str(folder) in str(error)
        assert not list(folder.glob("o.h5*"))


def test_a_value_beyond_fp16_is_an_error_not_an_infinity(tmp_path):
    data = tensors()
    data["model.layers.0.block_sparse_moe.experts.1.w2.weight"][3, 4] = -7e4
    folder = checkpoint(tmp_path / "hf", data)
    with pytest.raises(UserError, match="layers.0.*experts.1.w2.weight: value -70000 is beyond fp16"):
        convert(folder, str(tmp_path / "o.h5"), "fp16")
    assert not os.path.exists(tmp_path / "o.h5")
    convert(folder, str(tmp_path / "o.h5"), "bf16")


# ---------------------------------------------------------------- cut, full disk, memory
CUT = """
import os, signal, sys
from hpcmoe.data.convert import convert
def progress(done, total, name):
    if name == "layers/1/experts/1":
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], None, progress)
"""


def test_a_killed_conversion_goes_on_where_it_stopped(tmp_path):
    data = tensors()
    folder, out = checkpoint(tmp_path / "hf", data), str(tmp_path / "o.h5")
    assert subprocess.run([sys.executable, "-c", CUT, folder, out]).returncode == -signal.SIGKILL
    assert not os.path.exists(out)
    said, seen = [], []
    made = convert(folder, out, None, lambda done, total, name: seen.append((done, name)), said.append)
    assert made.resumed == 3 + 2 * 7 + 5 + 2 and seen[0][1] == "" and seen[1][1] == "layers/1/experts/2"
    assert f"{made.resumed} of {made.units} tensors and experts are there" in said[0]
    assert seen[-1][0] == made.nbytes
    same(out, expected(data))
    assert not os.path.exists(out + ".part")


def test_a_changed_checkpoint_is_not_mixed_with_the_old_one(tmp_path):
    folder, out = checkpoint(tmp_path / "hf", tensors()), str(tmp_path / "o.h5")
    subprocess.run([sys.executable, "-c", CUT, folder, out])
    data = tensors(seed=1)
    checkpoint(tmp_path / "hf", data)
    said = []
    made = convert(folder, out, say=said.append)
    assert made.resumed == 0 and "another model or conversion: starting anew" in said[0]
    same(out, expected(data))


FULL = """
import os, sys
from hpcmoe.data.convert import convert
from hpcmoe.errors import UserError
folder, disk = sys.argv[1:]
def fill(done, total, name):
    if name == "layers/1/router" and not os.path.exists(disk + "/filler"):
        with open(disk + "/filler", "wb", 0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
try:
    convert(folder, disk + "/o.h5", None, fill)
except UserError as error:
    print(error)
print(sorted(os.listdir(disk)))
os.remove(disk + "/filler")
said = []
print(convert(folder, disk + "/o.h5", say=said.append).resumed, said)
print(sorted(os.listdir(disk)))
os.remove(disk + "/o.h5")
open(disk + "/filler", "wb").write(bytes(SIZE - 900000))
try:
    convert(folder, disk + "/o.h5")
except UserError as error:
    print(error)
print(sorted(os.listdir(disk)))
"""


def test_full_disk(tmp_path):
    """On a real small disk: one message, the part file kept, nothing under the final name."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user name spaces: a small disk cannot be mounted")
    config = {**CONFIG, "hidden_size": 96, "intermediate_size": 128}
    size = 2 << 20
    folder = checkpoint(tmp_path / "hf", tensors(config), config)
    disk = tmp_path / "disk"
    disk.mkdir()
    script = tmp_path / "full.py"
    script.write_text(FULL.replace("SIZE", str(size)))
    shell = f'mount -t tmpfs -o size={size} none "{disk}" && exec "{sys.executable}" "{script}" "{folder}" "{disk}"'
    ran = subprocess.run(["unshare", "-rm", "sh", "-c", shell], capture_output=True, text=True)
    if "mount" in ran.stderr and ran.returncode:
        pytest.skip("mounting a small disk is not allowed: " + ran.stderr.strip())
    assert ran.returncode == 0, ran.stderr
    first, listed, again, after, refused_, left = ran.stdout.splitlines()
    assert "o.h5: cannot write: No space left on device" in first and "o.h5.part is kept" in first
    assert listed == "['filler', 'o.h5.part']"
    assert int(again.split()[0]) > 5 and "checksums right" in again
    assert after == "['o.h5']"
    assert "not enough space" in refused_ and left == "['filler']"


MEMORY = """
import sys
import numpy, h5py, xxhash
from hpcmoe.data.convert import convert
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name + ":"))
before = status("VmRSS")
convert(sys.argv[1], sys.argv[2], sys.argv[3])
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_stays_below_twice_the_largest_tensor(tmp_path, dtype):
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the peak of a process's memory is read from /proc")
    config = {**CONFIG, "hidden_size": 384, "intermediate_size": 4000, "num_local_experts": 4, "vocab_size": 4000}
    data = {name: np.zeros_like(array) for name, array in tensors(config).items()}
    largest, total = max(a.nbytes for a in data.values()), sum(a.nbytes for a in data.values())
    assert total > 20 * largest
    folder = checkpoint(tmp_path / "hf", data, config)
    del data
    ran = subprocess.run([sys.executable, "-c", MEMORY, folder, str(tmp_path / "o.h5"), dtype],
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert 0 < int(ran.stdout) < 2 * largest, (int(ran.stdout), largest)


# ---------------------------------------------------------------- the command
def test_command(tmp_path):
    folder, out = checkpoint(tmp_path / "hf", tensors()), str(tmp_path / "o.h5")

    def run(*more):
        return subprocess.run([sys.executable, "-m", "hpcmoe", "weights", "convert", folder, out, *more],
                              capture_output=True, text=True)

    first = run()
    assert first.returncode == 0, first.stderr
    assert "no tokenizer.json: prompts must be given as token ids" in first.stdout and "in fp32" in first.stdout
    again = run("--dtype", "bf16")
    assert again.returncode == 2 and "exists already" in again.stderr
    assert run("--dtype", "bf16", "--force", "--quiet").stdout == ""
    with WeightsFile(out) as file:
        assert file.dtype == "bf16"
    checkpoint(tmp_path / "hf", config={**CONFIG, "model_type": "jamba"})
    wrong = run("--force")
    assert wrong.returncode == 2 and "model_type = 'jamba'" in wrong.stderr and "Traceback" not in wrong.stderr
    assert os.path.exists(out)
