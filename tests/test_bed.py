"""The test bed says what it lacks instead of failing."""

import tempfile

import pytest

from cudabed import bed, cudacpu, driver, mpich


def test_a_named_folder_without_an_open_mpi(monkeypatch, tmp_path):
    monkeypatch.setenv("HPCMOE_TEST_CUDA_OPENMPI", str(tmp_path))
    assert "no env.sh" in bed.cuda_openmpi.__wrapped__()
    (tmp_path / "env.sh").write_text("")
    assert bed.cuda_openmpi.__wrapped__() == tmp_path


def test_no_open_mpi_at_all(monkeypatch, tmp_path):
    monkeypatch.delenv("HPCMOE_TEST_CUDA_OPENMPI", raising=False)
    monkeypatch.setattr(bed, "ROOT", tmp_path / "hpcmoe")
    assert "tests/cudabed/build_openmpi.sh" in bed.cuda_openmpi.__wrapped__()


def test_wheels_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert "pip cannot download mpich==" in mpich.folder()
    monkeypatch.setattr(bed, "cuda_mpich", mpich.folder)
    assert "pip cannot download" in bed.missing_mpi("mpich")


def test_no_compiler_or_headers(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert bed.missing() == "no C compiler"
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(driver, "cuda_include", lambda: None)
    assert "no CUDA headers" in bed.missing() or bed.missing() == "no C compiler"


@pytest.mark.skipif(bool(bed.missing()), reason=bed.missing() or "here")
def test_the_stand_in_comes_first_on_the_path(monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/else/where")
    monkeypatch.setenv("PYTHONPATH", "/some/path")
    env = bed.lookalike_env(FAKECUDA_DEVICES="2")
    assert env["LD_LIBRARY_PATH"].split(":") == [str(driver.folder()), "/else/where"]
    assert env["PYTHONPATH"].endswith("tests/cudabed/lookalike:/some/path") and env["FAKECUDA_DEVICES"] == "2"
    assert cudacpu.missing() == "" and (driver.folder() / "libcuda.so.1").exists()
