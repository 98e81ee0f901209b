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
    (GOOD + "lanes = -1\n", [], ["run.lanes", "-1", "from 0 to 64"]),
    (GOOD, ["run.lanes=65"], ["run.lanes", "65", "from 0 to 64"]),
    (GOOD, ["run.micro_batches=1000000"], ["run.micro_batches", "1000000", "from 0 to 1024"]),
    *((GOOD, [f"run.memory_gb={text}"], ["run.memory_gb", text, "from 0 to 1000000"]) for text in ("inf", "nan", "-1.0", "1e+300")),
    (GOOD, ["output.dir="], ["output.dir = ''", "a folder"]),
    (GOOD, ["run.routing_statistics=yes"], ["run.routing_statistics", "yes", "true or false"]),
    (GOOD, ["layout.leaders=1.5"], ["layout.leaders", "1.5"]),
    (GOOD, ["layout.tp=2.0"], ["layout.tp", "2.0", "an integer"]),
    (GOOD + "schedule = 'fast'\n", [], ["run.schedule", "fast", "overlapped, plain"]),
    (GOOD, ["run.transport=carrier"], ["run.transport", "carrier", "ialltoallv"]),
    (GOOD, ["lanes"], ["--set", "lanes", "key=value"]),
    (GOOD, ["task.x=1"], ["task.x"]),
    (GOOD, ["sampling.top_p=0"], ["sampling.top_p", "0"]),
    *((GOOD, [f"run.stall_s={text}"], ["job.toml", "run.stall_s", "a number from 1 to 1000000"]) for text in ("nan", "inf", "0", "-5", "1e7")),
    (GOOD, ["run.stall_s=soon"], ["run.stall_s", "soon", "a number"]),
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
