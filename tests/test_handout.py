"""Requests shared by replicas: the rule against its promises, whole batches over one rank's messages, and real runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from hpcmoe.compute.base import Sizes
from hpcmoe.compute.step import SAMPLED, SCORED, Choices, Work
from hpcmoe.parallel.handout import HandOut, Supply
from hpcmoe.parallel.requestlist import RequestList
from hpcmoe.parallel.plan import UNLIMITED, Room
from local import choices, run_job, write_prompts
from mpi import run_ranks, started
from tiny import VOCAB, tiny_job, tiny_model

PROGRAM = Path(__file__).parent / "programs" / "slow_replica.py"


def works(lengths, max_tokens=0) -> list[Work]:
    return [Work(i, np.arange(n), max_tokens, 0.0, 0, 1.0, 0, (), False) for i, n in enumerate(lengths)]


# ---------------------------------------------------------------- the rule
@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 7), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 2000)), st.randoms())
@settings(deadline=None)
def test_every_request_is_given_once_in_shares_that_shrink(lengths, leaders, sequences, tokens, random):
    """Against a list kept by hand: leaders come back in any order until nothing is left."""
    left = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    todo, room = RequestList(works(lengths), leaders), Room(sequences, tokens or UNLIMITED)
    start = todo.start(room)
    given_out = [w.index for part in start for w in part]
    assert len(start) == leaders and sorted(given_out) == sorted(left[:len(given_out)])  # the longest ones
    amount = sum(lengths[i] for i in given_out)
    assert len(given_out) <= leaders * sequences
    assert len(given_out) <= leaders or amount <= min(sum(lengths) / 2, leaders * room.tokens)
    assert not any(part == [] for part in start) or len(given_out) == len(lengths) < leaders
    left = left[len(given_out):]
    for _ in range(len(lengths) + 1):
        if not left:
            break
        asked = Room(random.randint(1, sequences), random.randint(1, room.tokens))
        share = [w.index for w in todo.share(asked)]
        bound = min(sum(lengths[i] for i in left) / (2 * leaders), asked.tokens)
        assert 1 <= len(share) <= asked.sequences and share == left[:len(share)]
        assert len(share) == 1 or sum(lengths[i] for i in share) <= bound
        if len(share) < min(asked.sequences, len(left)):  # one more would have been too much
            assert sum(lengths[i] for i in left[:len(share) + 1]) > bound
        left = left[len(share):]
    assert not left and todo.share(Room(5, 5)) == [] and todo.tokens == 0


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(2, 6), st.randoms())
@settings(deadline=None)
def test_replicas_of_unequal_speed_end_almost_together(lengths, leaders, random):
    """Leaders that do one request after the other, each at its own speed: none is idle at the end for longer than the
    last request of another takes there, for whoever is idle would have got it."""
    speed = [random.uniform(0.2, 1.0) for _ in range(leaders)]
    todo = RequestList(works(lengths), leaders)
    queues = [list(part) for part in todo.start(Room(1, UNLIMITED))]
    clock, last, free = [0.0] * leaders, [0.0] * leaders, set(range(leaders))
    while free:
        leader = min(free, key=lambda b: clock[b])
        if not queues[leader]:
            queues[leader] = todo.share(Room(1, UNLIMITED))
        if not queues[leader]:
            free.remove(leader)
            continue
        last[leader] = len(queues[leader].pop(0).tokens) / speed[leader]
        clock[leader] += last[leader]
    assert all(end - min(clock) <= mine + 1e-9 for end, mine in zip(clock, last))


def test_a_single_replica_gets_all_at_once():
    from hpcmoe.parallel.plan import hand_out
    todo = works([5, 1, 9, 3, 3, 8])
    dealt = RequestList(todo, 4).start(None)
    assert [[w.index for w in part] for part in dealt] == [[w.index for w in part] for part in hand_out(todo, 4)]


def test_how_tokens_are_chosen_is_found_by_place_in_the_input():
    asked = [Work(i, np.arange(2), 4, 0.25 * i, i, 0.5, -i, (), i == 3) for i in (3, 1)]
    found = Choices.of(asked, 5)
    assert found.sampling.temperature_n.tolist() == [0, 0.25, 0, 0.75, 0] and found.sampling.top_k_n.tolist() == [0, 1, 0, 3, 0]
    assert found.sampling.seed_n.tolist() == [0, 2**64 - 1, 0, 2**64 - 3, 0] and found.sampling.request_n.tolist() == list(range(5))
    assert found.logprobs.tolist() == [False, False, False, True, False]


# ---------------------------------------------------------------- messages and batches, on one rank
@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(1, 3), st.integers(1, 3), st.integers(0, 6), st.integers(1, 9),
       st.booleans(), st.booleans(), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_a_leader_that_asks_serves_every_request_once(seed, n, micros, slots, spare, chunk, score, paged, late):
    """Rank 0 is its own leader, and answers every `late` rounds; a made-up model answers at random."""
    from hpcmoe.parallel.batch import Batcher, Pages
    rng = np.random.default_rng(seed)
    todo = [Work(2 * i, rng.integers(3, 50, rng.integers(1, 30)), 0 if score else int(rng.integers(1, 9)), 0.0, 0, 1.0, 0, (2,), True)
            for i in range(n)]
    pages = Pages(int(rng.integers(5, 12)), 8) if paged else None
    sizes = Sizes(micros, 1, slots, slots + spare, 40, len(pages.free) if pages else 0, 8, 0)
    out = HandOut(started().COMM_SELF, todo, True, 2)
    batcher = Batcher(out.start(sizes), micros, slots, slots + spare, chunk, score, lambda: 0.0, pages, out.supply)
    of, went_in = {w.index: w for w in todo}, {w.index: [] for w in todo}
    for step in range(4000):
        batch, token_t = batcher.build(step % micros)
        tokens, logprobs, first = [], [], 0
        for q, count in enumerate(batch.segments.count_q):
            work, start = of[batch.request_q[q]], batch.segments.start_q[q]
            went_in[work.index] += token_t[first:first + count].tolist()
            if batch.emit_q[q] == SAMPLED:
                tokens.append(int(rng.integers(0, 6)))
                logprobs.append(0.0)
            if batch.emit_q[q] == SCORED:
                text = [*work.tokens, -1]  # the token after each row, -1 after the last
                assert batch.next_t[first:first + count].tolist() == text[start + 1:start + 1 + count]
                logprobs += [0.0] * (batch.next_t[first:first + count] >= 0).sum()
            first += count
        assert score or len(batch.next_t) == 0
        alive = batch.alive
        batcher.accept(step % micros, np.array(tokens, dtype=int), np.array(logprobs))
        if not alive:
            break
        if step // micros % late == 0:
            out.serve()
    out.close()
    assert not alive and not out.todo.left and not batcher.busy
    assert sorted(s.work.index for s in batcher.finished) == [w.index for w in todo]
    for s in batcher.finished:
        assert went_in[s.work.index] == [*s.work.tokens, *s.output[:-1]]


def test_requests_that_end_at_every_step_leave_no_place_empty():
    """Answers come one round late; as long as the list is long, all places are taken at every step."""
    from hpcmoe.parallel.batch import Batcher
    out = HandOut(started().COMM_SELF.Dup(), works([2] * 400, max_tokens=1), True, 2)
    batcher = Batcher(out.start(Sizes(1, 1, 8, 16, 8, 0, 0, 0)), 1, 8, 16, 8, False, lambda: 0.0, None, out.supply)
    filled = []
    while out.todo.left:
        batch, _ = batcher.build(0)
        filled.append(len(batch.request_q))
        batcher.accept(0, np.full(len(batch.emit_q), 9), np.zeros(len(batch.emit_q)))
        out.serve()
    assert len(filled) > 40 and filled[0] == 8 and set(filled[2:40]) == {8}


def test_an_unanswered_question_is_seen_by_the_watch(monkeypatch):
    from hpcmoe.doing import HERE
    comm = started().COMM_SELF.Dup()
    monkeypatch.setattr(HERE, "question", None)
    supply = Supply(comm, True)
    supply.ask(Room(3, 5))
    assert HERE.question[0] == "more requests from rank 0" and supply.take() == []
    message = np.zeros(2, np.int64)
    comm.Recv(message, 0, 10)
    assert message.tolist() == [3, 5] and HERE.question is not None
    answer = comm.isend(([], False), 0, 11)
    while supply.question is not None:
        supply.take()
    answer.wait()
    assert HERE.question is None and not supply.open


# ---------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Prompts of very unequal length in adverse order, and what one rank makes of them."""
    folder = tmp_path_factory.mktemp("handout")
    tiny_model(folder / "model.h5")
    rng = np.random.default_rng(4)
    prompts = [rng.integers(3, VOCAB, n) for n in [1, 2, 3] * 6 + [70, 60]]
    outputs = [1 + 5 * (i % 3) for i in range(18)] + [50, 40]
    write_prompts(folder / "requests.jsonl", prompts, max_tokens=outputs, temperature=0.7, seed=list(range(20)), logprobs=1, ignore_eos=True)
    sets = {"weights.file": folder / "model.h5", "requests.file": folder / "requests.jsonl"}
    return folder, sets, {task: run_job(1, folder, {**sets, "task": task}, name=f"base-{task}")[1] for task in ("generate", "score")}


