"""Outputs: the rows, what stop texts cut, scores.h5, and that a file is whole or not there."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from small_text import EOS, model, tokenizer

from hpcmoe.config import SamplingJob
from hpcmoe.data.outputs import Result, perplexity_of, write_outputs
from hpcmoe.files import check_folder, replacing
from hpcmoe.data.requests import Request, read_requests
from hpcmoe.errors import UserError

TEXT = "In the beginning was the word"


def encoded(text):
    return tokenizer().encode(text, bos=False)


def rows_of(path) -> list[dict]:
    return [json.loads(text) for text in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def row(request, result, tmp_path, task="generate", text=True) -> dict:
    path = write_outputs(tmp_path, task, [request], [result], tokenizer() if text else None, "m", created=1)
    return rows_of(path)[0]


def choice(*args, **more) -> dict:
    return row(*args, **more)["response"]["body"]["choices"][0]


# ---------------------------------------------------------------- rows
def test_rows_in_input_order_with_error_rows_between(tmp_path):
    (tmp_path / "r.jsonl").write_text("\n".join([
        json.dumps({"custom_id": "é1", "body": {"prompt": TEXT}}), "{", "",
        json.dumps({"custom_id": "c", "body": {"messages": [{"role": "user", "content": TEXT}]}}),
        json.dumps({"custom_id": "bad", "body": {"prompt": TEXT, "n": 3}}),
        json.dumps({"custom_id": "lost", "body": {"prompt": TEXT}})]), encoding="utf-8")
    requests = read_requests(tmp_path / "r.jsonl", tokenizer(), SamplingJob(max_tokens=8), model(), "generate")
    results = [Result(2, encoded(" ok"), None, "length"), Result(0, encoded(" yes"), None, "stop")]
    path = write_outputs(tmp_path, "generate", requests, results, tokenizer(), "demo", created=77)
    assert path == tmp_path / "outputs.jsonl"
    rows = rows_of(path)
    assert [r["custom_id"] for r in rows] == ["é1", None, "c", "bad", "lost"]
    assert "é1" in path.read_text(encoding="utf-8")
    assert rows[0] == {
        "id": "batch_req_0", "custom_id": "é1", "error": None, "response": {
            "status_code": 200, "request_id": "req-0", "body": {
                "id": "cmpl-0", "object": "text_completion", "created": 77, "model": "demo",
                "choices": [{"index": 0, "text": " yes", "token_ids": encoded(" yes").tolist(),
                             "logprobs": None, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": len(requests[0].tokens),
                          "completion_tokens": len(encoded(" yes")),
                          "total_tokens": len(requests[0].tokens) + len(encoded(" yes"))}}}}
    body = rows[2]["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": " ok"}
    assert body["choices"][0]["finish_reason"] == "length"
    assert [r["response"] for r in rows if r["error"]] == [None] * 3
    assert [(r["error"]["code"], r["error"]["line"]) for r in rows if r["error"]] == [
        ("invalid_json", 2), ("unsupported_field", 5), ("not_run", 6)]
    assert "body.n = 3" in rows[3]["error"]["message"]
    assert sorted(os.listdir(tmp_path)) == ["outputs.jsonl", "r.jsonl"]


def test_the_same_results_give_the_same_bytes(tmp_path):
    requests = [Request(i, i + 1, f"r{i}", encoded(TEXT)) for i in range(5)]
    results = [Result(i, encoded(TEXT[i:])) for i in range(5)]
    first = write_outputs(tmp_path, "generate", requests, results, tokenizer(), "m", created=5).read_bytes()
    second = write_outputs(tmp_path, "generate", requests, results[::-1], tokenizer(), "m", created=5).read_bytes()
    assert first == second


def test_the_stop_token_is_counted_and_not_shown(tmp_path):
    word = int(encoded(" word")[0])
    tokens = np.append(encoded(" In the"), word)
    request = Request(0, 1, "a", encoded(TEXT), stop_ids=(word,))
    found = row(request, Result(0, tokens, None, "stop"), tmp_path)["response"]["body"]
    assert found["choices"][0]["text"] == " In the"
    assert found["choices"][0]["token_ids"] == tokens.tolist()
    assert found["usage"]["completion_tokens"] == len(tokens)
    # the same token, where it did not end the request, is text
    assert choice(request, Result(0, tokens, None, "length"), tmp_path)["text"] == " In the word"
    assert choice(Request(0, 1, "a", encoded(TEXT), stop_ids=(EOS,)),
                  Result(0, np.array([EOS]), None, "stop"), tmp_path)["text"] == ""


@pytest.mark.parametrize("stop, text, reason", [
    ((), TEXT, "length"),
    (("absent",), TEXT, "length"),
    (("was",), "In the beginning ", "stop"),
    (("word", "begin"), "In the ", "stop"),  # the first in the text, not in the list
    (("I",), "", "stop"),
    (("word",), "In the beginning was the ", "stop"),
])
def test_stop_texts_cut_the_output(tmp_path, stop, text, reason):
    tokens = encoded(TEXT)
    result = Result(0, tokens, -np.arange(len(tokens)) / 4, "length")
    for kind in ("completion", "chat", "text", "ids"):
        request = Request(0, 1, "a", encoded("x"), stop=stop, logprobs=True, kind=kind)
        found = choice(request, result, tmp_path)
        assert (found["message"]["content"] if kind == "chat" else found["text"]) == text
        assert found["finish_reason"] == reason
        assert found["token_ids"] == tokens.tolist()  # what was generated
        if kind == "chat":
            pieces = [part["token"] for part in found["logprobs"]["content"]]
            values = [part["logprob"] for part in found["logprobs"]["content"]]
            assert all(bytes(part["bytes"]).decode() == part["token"] for part in found["logprobs"]["content"])
        else:
            pieces, values = found["logprobs"]["tokens"], found["logprobs"]["token_logprobs"]
            offsets = found["logprobs"]["text_offset"]
            assert [TEXT[at:at + len(p)] for at, p in zip(offsets, pieces)] == pieces
        assert len(values) == len(pieces) and values == result.logprobs[:len(pieces)].tolist()
        # the tokens whose text begins before the cut, all of them and no more
        assert "".join(pieces).startswith(text) and len("".join(pieces[:-1])) <= max(len(text) - 1, 0)


def test_logprobs_only_where_asked_for(tmp_path):
    result = Result(0, encoded(TEXT), np.zeros(len(encoded(TEXT))))
    assert choice(Request(0, 1, "a", encoded("x")), result, tmp_path)["logprobs"] is None
    assert choice(Request(0, 1, "a", encoded("x"), kind="chat"), result, tmp_path)["logprobs"] is None


def test_a_probability_of_zero_is_null_in_json(tmp_path):
    request = Request(0, 1, "a", encoded("x"), logprobs=True)
    found = choice(request, Result(0, np.array([5, 6]), np.array([-0.5, -np.inf])), tmp_path)
    assert found["logprobs"]["token_logprobs"] == [-0.5, None]


def test_without_a_tokenizer_the_tokens_are_the_output(tmp_path):
    request = Request(0, 0, "a", np.array([4, 5]), kind="ids", logprobs=True, stop_ids=(7,))
    found = choice(request, Result(0, np.array([6, 7]), np.array([-1.0, -2.0]), "stop"), tmp_path, text=False)
    assert (found["text"], found["token_ids"], found["finish_reason"]) == ("", [6, 7], "stop")
    assert found["logprobs"]["token_logprobs"] == [-1.0, -2.0]


# ---------------------------------------------------------------- scores
def test_scores(tmp_path):
    requests = [Request(0, 1, "é", np.array([5, 6, 7], np.int32), logprobs=True),
                Request(1, 2, "", error="no", error_code="invalid_json"),
                Request(2, 3, "c", np.array([8, 9], np.int32))]
    results = [Result(2, np.zeros(0), np.array([-4.0]), "score"),
               Result(0, np.zeros(0), np.array([-1.0, -2.0]), "score")]
    path = write_outputs(tmp_path, "score", requests, results, tokenizer(), "demo")
    first, bad, last = rows_of(path)
    body = first["response"]["body"]
    assert body["perplexity"] == pytest.approx(math.exp(1.5))
    assert (body["log_probability"], body["scored_tokens"]) == (-3.0, 2)
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert len(body["choices"][0]["logprobs"]["tokens"]) == 3
    assert bad["error"]["code"] == "invalid_json" and bad["response"] is None
    assert last["response"]["body"]["choices"][0]["logprobs"] is None
    with h5py.File(tmp_path / "scores.h5") as file:
        assert file["offsets"][:].tolist() == [0, 3, 3, 5] and file["offsets"].dtype == np.int64
        assert file["tokens"][:].tolist() == [5, 6, 7, 8, 9] and file["tokens"].dtype == np.int32
        np.testing.assert_array_equal(file["logprobs"][:], [np.nan, -1, -2, np.nan, -4])
        np.testing.assert_allclose(file["perplexity"][:], [math.exp(1.5), np.nan, math.exp(4)])
        assert file["custom_id"].asstr()[:].tolist() == ["é", "", "c"]
        assert dict(file.attrs) == {"format": "hpcmoe-scores", "version": 1, "model": "demo",
                                    "perplexity": pytest.approx(math.exp(7 / 3))}
    assert sorted(os.listdir(tmp_path)) == ["outputs.jsonl", "scores.h5"]


def test_scores_where_no_request_could_run(tmp_path):
    write_outputs(tmp_path, "score", [Request(0, 1, error="no", error_code="x")], [], None, "m")
    with h5py.File(tmp_path / "scores.h5") as file:
        assert file["offsets"][:].tolist() == [0, 0] and len(file["tokens"]) == len(file["logprobs"]) == 0
        assert np.isnan(file.attrs["perplexity"])


def test_perplexity():
    flat = Result(0, np.zeros(0), np.full(100, -math.log(50)))
    assert perplexity_of([flat]) == pytest.approx(50)  # as unsure as a die of 50 faces
    assert math.isnan(perplexity_of([])) and perplexity_of([Result(0, np.zeros(0), np.array([-np.inf]))]) == math.inf


# ---------------------------------------------------------------- files
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), replacing(path) as temporary:
            Path(temporary).write_text("half")
            raise error
    with pytest.raises(UserError, match="/f: cannot be written: "), replacing(path):
        pass  # nothing was written
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]
    with replacing(path) as temporary:
        Path(temporary).write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["f"]


def test_a_row_that_fails_leaves_no_file(tmp_path):
    (tmp_path / "outputs.jsonl").write_text("old\n")
    good, broken = Result(0, np.zeros(0), np.zeros(1)), Result(1, np.zeros(0), None)
    with pytest.raises(ValueError):
        write_outputs(tmp_path, "score", [Request(0, 1, "a", np.zeros(2)), Request(1, 2, "b", np.zeros(2))],
                      [good, broken], None, "m")
    assert os.listdir(tmp_path) == ["outputs.jsonl"]
    assert (tmp_path / "outputs.jsonl").read_text() == "old\n"


WRITE = """
import os, resource, signal, sys
import numpy as np
from hpcmoe.data.outputs import Result, write_outputs
from hpcmoe.data.requests import Request
from hpcmoe.errors import UserError
folder, task, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
tokens = np.arange(20000, dtype=np.int32)
try:
    write_outputs(folder, task, [Request(0, 1, "a", tokens)],
                  [Result(0, tokens, np.zeros(19999), "score")], None, "m")
