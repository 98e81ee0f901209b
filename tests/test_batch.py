"""Continuous batching against its promises, with a made-up model that answers at random."""

import numpy as np
from hypothesis import given, settings, strategies as st

from hpcmoe.compute.step import NONE, SAMPLED, SCORED, Batch, Work, header_size
from hpcmoe.parallel.batch import Batcher
from hpcmoe.parallel.plan import hand_out


def works(rng, n, score=False):
    return [Work(i, rng.integers(3, 50, rng.integers(1, 30)), 0 if score else int(rng.integers(1, 9)), 0.0, 0, 1.0, 0, (2,), True)
            for i in range(n)]


@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(1, 3), st.integers(1, 4), st.integers(0, 6), st.integers(1, 9), st.booleans())
@settings(deadline=None, max_examples=80)
def test_every_request_is_served_whole_whatever_the_sizes(seed, n, micros, slots, spare, chunk, score):
    rng = np.random.default_rng(seed)
    todo = works(rng, n, score)
    rows = slots + spare
    batcher = Batcher(todo, micros, slots, rows, chunk, score, clock=lambda: 0.0)
    fed = {i: [] for i in range(n)}      # tokens that went in, by request
    given_out = {i: [] for i in range(n)}
    where = {}
    for step in range(2000):
        micro = step % micros
        batch, token_t = batcher.build(micro)
        assert Batch.of(batch.header()).header().tolist() == batch.header().tolist()
        assert batch.rows == len(token_t) <= rows and len(batch.header()) <= header_size(rows)
        s = batch.segments
        assert len(set(s.slot_q)) == len(s.slot_q) and all(micro * slots <= slot < (micro + 1) * slots for slot in s.slot_q)
        decoding = [q for q in range(len(s.slot_q)) if s.start_q[q] >= len(todo[batch.request_q[q]].tokens)]
        tokens, logprobs, first = [], [], 0
        for q, (slot, start, count, emit, number) in enumerate(zip(s.slot_q, s.start_q, s.count_q, batch.emit_q, batch.request_q)):
            assert where.setdefault(number, slot) == slot and start == len(fed[number])
            assert count == 1 if q in decoding else count <= chunk
            fed[number] += token_t[first:first + count].tolist()
            first += count
            prompt = len(todo[number].tokens)
            assert emit == (SCORED if score else SAMPLED if len(fed[number]) >= prompt else NONE)
            if emit == SAMPLED:
                tokens.append(int(rng.integers(0, 6)))
                given_out[number].append(tokens[-1])
                logprobs.append(float(-len(logprobs)))
            if emit == SCORED:
                logprobs += [float(p) for p in range(start, start + count) if p + 1 < prompt]
        alive = batch.alive
        batcher.accept(micro, np.array(tokens, dtype=int), np.array(logprobs))
        if not alive:
            break
    assert not alive and len(batcher.finished) == n
    for done in batcher.finished:
        work, out = done.work, given_out[done.work.index]
        assert done.output == out
        if score:
            assert fed[done.work.index] == work.tokens.tolist() and done.finish == "score"
            assert np.concatenate(done.logprobs).tolist() == list(range(len(work.tokens) - 1))
        else:
            assert fed[done.work.index] == work.tokens.tolist() + out[:-1]
            assert done.finish == ("stop" if out[-1] == 2 else "length")
            assert 2 not in out[:-1] and (len(out) == work.max_tokens or out[-1] == 2)


def test_a_long_prompt_delays_decoding_by_no_more_than_its_chunk():
    long = Work(0, np.arange(3, 100), 4, 0.0, 0, 1.0, 0, (), False)
    short = Work(1, np.arange(3, 5), 40, 0.0, 0, 1.0, 0, (), False)
    batcher = Batcher([long, short], 1, 2, 16, 10, False, clock=lambda: 0.0)
    for step in range(9):
        batch, _ = batcher.build(0)
        rows = dict(zip(batch.request_q.tolist(), batch.segments.count_q.tolist()))
        assert rows[0] == 10 and rows[1] == (2 if step == 0 else 1)
        batcher.accept(0, np.array([5]), np.zeros(1))


def test_a_finished_sequence_leaves_and_a_waiting_one_enters_at_the_next_step():
    jobs = [Work(i, np.array([3, 4]), length, 0.0, 0, 1.0, 0, (), False) for i, length in enumerate((1, 3, 2))]
    batcher = Batcher(jobs, 1, 2, 8, 8, False, clock=lambda: 0.0)
    seen = []
    for _ in range(3):
        batch, _ = batcher.build(0)
        seen.append(sorted(batch.request_q.tolist()))
        batcher.accept(0, np.array([9] * len(batch.emit_q)), np.zeros(len(batch.emit_q)))
    assert seen == [[0, 1], [1, 2], [1, 2]] and not batcher.alive


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 9))
def test_requests_are_dealt_once_and_evenly(lengths, bins):
    todo = [Work(i, np.zeros(n, int), 0, 0.0, 0, 1.0, 0, (), False) for i, n in enumerate(lengths)]
    dealt = hand_out(todo, bins)
    assert sorted(w.index for part in dealt for w in part) == list(range(len(lengths)))
    loads = [sum(len(w.tokens) for w in part) for part in dealt]
    assert all([w.index for w in part] == sorted(w.index for w in part) for part in dealt)
    # Graham's bound for longest-first: at most 4/3 - 1/(3 bins) of the optimum, which is at least both of these
    assert max(loads) <= (4 / 3) * max(sum(lengths) / bins, max(lengths, default=0), sum(sorted(lengths)[-bins - 1:][:2]) if len(lengths) > bins else 0) + 1e-9