RUNS = [(2, {"layout.dp": 2}), (3, {"layout.dp": 3, "run.max_sequences": 1}), (4, {"layout.dp": 2, "layout.pp": 2}),
        (4, {"layout.dp": 2, "layout.leaders": 1, "run.max_sequences": 2}), (6, {"layout.dp": 3, "layout.pp": 2, "run.batch_tokens": 8}),
        (4, {"layout.dp": 2, "run.lanes": 2, "run.micro_batches": 3}), (8, {"layout.dp": 8})]


@pytest.mark.mpi
@pytest.mark.parametrize("task", ["generate", "score"])
@pytest.mark.parametrize("ranks, more", RUNS, ids=lambda v: " ".join(f"{k.split('.')[1]}={x}" for k, x in v.items()) if isinstance(v, dict) else str(v))
def test_replicas_share_the_requests(case, ranks, more, task):
    folder, sets, base = case
    _, rows, report = run_job(ranks, folder, {**sets, **more, "task": task}, name=f"run-{task}-{len(more)}")
    assert [row["custom_id"] for row in rows] == [f"r{i}" for i in range(20)]
    ran = [i for i, row in enumerate(base[task]) if row["response"]]  # a text of one token cannot be scored
    assert ran == [i for i, row in enumerate(rows) if row["response"]]
    for mine, expected in zip(choices([rows[i] for i in ran]), choices([base[task][i] for i in ran])):
        assert mine.get("token_ids") == expected.get("token_ids")
        found, wanted = ([v for v in c["logprobs"]["token_logprobs"] if v is not None] for c in (mine, expected))
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    replicas = report["per_replica"]
    assert len(replicas) == more["layout.dp"] and sum(r["requests"] for r in replicas) == len(ran)
    assert sum(r["ranks"] for r in replicas) == ranks
    assert sum(r["total_tokens_per_s"] for r in replicas) == pytest.approx(report["throughput"]["total_tokens_per_s"])


