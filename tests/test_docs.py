"""Every shell command of README and docs is run as it stands; blocks for a cluster are checked for syntax.

A block ```sh is run in a copy of the checkout. ```sh cluster needs a cluster, ```sh setup sets up or tests
the checkout itself: those two are read by `bash -n` only.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpi import ROOT, environment

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("inputs/**/*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXCUSED = ("cluster", "setup")


def blocks() -> list:
    found = []
    for page in PAGES:
        for number, (info, text) in enumerate(FENCE.findall(page.read_text())):
            words = info.split()
            if words and words[0] in ("sh", "bash", "shell", "console"):
                found.append(pytest.param(words, text, id=f"{page.relative_to(ROOT)}-{number}"))
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout, with .venv standing for this environment."""
    copy = tmp_path_factory.mktemp("docs") / "checkout"
    skip = shutil.ignore_patterns(".venv*", ".git", "hpcmoe-out", "__pycache__", ".pytest_cache", ".hypothesis")
    shutil.copytree(ROOT, copy, ignore=skip)
    (copy / ".venv").symlink_to(sys.prefix)
    return copy


@pytest.mark.parametrize("info, text", blocks())
def test_shell_blocks(info, text, checkout):
    assert info[0] == "sh" and set(info[1:]) <= set(EXCUSED), f"```{' '.join(info)}: expected sh, sh cluster or sh setup"
    if info[1:]:
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.stderr == ""
        return
    env = environment({"HPCMOE_VENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"})
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], cwd=checkout, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_there_are_blocks():
    assert any("jobs/demo.sh" in parameter.values[1] for parameter in blocks())


def keys() -> list[str]:
    from hpcmoe.config import JobConfig
    found = []
    for field in dataclasses.fields(JobConfig):
        inner = dataclasses.fields(field.default) if dataclasses.is_dataclass(field.default) else []
        found += [f"{field.name}.{name.name}" for name in inner] or [field.name]
    return found


def table_of_keys() -> dict[str, str]:
    """Key -> default, as docs/running.md has them."""
    found = {}
    for line in (ROOT / "docs" / "running.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        names = re.findall(r"`([a-z_]+(?:\.[a-z_]+)?)`", cells[1]) if len(cells) == 5 else []
        if names and (names[0] == "task" or "." in names[0]):
            values = cells[2].split(", ")
            found.update({name: values[min(i, len(values) - 1)].strip("`") for i, name in enumerate(names)})
    return found


def test_every_key_of_a_job_is_listed_with_its_default():
    from hpcmoe.config import JobConfig, to_dict
    plain = to_dict(JobConfig())
    shown = table_of_keys()
    assert sorted(shown) == sorted(keys())
    for key in keys():
        section, _, name = key.rpartition(".")
        value = plain[section][name] if section else plain[name]
        expected = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        assert shown[key] == expected, key


def test_variables_are_listed():
    """Each HPCMOE_ variable that the program or its scripts read has a line in docs/running.md."""
    sources = [*ROOT.glob("hpcmoe/**/*.py"), *ROOT.glob("jobs/*")]
    read = {name for path in sources for name in re.findall(r"\bHPCMOE_[A-Z_]+\b", path.read_text())}
    page = (ROOT / "docs" / "running.md").read_text()
    internal = {"HPCMOE_PYTHON"}
    assert sorted(name for name in read - internal if f"`{name}" not in page) == []


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not Path(page.parent, target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []
