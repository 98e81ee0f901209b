"""What the page is made for: model, cluster, kernels, from the command line or by default."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hpcmoe.cluster.clusterfile import read_cluster
from hpcmoe.cluster.gemm_fit import CHIPS
from hpcmoe.cluster.kernels import find_calibration, read_calibration
from hpcmoe.config import ModelConfig
from hpcmoe.errors import at
from hpcmoe.paper.constants import ASSUMED, CITED, FITTED, MEASURED, Constant, gemm_standing, read_constants
from hpcmoe.paper.roofline import Rates
from hpcmoe.paper.steady import Case, Machine, Steady, clock_all, steady
from hpcmoe.parallel.layout import Layout
from hpcmoe.simulate.modelfile import read_model

INPUTS = Path(__file__).resolve().parents[2] / "inputs"
MODEL, CLUSTER = INPUTS / "models" / "paper.toml", INPUTS / "clusters" / "dgx_h100_ndr.toml"
KEYS = 24      # mean of 16 prompt and 16 output tokens, the batch of inputs/paper_*.toml
SHARDS = 8     # the most that a width is divided by
GPUS = 64      # of the proposal
BATCH = 1024   # tokens of the paper's batch


@dataclass(frozen=True)
class Setup:
    """memory_gb_per_s: of a GPU by its data sheet; keys: tokens in the cache of a sequence; jobs: processes that compute."""

    model: ModelConfig
    machine: Machine
    cluster_path: str
    constants: tuple[Constant, ...]
    memory_gb_per_s: float
    keys: int
    jobs: int

    # ------------------------------------------------------------ cases
    def case(self, layout: Layout, batch: int, micros: int = 1, **more) -> Case:
        return Case(more.pop("model", self.model), layout, batch, more.pop("keys", self.keys), micros, **more)

    def proposal(self, batch: int = BATCH, micros: int = 1, **more) -> Case:
        """A layer per stage, one expert of it on each rank."""
        return self.case(Layout(1, 4, 16), batch, micros, **more)

    def baseline(self, batch: int = BATCH, micros: int = 1, **more) -> Case:
        return self.case(Layout(1, 2, 1, 8), batch, micros, **more)

    def clock(self, cases: list[Case], machine: Machine | None = None) -> list[Steady | None]:
        """None for a case that does not fit the memory."""
        return clock_all([(case, machine or self.machine) for case in cases], self.jobs)

    def must(self, cases: list[Case], machine: Machine | None = None) -> list[Steady]:
        """Raises UserError for the first case that does not fit."""
        return [own or steady(case, machine or self.machine) for own, case in zip(self.clock(cases, machine), cases)]

    # ------------------------------------------------------------ what it rests on
    @property
    def ranks_per_node(self) -> int:
        return self.machine.cluster.nodes.ranks_per_node

    @property
    def sheet(self) -> Rates:
        return Rates.of_data_sheet(self.machine.cluster, self.memory_gb_per_s, self.machine.calibration.gemm.item_bytes)

    @property
    def reached(self) -> Rates:
        return Rates.reached(*self.machine)

    def of(self, standing: str) -> list[Constant]:
        return [c for c in self.constants if c.standing == standing]

    def rests(self) -> str:
        """One line for the end of a section: what all its tables and pictures stand on."""
        names: dict[str, list[str]] = {}
        for standing in (MEASURED, FITTED, ASSUMED):
            keys: dict[str, list[str]] = {}
            for c in self.of(standing):
                keys.setdefault(c.table, []).append(c.key)
            names[standing] = [f"`{table}` ({', '.join(found)})" for table, found in keys.items()]
        names[gemm_standing(self.machine.calibration.source)].insert(0, "`gemm` (products)")
        said = [f"{standing}: {', '.join(found)}" for standing, found in names.items() if found]
        return f"<sub>All of this section is simulated. What it rests on is {'; '.join(said)}; {CITED}: the other {len(self.of(CITED))} numbers ([constants](#constants)).</sub>\n"


def command(args) -> str:
    """The command that makes this page again: what was given, but for --jobs, which changes nothing."""
    options = ("cluster", "hidden", "expert_width", "attention_width", "top_k", "context", "memory_gb_per_s")
    given = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in options if getattr(args, name) is not None]
    return " ".join(["python -m hpcmoe paper --out", args.out, *given])


def read(args) -> Setup:
    """Raises UserError for whatever the user can mend."""
    path = args.cluster or str(CLUSTER)
    for name in ("hidden", "expert_width", "attention_width", "top_k", "context", "jobs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise at("paper", "--" + name.replace("_", "-"), value, "a number >= 1")
    cluster = read_cluster(path, simulate=True)
    if cluster.ranks < GPUS or cluster.nic is None:
        raise at(path, "nodes.count", cluster.nodes.count, f"at least {-(-GPUS // cluster.nodes.ranks_per_node)} nodes with adapters: "
                 f"{GPUS} ranks at nodes.ranks_per_node = {cluster.nodes.ranks_per_node}")
    kernels = find_calibration(cluster.calibration, path)
    calibration = read_calibration(kernels)
    if calibration.gemm.units == 1:
        raise at(str(kernels), "gemm.units", 1, "the calibration of a GPU")
    shown = Path(path).resolve()
    shown = shown.relative_to(INPUTS.parent) if shown.is_relative_to(INPUTS.parent) else path
    return Setup(_model(args), Machine(cluster, calibration), str(shown), tuple(read_constants(path, kernels)), _memory(args, cluster.calibration),
                 args.context or KEYS, args.jobs)


def _model(args) -> ModelConfig:
    model = read_model(str(MODEL))
    head = model.attention.head_dim
    width = args.attention_width or model.attention.heads * head
    if width % (head * SHARDS):
        raise at("paper", "--attention-width", width, f"a multiple of {head * SHARDS}: heads of {head}, divided over {SHARDS} GPUs")
    f = args.expert_width or model.expert.f
    if f % SHARDS:
        raise at("paper", "--expert-width", f, f"a multiple of {SHARDS}: it is divided over {SHARDS} GPUs")
    top_k = args.top_k or model.router.top_k
    if top_k > SHARDS:
        raise at("paper", "--top-k", top_k, f"at most {SHARDS}, the fewest experts of a layer on this page")
    return resized(model, d=args.hidden or model.d, f=f, width=width, top_k=top_k)


def resized(model: ModelConfig, d: int | None = None, f: int | None = None, width: int | None = None, top_k: int | None = None,
            experts: int | None = None) -> ModelConfig:
    """The model with another width, expert width, attention width, top-k, number of experts; what is left out stays."""
    heads = width // model.attention.head_dim if width else model.attention.heads
    kv_heads = heads * model.attention.kv_heads // model.attention.heads
    return replace(model, d=d or model.d, attention=replace(model.attention, heads=heads, kv_heads=kv_heads),
                   expert=replace(model.expert, f=f or model.expert.f),
                   router=replace(model.router, top_k=top_k or model.router.top_k, experts=experts or model.router.experts))


def _memory(args, chip: str) -> float:
    """GB/s of the data sheet."""
    if args.memory_gb_per_s is None and chip not in CHIPS:
        raise at("paper", "--memory-gb-per-s", None, f"a number, since no data sheet is known of the calibration {chip!r} (only of {', '.join(CHIPS)})")
    given = CHIPS[chip].memory_gb_per_s if args.memory_gb_per_s is None else args.memory_gb_per_s
    if not 0 < given < float("inf"):
        raise at("paper", "--memory-gb-per-s", given, "a number > 0")
    return given