@pytest.mark.mpi
def test_more_leaders_than_requests(tmp_path):
    job = tiny_job(tmp_path, requests=2)
    run_ranks(4, ["-m", "hpcmoe", "run", str(job), "--quiet", "--output", str(tmp_path / "out"), "--set", "layout.dp=4"], timeout=60).check()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sorted(r["requests"] for r in report["per_replica"]) == [0, 0, 1, 1]
    assert {r["last_finish_s"] for r in report["per_replica"] if not r["requests"]} == {None}


@pytest.mark.mpi
@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_replica_gets_fewer_requests(tmp_path, slow):
    """One of two replicas sleeps in each of its rounds, be it rank 0's or the other."""
    job, out = tiny_job(tmp_path, requests=60, max_tokens=8), tmp_path / "out"
    run_ranks(2, [PROGRAM, slow, 0.05, "run", job, "--quiet", "--output", out, "--set", "layout.dp=2", "--set", "run.max_sequences=4"],
              timeout=120).check()
    report = json.loads((out / "report.json").read_text())
    requests = [r["requests"] for r in report["per_replica"]]
    assert sum(requests) == 60 and requests[slow] < requests[1 - slow]
    assert len((out / "outputs.jsonl").read_text().splitlines()) == 60


@pytest.mark.mpi
@pytest.mark.parametrize("rank, how", [(0, "raise"), (1, "raise"), (1, "kill")])
def test_a_failure_in_one_replica_ends_the_job(tmp_path, rank, how):
    job = tiny_job(tmp_path, requests=40, max_tokens=20)
    done = run_ranks(2, ["-m", "hpcmoe", "run", str(job), "--quiet", "--output", str(tmp_path / "out"), "--set", "layout.dp=2"],
                     env={"HPCMOE_FAIL": f"rank={rank},step=3,how={how}"}, timeout=60)
    assert done.rc not in (0, None) and not (tmp_path / "out" / "report.json").exists()


@pytest.mark.mpi
def test_no_tally_is_left_behind_when_all_replicas_are_done():
    """A replica that waits for the others says nothing more: rank 0 may have stopped listening. Three replicas that would speak at every turn."""
    run_ranks(3, """
        import time
        from types import SimpleNamespace
        from mpi4py import MPI
        from hpcmoe.parallel.world import Tally
        Tally.EVERY_S = 0.0
        comm = MPI.COMM_WORLD
        world = SimpleNamespace(here=SimpleNamespace(dp=comm.rank), pipe=MPI.COMM_SELF, comm=comm, layout=SimpleNamespace(dp=3))
        for turn in range(40):
            tally = Tally(world)
            tally.update(1, 10, time.monotonic())
            if comm.rank == 1:
                time.sleep(0.005)
            tally.all_done(lambda: tally.update(2, 20 + turn, time.monotonic()))
            comm.Barrier()
            assert not comm.Iprobe(MPI.ANY_SOURCE, Tally.TAG), turn
            assert comm.rank or tally.others == {1: (1, 10), 2: (1, 10)}, tally.others
            comm.Barrier()  # before the next turn's
    """).check()
