"""hpcmoe doctor: alone, on ranks, on machines that lack something."""

import json
import os
import subprocess
import sys
import types

import pytest

from hpcmoe import device, doctor_gpu
from hpcmoe.affinity import Choice
from hpcmoe.doctor import Check, cpu, merge, report, transport_checks
from hpcmoe.doctor_gpu import Machine, diagnose
from mpi import environment, run_ranks, vendor
from tests.cudabed import bed


def doctor(*arguments, env=None, before=""):
    code = f"import sys; {before}\nfrom hpcmoe.cli import main\nsys.exit(main(['doctor', *sys.argv[1:]]))"
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment(env), capture_output=True, text=True, timeout=120)


def test_alone():
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "A run could start here." in done.stdout
    for name in ("MPI ", "threads in MPI", "transports", "HDF5", "CPU features", "memory", "GPUs", "threads per rank  ", "BLAS"):
        assert name in done.stdout, name
    assert vendor() in done.stdout


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks_answer_once_in_json(ranks):
    done = run_ranks(ranks, ["-m", "hpcmoe", "doctor", "--json"]).check()
    found = json.loads(done.out)
    values = {check["name"]: check["value"] for check in found["checks"]}
    assert found["ok"] and not any(check["problem"] for check in found["checks"])
    assert values["ranks"].startswith(f"{ranks} on 1 node: ")
    assert values["ranks sharing memory"] == str(ranks)
    assert values["threads in MPI"] == "multiple"
    assert values["threads per rank"] == "1 (OPENBLAS_NUM_THREADS)"
    for transport in ("ialltoallv", "pairwise", "staged"):
        assert transport in values["transports"]
        assert found["transports"][transport] == {"host": "", "device": "not tried: no GPU"}
    assert found["gpus"] == [] and values["CUDA-aware MPI"].startswith("no (")
    assert values["MPI"].startswith(vendor())


