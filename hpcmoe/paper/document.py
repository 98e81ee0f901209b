"""docs/paper.md and its pictures, from beginning to end."""

from __future__ import annotations

from pathlib import Path

from hpcmoe.errors import EXIT_OK, at
from hpcmoe.files import check_folder, replacing
from hpcmoe.paper.claims import assumption, claims, compared
from hpcmoe.paper.constants import ASSUMED, gemm_standing
from hpcmoe.paper.crossover import crossover
from hpcmoe.paper.goal import untapped
from hpcmoe.paper.scaling import scaling
from hpcmoe.paper.setup import Setup, command, read
from hpcmoe.paper.words import table
from hpcmoe.report.plots import check_plots


def run(args) -> int:
    """Runs `paper`; its exit code. Raises UserError for whatever the user can mend, before anything is written."""
    setup, out = read(args), Path(args.out)
    if out.is_dir():
        raise at("paper", "--out", args.out, "a file")
    check_plots()
    pictures = out.parent / "pictures"
    check_folder(pictures)
    text = document(setup, command(args), pictures)
    with replacing(out) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
    print(f"page in {out}, pictures in {pictures}")
    return EXIT_OK


def document(setup: Setup, made_by: str, pictures: Path) -> str:
    """The page; draws its pictures."""
    found = claims(setup)
    sections = [compared(setup, found), untapped(setup, found[1], pictures), scaling(setup, pictures), crossover(setup, pictures)]
    short = "In short:\n\n" + "".join(f"- {section.short}\n" for section in sections)
    return "\n".join(part.rstrip() + "\n" for part in (head(setup, made_by), short, assumption(setup), *(s.text for s in sections), constants(setup)))


def head(setup: Setup, made_by: str) -> str:
    c = setup.machine
    return f"""# The paper, reproduced and taken apart

The paper that this program implements reports, for a model of {setup.model.layers} MoE layers of {setup.model.router.experts} experts on H100 GPUs, a proposal (one expert per GPU,
64 GPUs) and a baseline (tensor and pipeline parallel, 16 GPUs). This page holds its figures against the simulator of this project ([simulate.md](simulate.md)), which clocks the
schedule that the engine runs. **Nothing here was measured on a cluster.** Every number is computed by

```sh setup
{made_by}
```

on {c.cluster.name} (`{setup.cluster_path}`) with kernels of {c.calibration.machine}; run it with your own assumptions (`hpcmoe paper --help`). Do not edit the page, run the command again.
Decode alone, at full batch, every step like the one before.
"""


def constants(setup: Setup) -> str:
    """What everything rests on."""
    g, source = setup.machine.calibration.gemm, setup.machine.calibration.source
    rows = [["products: `gemm`, all numbers", f"{g.memory_gb_per_s:,.0f} GB/s, {g.units * g.unit_gflop_per_s / 1e3:,.0f} TFLOP/s", gemm_standing(source), source]]
    rows += [[f"`{c.name}`", f"{c.value:,g}", c.standing, c.source or "no source given"] for c in setup.constants]
    count = len(setup.of(ASSUMED))
    return f"""## Constants

Of cluster and calibration file, with what the files say of each. Nobody has measured the {count} that are assumed; section 2 says what they weigh.

{table(["constant", "value", "standing", "source"], rows)}"""
