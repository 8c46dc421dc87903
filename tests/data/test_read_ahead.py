"""Records are there when the loop asks for them, and never others."""

import threading
import time

import numpy as np
import pytest
from tiny_runs import flat_source, same_bits, tiny_program

from ddrl_jax.data import read_ahead
from ddrl_jax.data.read_ahead import ReadAhead
from ddrl_jax.draws import draw_chunks, prompts_of

DATA = {"data_term.weight": 0.5, "data.source": "emoji"}


class Slow:
    """Reads pages; says in which thread each batch was read."""

    def __init__(self):
        self.threads, self.read = [], []

    def __call__(self, records):
        self.threads.append(threading.current_thread().name.startswith("records"))
        self.read.append(np.array(records))
        return {"page": np.asarray(records, np.float32) / 8.0}


def settled(slow, count):
    """Waits until so many batches were read: a test may be in no hurry."""
    until = time.monotonic() + 20
    while len(slow.read) < count and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(0.05)


def test_announced_batches_are_those_that_are_read():
    slow, random = Slow(), np.random.default_rng(0)
    ahead = ReadAhead(slow)
    batches = [random.integers(0, 11, 5, np.int32) for _ in range(20)]
    batches.append(batches[3])
    for order in (batches, batches[::-1]):  # as announced, and otherwise
        ahead.announce(batches)
        for batch in order:
            np.testing.assert_array_equal(ahead(batch)["page"], batch / 8.0)


def test_few_batches_are_held_whatever_is_announced(monkeypatch):
    monkeypatch.setattr(read_ahead, "AHEAD", 4)
    slow = Slow()
    ahead = ReadAhead(slow)
    batches = [np.array([i % 11, i // 11]) for i in range(60)]
    ahead.announce(batches)
    settled(slow, 4)
    assert len(slow.read) == 4 and all(slow.threads)  # before anybody asks
    ahead(batches[0])
    settled(slow, 5)
    assert len(slow.read) == 5, "what was announced is not read a second time"
    assert ahead.waits == 0


def test_a_failed_read_fails_where_its_batch_is_asked_for():
    def fetch(records):
        raise OSError("no such record")

    ahead = ReadAhead(fetch)
    ahead.announce([np.array([3])])
    with pytest.raises(OSError, match="no such record"):
        ahead(np.array([3]))


def programs(**edits):
    """(a program that reads ahead, the same without, what is read and how)."""
    slow = Slow()
    ahead = ReadAhead(slow)
    plain = flat_source()
    latents = lambda fetched, keys: plain.latents(8 * fetched["page"], keys)  # noqa: E731
    source = plain._replace(latents=latents, fetch=ahead, announce=ahead.announce)
    edits = DATA | {"train.epochs": 3} | edits
    program = tiny_program(edits, source)
    without = source._replace(fetch=Slow(), announce=None)
    return program, tiny_program(edits, without), slow, ahead


@pytest.mark.parametrize("captions", ["prompt", "own"])
def test_after_the_first_draw_no_chunk_waits_for_its_records(captions):
    """Two epochs of two passes of two chunks: one draw waits, three do not."""
    edits = {"train.inner_epochs": 2, "data_term.captions": captions}
    program, without, slow, ahead = programs(**edits)
    for draw, (epoch, inner) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        prompts = prompts_of(program, epoch)
        found = draw_chunks(program, prompts, epoch, inner)
        wanted = draw_chunks(without, prompts, epoch, inner)
        assert same_bits([c.records for c in found], [c.records for c in wanted])
        assert ahead.waits == 2
        settled(slow, 2 * draw + 4)  # meanwhile the device would be at work
    assert slow.threads == [False] * 2 + [True] * 8
    np.testing.assert_array_equal(
        slow.read[6:8], without.objective.source.fetch.read[6:]
    )


def test_nothing_is_read_for_an_epoch_that_never_comes():
    program, _, slow, ahead = programs()
    draw_chunks(program, prompts_of(program, 2), 2, 0)  # the last of three
    time.sleep(0.1)
    assert len(slow.read) == 2


def test_of_sparse_rwr_only_what_is_kept_is_read_ahead():
    edits = {
        "policy.term": "sparse_rwr",
        "advantages.kind": "batch",
        "data_term.captions": "own",
        "train.inner_epochs": 2,
    }
    program, _, slow, ahead = programs(**edits)
    prompts, kept = prompts_of(program, 0), np.array([6, 1, 4, 3], np.int32)
    draw_chunks(program, prompts, 0, 0)
    assert len(slow.read) == 2  # which are kept is not known yet
    draw_chunks(program, prompts, 0, 0, kept)
    settled(slow, 4)
    draw_chunks(program, prompts, 0, 1, kept)
    assert slow.threads[:4] == [False] * 3 + [True] and ahead.waits == 3


def test_an_ended_run_reads_no_more(monkeypatch):
    monkeypatch.setattr(read_ahead, "AHEAD", 30)
    slow, go = Slow(), threading.Event()

    def fetch(records):
        go.wait(20)
        return slow(records)

    ahead = ReadAhead(fetch)
    ahead.announce([np.array([i]) for i in range(40)])
    ahead.announce(())
    go.set()
    settled(slow, read_ahead.READERS)
    assert len(slow.read) <= read_ahead.READERS  # those that were under way