@pytest.mark.parametrize("before, env, name, problem", [
    ("", {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}, "MPI", "no MPI library that mpi4py can load"),
    ("sys.modules['h5py'] = None", {}, "HDF5", "h5py does not import"),
    ("", {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "MPI", "a world of size 1"),
])
def test_a_run_could_not_start(before, env, name, problem):
    done = doctor("--json", before=before, env=env)
    assert done.returncode == 2, done.stderr
    found = json.loads(done.stdout)
    assert not found["ok"]
    bad = [check for check in found["checks"] if check["problem"]]
    assert [check["name"] for check in bad] == [name]
    assert problem in bad[0]["problem"]
    assert "Traceback" not in done.stderr


def test_what_may_be_missing():
    done = doctor(before="sys.modules['tokenizers'] = sys.modules['jinja2'] = sys.modules['cupy'] = None")
    assert done.returncode == 0
    assert "missing; text prompts need hpcmoe[text]" in done.stdout
    assert "missing; chat messages need hpcmoe[text]" in done.stdout


def test_lonely_ranks_other_than_the_first_say_nothing():
    done = doctor(env={"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"})
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_problem_is_printed_in_the_table():
    done = doctor(env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    assert done.returncode == 2
    assert "PROBLEM, MPI: no MPI library" in done.stdout and "A run could not start here." in done.stdout


def test_merge():
    def ranks(*values, name="CPU"):
        return [{name: Check(name, value)} for value in values]
    assert merge(ranks("a", "a", "a")) == [Check("CPU", "a")]
    assert merge(ranks("a", "b", "a")) == [Check("CPU", "rank 0: a; rank 1: b")]
    assert merge(ranks("1.0", "1.0", "2.0", name="NumPy"))[0].problem == "NumPy differs between ranks"
    assert merge(ranks("16.0 GB, 9.5 GB free", "16.0 GB, 12.0 GB free", name="memory"))[0].value == "16.0 GB, 9.5 GB free"
    faulty = [{"HDF5": Check("HDF5", "2.0")}, {"HDF5": Check("HDF5", "missing", "does not import")}]
    assert merge(faulty)[0].problem == "does not import"


def test_cpu():
    model, flags = cpu()
    assert model and flags
    with open("/proc/cpuinfo") as file:
        text = file.read()
    assert model in text or "model name" not in text
    assert all(flag in text for flag in flags)


# ---------------------------------------------------------------- GPUs
H100 = dict(devices=4, mine=4, driver="550.54.15", cuda=(12, 4), wheels=(("cupy-cuda12x", "14.2.0"),))
MISSING = "CuPy does not import: No module named 'cupy'"
TOO_OLD = "CuPy 14.2.0: cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"


@pytest.mark.parametrize("change, reason, value, problem, warning", [
    ({"devices": 0, "mine": 0, "driver": "", "cuda": (0, 0), "wheels": ()}, MISSING, "none (CuPy does not", "", ""),
    ({"devices": 0, "mine": 0, "driver": "", "cuda": (0, 0)}, TOO_OLD, "none (CuPy 14.2.0: ", "", ""),
    ({"wheels": ()}, MISSING, "4 NVIDIA devices, (CuPy does", "", "pip install hpcmoe[cuda12]"),
    ({"wheels": (), "cuda": (13, 0)}, MISSING, "4 NVIDIA devices", "", "pip install hpcmoe[cuda13]"),
    ({"mine": 0}, "CuPy 14.2.0: no GPU", "4 NVIDIA devices, (none is given to this process; CuPy", "", ""),
    ({"hidden": ""}, "CuPy 14.2.0: no GPU", "none of 4: CUDA_VISIBLE_DEVICES = ''", "", ""),
    ({"wheels": (("cupy-cuda13x", "14.2.0"),)}, TOO_OLD, "none of 4",
     "cupy-cuda13x wants a driver of 580 or later, 550.54.15 knows CUDA 12.4: `pip uninstall cupy-cuda13x` and `pip install hpcmoe[cuda12]`", ""),
    ({"cuda": (11, 8), "driver": "520.61"}, TOO_OLD, "none of 4",
     "wants a driver of 525 or later, 520.61 knows CUDA 11.8: have a newer driver installed", ""),
    ({"wheels": (("cupy-cuda11x", "13.6.0"),)}, "CuPy 13.6.0: no", "none of 4", "cupy-cuda11x is for another CUDA: ", ""),
    ({"cuda": (0, 0)}, TOO_OLD, "none of 4", "libcuda.so.1 does not load", ""),
    ({}, "CuPy 14.2.0: cudaErrorNoDevice", "none of 4", "although 4 NVIDIA devices are here: CuPy 14.2.0: cudaErrorNoDevice", ""),
    ({"wheels": (("cupy", "14.2.0"),), "devices": 1, "mine": 1}, "broken", "none of 1", "although 1 NVIDIA device is here: broken", ""),
])
def test_why_no_gpu_can_be_used(change, reason, value, problem, warning):
    check = diagnose(reason, Machine(**{**H100, **change}))
    assert check.value.startswith(value)
    assert problem in check.problem and bool(problem) == bool(check.problem)
    assert warning in check.warning and bool(warning) == bool(check.warning)


@pytest.mark.parametrize("line, version", [
    ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024", "550.54.15"),
    ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (builder@host)", "580.65.06"),
])
def test_what_the_system_says(tmp_path, monkeypatch, line, version):
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(line + "\nGCC version: gcc version 12.2.0\n")
    refused = tmp_path / "dev" / "nvidia1"
    allowed = os.open
    def deny(path, flags):
        if path == refused:
            raise PermissionError(1, "Operation not permitted")  # as for a device that a cgroup forbids
        return allowed(path, flags)
    monkeypatch.setattr(doctor_gpu.os, "open", deny)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    found = doctor_gpu.machine(tmp_path)
    assert (found.devices, found.mine, found.driver, found.hidden) == (2, 1, version, "0")
    assert doctor_gpu.machine(tmp_path / "nothing").devices == 0


class FakeCuda:
    """As much of cupy.cuda as doctor looks at; has: the libraries that load."""

    runtime = types.SimpleNamespace(runtimeGetVersion=lambda: 12090)

    def __init__(self, has):
        self.has = has
        self.nvrtc = types.SimpleNamespace(getVersion=lambda: self.library("nvrtc"))

    def library(self, name):
        if name not in self.has:
            raise RuntimeError(f"lib{name}.so.12 not found\n more")

    @property
    def cublas(self):
        return self.library("cublas")


def two_gpus():
    return [device.GpuInfo(i, "NVIDIA H100 80GB HBM3", f"0000:{i + 1}b:00.0", 85 * 10**9, (9, 0)) for i in range(2)]


@pytest.mark.parametrize("has, problem", [
    (("nvrtc", "cublas"), ""),
    (("cublas",), "NVRTC does not load (libnvrtc.so.12 not found): `pip install hpcmoe[cuda12]` brings"),
    (("nvrtc",), "cuBLAS does not load (libcublas.so.12 not found)"),
])
def test_libraries_of_cuda(monkeypatch, has, problem):
    monkeypatch.setattr(device, "cupy_status", lambda: (types.SimpleNamespace(__version__="14.2.0", cuda=FakeCuda(has)), ""))
    monkeypatch.setattr(device, "gpus", two_gpus)
    monkeypatch.setattr(doctor_gpu, "machine", lambda: Machine(**H100))
    found = {check.name: check for check in doctor_gpu.checks()}
    assert found["GPUs"].value == "2 x NVIDIA H100 80GB HBM3"
    assert found["CuPy"].value == "14.2.0, CUDA 12.9"
    assert found["NVIDIA driver"].value == "550.54.15, CUDA 12.4"
    assert found["CuPy"].problem.startswith(problem) and bool(problem) == bool(found["CuPy"].problem)


def test_two_cupy_wheels(monkeypatch):
    both = (("cupy-cuda12x", "14.2.0"), ("cupy-cuda13x", "14.2.0"))
    monkeypatch.setattr(doctor_gpu, "machine", lambda: Machine(**{**H100, "wheels": both}))
    found = {check.name: check for check in doctor_gpu.checks()}
    assert "pip uninstall cupy-cuda12x cupy-cuda13x" in found["CuPy wheels"].warning


def test_row_of_a_gpu(monkeypatch):
    monkeypatch.setattr(device, "gpus", two_gpus)
    gpu = types.SimpleNamespace(memory=lambda: (80 * 10**9, 85 * 10**9))
    assert doctor_gpu.row(Choice(1, "by local rank", "mlx5_2"), gpu) == {
        "gpu": "GPU 1 (0000:2b:00.0), NIC mlx5_2", "name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "memory_gb": 85.0, "free_gb": 80.0}


def test_tables(capsys):
    """What is printed for ranks with GPUs: both tables, warnings before problems."""
    transports = {"ialltoallv": {"host": "", "device": "rank 1: wrong values arrived"}, "staged": {"host": "", "device": ""}}
    line = {"rank": 0, "host": "n1", "gpu": "GPU 1 (0000:2b:00.0), NIC mlx5_2", "name": "H100", "capability": "9.0",
            "memory_gb": 85.0, "free_gb": 80.0}
    report([Check("a", "x", warning="w"), Check("b", "y", "p")], False, transports, [line])
    out = capsys.readouterr().out
    assert "ialltoallv    pass            rank 1: wrong values arrived\nstaged        pass            pass\n" in out
    assert "   0  n1                85.0, 80.0 GB     9.0         H100, GPU 1 (0000:2b:00.0), NIC mlx5_2\n" in out
    assert "WARNING, a: w\n\nPROBLEM, b: p\n\nA run could not start here." in out
    assert transport_checks({"staged": {"host": "dead", "device": ""}})[0].problem == "no transport passes its self-test"


UCX_MAPS = "7f00-7f01 r-xp 00000000 08:01 42   {}/libuct.so.0\n"


def test_ucx_with_its_cuda_module(tmp_path):
    assert not doctor_gpu._ucx_with_cuda(UCX_MAPS.format(tmp_path))
    (tmp_path / "ucx").mkdir()
    (tmp_path / "ucx" / "libuct_cuda.so.0").touch()
    assert doctor_gpu._ucx_with_cuda(UCX_MAPS.format(tmp_path))


def test_cray_mpich_without_its_gpu_library(monkeypatch):
    monkeypatch.setenv("MPICH_GPU_SUPPORT_ENABLED", "1")
    monkeypatch.delenv("HPCMOE_CUDA_AWARE", raising=False)
    check = doctor_gpu.mpi_check(types.SimpleNamespace(Get_library_version=lambda: "MPI VERSION : CRAY MPICH version 8.1.28"))
    assert check.value.startswith("yes (") and "; MPICH_GPU_SUPPORT_ENABLED=1" in check.value
    assert "libmpi_gtl_cuda.so is not loaded" in check.warning


@pytest.mark.mpi
@pytest.mark.parametrize("mpi, aware, knows", [(None, "", False), ("mpich", "", False), ("mpich", "1", True), ("openmpi", "", True)])
def test_on_the_driver_stand_in(mpi, aware, knows):
    """The whole of it, with device memory that faults when the CPU touches it: an MPI that does not know
    that memory is not asked to; one that does passes everywhere."""
    reason = bed.missing() or (bed.missing_mpi(mpi) if mpi else "")
    if reason:
        pytest.skip(reason)
    if vendor() != "MPICH":
        pytest.skip("the test bed brings its own MPI: once is enough")
    env = bed.lookalike_env(mpi, HPCMOE_CUDA_AWARE=aware)
    if mpi == "openmpi":
        del env["OMPI_MCA_btl"]  # smcuda alone wants a CUDA context before MPI starts
    done = run_ranks(2, ["-m", "hpcmoe", "doctor", "--json"], env=env).check()
    found = json.loads(done.out)
    checks = {check["name"]: check for check in found["checks"]}
    assert found["ok"] and checks["GPUs"]["value"] == "1 x CuPy look-alike"
    assert checks["CUDA-aware MPI"]["value"].startswith("yes" if knows else "no")
    assert ("HPCMOE_CUDA_AWARE=1 tries them" in checks["CUDA-aware MPI"]["warning"]) == (mpi == "mpich" and not knows)
    assert "2 ranks of a node share 1 GPU" in checks["GPU of each rank"]["warning"]
    assert [line["gpu"][:5] for line in found["gpus"]] == ["GPU 0"] * 2 and found["gpus"][1]["free_gb"] > 1
    assert {faults["host"] for faults in found["transports"].values()} == {""}
    passed = [name for name, faults in found["transports"].items() if not faults["device"]]
    assert passed == (["ialltoallv", "pairwise", "staged"] if knows else ["staged"])


RANKS = """
    import json
    from hpcmoe import affinity, device, doctor_gpu
    from mpi4py import MPI
    comm = MPI.COMM_WORLD
    infos = [device.GpuInfo(i, "H100", f"0000:{i + 1}b:00.0", 85 * 10**9, (9, 0)) for i in range(2)]
    device.gpus = lambda: infos
    choice, checks = doctor_gpu.choose(comm)
    some = doctor_gpu.transports(comm, device.Device() if comm.rank % 2 else None)
    every = doctor_gpu.transports(comm, device.Device())
    found = comm.gather([choice.index, checks[0].warning, some, every])
    if comm.rank == 0:
        print(json.dumps(found))
"""


@pytest.mark.mpi
@pytest.mark.parametrize("aware", ["0", "1"])
def test_ranks_with_gpus(aware):
    """Four ranks choose among two GPUs; device buffers (of a device that is the CPU) where MPI says so and all ranks have one."""
    found = json.loads(run_ranks(4, RANKS, env={"HPCMOE_CUDA_AWARE": aware, "CUDA_VISIBLE_DEVICES": "0,1"}).check().out)
    assert sorted(index for index, *_ in found) == [0, 0, 1, 1]
    assert all("4 ranks of a node share 2 GPUs" in warning for _, warning, *_ in found)
    for _, _, some, every in found:
        assert {faults["device"] for faults in some.values()} == {"not tried: rank 0 has no GPU"}
        assert every["staged"] == {"host": "", "device": ""}
        for name in ("ialltoallv", "pairwise"):
            assert every[name]["host"] == "" and bool(every[name]["device"]) == (aware == "0")
            assert aware == "1" or "does not say that it is CUDA-aware" in every[name]["device"]
