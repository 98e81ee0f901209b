"""Job files: what is there is read, what is wrong is named."""

import pytest
from hypothesis import given, strategies as st

from hpcmoe.config import JobConfig, from_dict, to_dict
from hpcmoe.errors import UserError
from hpcmoe.jobfile import read_job

GOOD = 'task = "throughput"\n[weights]\nfile = "w.h5"\n[layout]\nleaders = 2\n[run]\nstall_s = 5\n'


@pytest.fixture
def job_file(tmp_path):
    def write(text):
        path = tmp_path / "job.toml"
        path.write_text(text)
        return str(path)
    return write


def test_values_defaults_and_settings(job_file):
    job = read_job(job_file(GOOD), ["run.lanes=2", "output.dir=some/where", 'sampling.top_p=0.5', "layout.leaders=node"])
    assert (job.task, job.weights.file, job.run.lanes, job.run.stall_s) == ("throughput", "w.h5", 2, 5.0)
    assert (job.output.dir, job.sampling.top_p, job.layout.leaders) == ("some/where", 0.5, "node")
    assert job.run.batch_tokens == 1024 and from_dict(JobConfig, to_dict(job), "x") == job


@pytest.mark.parametrize("text, sets, words", [
    (GOOD + "lines = 3\n", [], ["job.toml", "run.lines", "3", "lanes"]),
    (GOOD + "lanes = 'two'\n", [], ["run.lanes", "two", "an integer"]),
    (GOOD + "lanes = true\n", [], ["run.lanes", "True", "an integer"]),
    (GOOD + "lanes = -1\n", [], ["run.lanes", "-1", ">= 0"]),
    (GOOD + "schedule = 'fast'\n", [], ["run.schedule", "fast", "overlapped, plain"]),
    (GOOD, ["run.transport=carrier"], ["run.transport", "carrier", "ialltoallv"]),
    (GOOD, ["lanes"], ["--set", "lanes", "key=value"]),
    (GOOD, ["task.x=1"], ["task.x"]),
    (GOOD, ["sampling.top_p=0"], ["sampling.top_p", "0"]),
    (GOOD, ["run.stall_s=nan"], ["run.stall_s", "nan"]),
    (GOOD, ["weights.dtype=fp8"], ["weights.dtype", "fp8", "bf16"]),
    ("task = 'generate'\n[weights]\nfile = 'w.h5'\n", [], ["requests.file is missing"]),
    ("task = 'throughput'\n", [], ["weights.file is missing"]),
    ("task = \n", [], ["job.toml", "not TOML"]),
    ("weights = 3\n", [], ["weights", "3", "a table"])])
def test_errors_name_file_key_value_and_what_is_expected(job_file, text, sets, words):
    with pytest.raises(UserError) as error:
        read_job(job_file(text), sets)
    for word in words:
        assert word in str(error.value)


def test_no_such_file():
    with pytest.raises(UserError, match="nowhere.toml: cannot be read: No such file"):
        read_job("nowhere.toml", [])


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["task", "run", "lanes", "weights", "file", "x"]), inner, max_size=4)))
def test_any_data_gives_a_job_or_one_user_error(data):
    try:
        from_dict(JobConfig, data, "data")
    except UserError as error:
        assert str(error).startswith("data: ")
