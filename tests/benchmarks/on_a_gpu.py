"""Steps of real runs on one H200 (docs/measurements/h200.json) beside what the simulator says of them; prints a table.

    python tests/benchmarks/on_a_gpu.py

Nothing was fitted to these runs: the calibration has kernels, launches and the engine's host time, each measured alone.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from hpcmoe.bench.layers import CONTEXT, MIXTRAL, OUTPUT, PROMPT, SCOUT, VOCAB, Shape  # noqa: E402

MEASURED = ROOT / "docs" / "measurements" / "h200.json"
CLUSTER = ROOT / "inputs" / "clusters" / "dgx_h200_ndr.toml"


def measured() -> list[tuple[Shape, int, float]]:
    """(shape, sequences, milliseconds of the median decode step) of sections `layer` and `stack`."""
    sections, found = json.loads(MEASURED.read_text())["sections"], []
    for point in sections["layer"]["points"]["layers"]:
        shape = replace(SCOUT, experts=point["experts"])
        layer, rest = point["layer_ms"], point["rest_of_step_ms"]
        found += [(replace(shape, layers=n), point["tokens"], rest + n * layer) for n in (shape.layers, 2 * shape.layers)]
    for point, shape in zip(sections["stack"]["points"]["stacks"], (MIXTRAL, SCOUT)):
        found.append((shape, point["sequences"], 1e3 * point["sequences"] / point["decode_tokens_per_s"]))
    return found


def predicted(shape: Shape, sequences: int, folder: Path) -> float:
    """The same step by `hpcmoe simulate` on one GPU of a DGX H200."""
    model = folder / "model.toml"
    model.write_text(f'family = "mixtral"\nvocab = {VOCAB}\nd = {shape.d}\nlayers = {shape.layers}\ncontext = {CONTEXT}\n'
                     f'[attention]\nheads = {shape.heads}\nkv_heads = {shape.kv_heads}\nhead_dim = {shape.head_dim}\n'
                     f'[router]\nexperts = {shape.experts}\ntop_k = {shape.top_k}\n[expert]\nf = {shape.f}\n')
    sets = {"run.micro_batches": 1, "run.lanes": 1, "run.batch_tokens": 16384, "run.max_sequences": sequences}
    subprocess.run([sys.executable, "-m", "hpcmoe", "simulate", str(model), "--cluster", str(CLUSTER), "--gpus", "1",
                    "--sequences", str(sequences), "--prompt-tokens", str(PROMPT), "--output-tokens", str(OUTPUT), "--output", str(folder / "out"),
                    *[word for key, value in sets.items() for word in ("--set", f"{key}={value}")]],
                   check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return json.loads((folder / "out" / "report.json").read_text())["steps"]["decode_step_p50_ms"]


def compare() -> list[tuple[Shape, int, float, float]]:
    """(shape, sequences, measured ms, predicted ms) of each run."""
    with tempfile.TemporaryDirectory() as folder:
        return [(shape, n, ms, predicted(shape, n, Path(folder))) for shape, n, ms in measured()]


def main() -> None:
    rows = compare()
    print("| shape | layers | experts on the rank | sequences | measured, ms | predicted, ms | ratio |\n|---|---|---|---|---|---|---|")
    for shape, n, ms, said in rows:
        print(f"| {shape.name} | {shape.layers} | {shape.experts} | {n} | {ms:.2f} | {said:.2f} | {said / ms:.2f} |")
    print(f"mean absolute error {100 * sum(abs(said / ms - 1) for *_, ms, said in rows) / len(rows):.1f} %")


if __name__ == "__main__":
    main()