except UserError as error:
    print(error)
    sys.exit(2)
"""


def write_in_a_process(folder, task, limit=0):
    return subprocess.run([sys.executable, "-c", WRITE, str(folder), task, str(limit)],
                          capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("task, file, limit", [
    ("generate", "outputs.jsonl", 0), ("generate", "outputs.jsonl", 5000), ("score", "scores.h5", 500),
    ("score", "scores.h5", 100_000), ("score", "scores.h5", 240_000), ("score", "scores.h5", 242_500)])
def test_a_limit_on_the_size_of_files(tmp_path, task, file, limit):
    """As a full disk: the write fails early, in the middle, or in the last bytes of the file."""
    done = write_in_a_process(tmp_path, task, limit)
    if limit == 0:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert os.listdir(tmp_path) == [file]
        return
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout == f"{tmp_path}/{file}: cannot be written: File too large\n"
    assert os.listdir(tmp_path) == []


def test_a_full_disk(tmp_path):
    """A file system of 128 KiB, where this machine lets a user mount one."""
    script = (f'mount -t tmpfs -o size=128k none "{tmp_path}" || exit 77\n'
              f'"{sys.executable}" -c "$WRITE" "{tmp_path}" score 0; echo "rc $?"; ls -A "{tmp_path}"')
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True,
                          timeout=60, env=os.environ | {"WRITE": WRITE})
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no file system can be mounted here: " + done.stderr.strip())
    assert done.stdout == f"{tmp_path}/scores.h5: cannot be written: No space left on device\nrc 2\n"
    assert done.stderr == ""


def test_check_folder(tmp_path):
    check_folder(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "kept").write_text("x")
    check_folder(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == ["kept"]
    with pytest.raises(UserError, match="kept: is a file: expected a folder"):
        check_folder(tmp_path / "a" / "b" / "kept")
    with pytest.raises(UserError, match="kept/c: cannot be written: Not a directory"):
        check_folder(tmp_path / "a" / "b" / "kept" / "c")
    with pytest.raises(UserError, match="/proc/none: cannot be written"):
        check_folder("/proc/none")
    with pytest.raises(UserError, match="/proc: cannot be written"):
        check_folder("/proc")


def test_a_folder_without_permission(tmp_path):
    """In a process of its own that gives up root's rights, which ignore permissions."""
    (tmp_path / "shut").mkdir(mode=0o555)
    for folder in [tmp_path, *list(tmp_path.parents)[:-2]]:
        if os.stat(folder).st_uid == os.getuid():
            folder.chmod(folder.stat().st_mode | 0o055)
    code = ("import os, sys\nfrom hpcmoe.files import check_folder\n"
            "from hpcmoe.errors import UserError\n"
            "if os.geteuid() == 0: os.setegid(65534), os.seteuid(65534)\n"
            "for path in sys.argv[1:]:\n"
            "    try: check_folder(path)\n"
            "    except UserError as error: print(error)\n")
    shut = str(tmp_path / "shut")
    done = subprocess.run([sys.executable, "-c", code, shut, shut + "/new"], capture_output=True,
                          text=True, timeout=60)
    assert done.stdout == (f"{shut}: cannot be written: Permission denied\n"
                           f"{shut}/new: cannot be written: Permission denied\n"), done.stderr
