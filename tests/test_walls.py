"""The walls between the rooms: imports go one way, and some libraries have one door."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "hpcmoe"
FILES = sorted(ROOT.rglob("*.py"))
BASE = {"errors", "device", "config", "memory", "linear", "onednn", "packed", "products", "files", "doing"}
ALLOWED = {  # room -> rooms (or base modules) it may import
    "model": BASE | {"model"},
    "kernels": BASE | {"model", "kernels"},
    "compute": BASE | {"model", "kernels", "compute"},
    "parallel": BASE | {"model", "compute", "parallel", "report.record"},
    "data": BASE | {"model", "data", "report.progress"},
    "cluster": BASE | {"model", "data", "cluster", "parallel.layout", "parallel.balance", "parallel.nodes", "compute.footprint", "compute.holdings", "parallel.world", "parallel.watched", "report.table", "launch", "affinity", "doctor"},
    "simulate": BASE | {"model", "data", "cluster", "report", "simulate", "jobfile", "placing", "kernels.e4m3", "compute.base", "compute.step",
                        "compute.room", "compute.footprint", "compute.holdings"} | {f"parallel.{name}" for name in (
                            "batch", "check", "layout", "nodes", "ops", "plan", "polling", "replay", "requestlist", "schedule")},  # the schedule, not the engine
    "calibrate": BASE | {"model", "data", "cluster", "compute", "simulate", "report", "parallel", "calibrate", "jobfile", "job", "prepare", "launch", "doctor", "predicting", "bench.bed", "bench.gpu", "bench.jobs", "bench.timing"},
    "plan": BASE | {"model", "cluster", "report", "simulate", "plan", "placing", "compute.base", "compute.room", "parallel.layout", "parallel.plan",
                    "parallel.schedule"},
    "paper": BASE | {"model", "data", "cluster", "simulate", "report", "paper", "compute.base"} | {f"parallel.{name}" for name in ("balance", "check", "layout", "schedule")},
    "report": {"errors", "files", "report"},
}
DOORS = {"cupy": {"device.py"}, "matplotlib": {"report/plots.py"}, "torch": {"bench/peers.py"}, "transformers": {"bench/peers.py"}}


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "hpcmoe" or (node.module or "").count(".") == 1 else [node.module]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    here = path.relative_to(ROOT)
    room = here.parts[0] if len(here.parts) > 1 else ""
    for name in imports(path):
        library = name.split(".")[0]
        if library in DOORS:
            assert str(here) in DOORS[library], f"{here} imports {name}"
        if library == "h5py":
            assert room == "data" or here.name == "doctor.py", f"{here} imports {name}"
        if library == "mpi4py" and name != "mpi4py":  # the bare package initialises nothing
            assert room in ("parallel", ""), f"{here} imports {name}"
        if library == "hpcmoe" and room in ALLOWED:
            inside = name.split(".", 1)[1]
            assert any(inside == ok or inside.startswith(ok + ".") for ok in ALLOWED[room]), f"{here} imports {name}"


def test_packages_re_export_nothing():
    assert all(path.read_text().strip() == "" for path in FILES if path.name == "__init__.py")


def test_files_stay_short():
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 320}
    assert long == {}
