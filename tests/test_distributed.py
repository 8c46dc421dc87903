"""What the processes of a run tell each other, here without any of them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from ddrl_jax import distributed
from ddrl_jax.distributed import summed, whole_scores
from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import DataSource, Scores
from ddrl_jax.sharding import AXES, Held, make_mesh, place_batch, place_fetched, to_host
from ddrl_jax.sources import in_short
from ddrl_jax.surroundings import Place, is_lone_task, place

# ---- where a process stands

HOST = "10.0.0.1:1234"


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        ({}, {}, None),
        ({}, {"JAX_COORDINATOR_ADDRESS": HOST}, None),  # for a cluster, not by hand
        (
            {"coordinator": HOST, "processes": "2", "process": "1"},
            {"DDRL_PROCESS": "0"},  # a flag wins
            Place(HOST, 2, 1),
        ),
        (
            {"process": "0"},
            {"DDRL_COORDINATOR": "[::1]:99", "DDRL_PROCESSES": "3"},
            Place("[::1]:99", 3, 0),
        ),
        ({"processes": "1"}, {}, Place("", 1, 0)),
    ],
)
def test_a_process_finds_its_place(flags, environment, expected):
    assert place(flags, environment) == expected


@pytest.mark.parametrize(
    ("coordinator", "processes", "process"),
    [
        (HOST, "2", None),
        (None, "2", "0"),
        (HOST, "2", "2"),
        (HOST, "2", "-1"),
        (HOST, "two", "0"),
        ("10.0.0.1", "2", "0"),
        ("10.0.0.1:0", "2", "0"),
        (":1234", "2", "0"),
    ],
)
def test_half_a_place_is_one_message(coordinator, processes, process):
    flags = {"coordinator": coordinator, "processes": processes, "process": process}
    with pytest.raises(UserError, match="--distributed.coordinator=HOST:PORT") as found:
        place(flags, {})
    assert f"coordinator {coordinator or 'missing'}" in str(found.value)


# ---- what the processes of a run tell each other, here without any


def test_scores_are_joined_in_the_order_of_the_samples(monkeypatch):
    tables = []
    held = {0: [0, 1, 4], 1: [], 2: [3, 2]}
    values = np.array([0.5, -1.0, np.nan, 3.0, 4.0], np.float32)
    valid = np.array([True, True, False, True, True])
    monkeypatch.setattr(jax, "process_count", lambda: len(held))

    def own(rows):
        rows = np.array(rows, int)
        whole_scores(Scores({"size": values[rows]}, valid[rows]), rows, 5)

    def kept(table):
        tables.append(table)
        raise InterruptedError

    monkeypatch.setattr(distributed, "every", kept)
    for rows in held.values():
        with pytest.raises(InterruptedError):
            own(rows)
    monkeypatch.setattr(distributed, "every", lambda _: np.stack(tables))
    rows = np.array(held[2])
    found = whole_scores(Scores({"size": values[rows]}, valid[rows]), rows, 5)
    np.testing.assert_array_equal(found.values["size"], values)
    np.testing.assert_array_equal(found.valid, valid)


def test_who_differs_is_named_with_host_and_key(monkeypatch):
    digests = []

    def gather(rows):
        if rows.shape == (distributed.TEXT_BYTES,):
            names = [f"node{i}".encode().ljust(rows.size) for i in range(3)]
            return np.stack([np.frombuffer(n, np.uint8) for n in names])
        other = rows.copy()
        other[-1] ^= 1  # of process 1, in the last value
        digests.append(rows)
        return np.stack([rows, other if len(rows) == 2 else rows, rows])

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(distributed, "every", gather)
    with pytest.raises(UserError) as found:
        distributed.check_agreement({"optimizer.lr": 0.5, "seed": 7})
    assert "process 1 on node1 differs in seed" in str(found.value)
    assert "node0" not in str(found.value) and "optimizer" not in str(found.value)
    distributed.check_agreement({"seed": 7})  # one row: all equal


DATA = DataSource(("a", "b"), lambda *_: None, digest="0123")
OTHERS = {
    "the data": DATA._replace(digest="4567"),
    "the captions of the data": DATA._replace(captions=("b", "a")),
}


@pytest.mark.parametrize("what", OTHERS)
def test_who_reads_other_data_is_told(what, monkeypatch):
    """As on two hosts with a folder of their own under the same name."""
    monkeypatch.setattr(distributed, "every", Gathering(2))
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)

    def told(sources):
        with ThreadPoolExecutor(2) as pool:
            calls = [
                pool.submit(distributed.check_agreement, in_short(source))
                for source in sources
            ]
            return [call.exception() for call in calls]

    assert told([DATA, DATA]) == told([None, None]) == [None, None]
    for error in told([DATA, OTHERS[what]]):
        assert isinstance(error, UserError)
        assert f"differs in {what}\n" in str(error)


def test_alone_nothing_is_gathered():
    odd = np.array([[1.5, np.nan]], np.float64)
    np.testing.assert_array_equal(distributed.every(odd), odd[None])
    distributed.check_agreement({"seed": object()})
    assert distributed.main_first(lambda: 3) == 3


@pytest.mark.parametrize("theirs", [[], [1, 2], list(range(1000, 1400))])
@pytest.mark.parametrize("own", [[], [7], list(range(500))])
def test_the_list_of_process_0_whatever_its_length(monkeypatch, theirs, own):
    """As process 1: what is gathered from process 0 is its count, then its list."""
    said = iter([np.array([len(theirs)]), np.array(theirs, np.int64)])

    def gathered(values):
        first = next(said)
        assert first.shape == values.shape
        return np.stack([first, values])

    monkeypatch.setattr(distributed, "every", gathered)
    assert distributed.numbers_of_main(own) == theirs


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 1, 4, 2)])
def test_every_row_is_held_once(sizes):
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    pictures = np.arange(8 * 3, dtype=np.uint8).reshape(8, 3)
    held = Held(place_batch(mesh, pictures))
    np.testing.assert_array_equal(held.rows, np.arange(8))
    assert held.shape == pictures.shape
    np.testing.assert_array_equal(np.asarray(held), pictures)


def test_fetched_records_land_in_their_rows():
    mesh = make_mesh({"data": 4, "fsdp": 2, "tensor": 1, "context": 1})
    numbers = np.array([5, 3, 3, 9, 0, 1, 5, 7])
    found = place_fetched(mesh, numbers, lambda n: {"x": np.stack([n, n * n], 1)})
    np.testing.assert_array_equal(to_host(found)["x"][:, 1], numbers**2)


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_the_one_task_of_a_cluster_keeps_all_of_its_devices(name, monkeypatch):
    """JAX would join it to itself, and hide all devices but one."""

    def initialize(**_):
        raise AssertionError("it was joined")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    monkeypatch.setenv("grpc_proxy", "")  # `joined` sets it, for good
    monkeypatch.setenv(name, "1")
    with distributed.joined(None):
        assert jax.process_count() == 1
    monkeypatch.setenv(name, "2")
    with pytest.raises(AssertionError, match="it was joined"), distributed.joined(None):
        pass


@pytest.mark.parametrize(
    ("slurm", "mpi", "alone"),
    [("1", "4", False), ("4", "1", True), ("1", None, True), (None, None, False)],
)
def test_the_innermost_launcher_says_whether_a_task_is_alone(slurm, mpi, alone):
    given = {"SLURM_NTASKS": slurm, "OMPI_COMM_WORLD_SIZE": mpi}
    assert is_lone_task({k: v for k, v in given.items() if v is not None}) is alone


# ---- what they count


class Gathering:
    """`every` among threads, each of which stands for a process."""

    def __init__(self, count):
        self.rows, self.count = {}, count
        self.barrier = threading.Barrier(count, timeout=30)

    def __call__(self, values):
        self.rows[threading.get_ident()] = np.asarray(values)
        self.barrier.wait()
        shapes = {row.shape for row in self.rows.values()}
        assert len(shapes) == 1, f"gloo would abort: {shapes}"
        found = np.stack(list(self.rows.values()))
        if self.barrier.wait() == 0:
            self.rows.clear()
        self.barrier.wait()
        return found


COUNTS = {
    "the same names": [{"a": 1.0, "b": 2.0}, {"a": 10.0, "b": 20.0}],
    "another order": [{"a": 1.0, "b": 2.0}, {"b": 20.0, "a": 10.0}],
    "a name that one lacks": [{"a": 11.0}, {"a": 0.0, "b": 22.0}],
    "long names": [{"a": 11.0, "b": 22.0, "c" * 2000: 1.0}, {"a": 0.0}],
}


@pytest.mark.parametrize("case", COUNTS)
def test_counters_are_added_up_by_name(case, monkeypatch):
    counts = COUNTS[case]
    monkeypatch.setattr(distributed, "every", Gathering(len(counts)))
    monkeypatch.setattr(distributed.jax, "process_count", lambda: len(counts))
    with ThreadPoolExecutor(len(counts)) as pool:
        found = list(pool.map(summed, counts))
    assert found[0] == found[1]
    assert {"a": 11.0, "b": 22.0}.items() <= found[0].items()


def test_a_process_alone_keeps_its_counters_and_none_are_not_gathered(monkeypatch):
    assert summed({"b": 1.0, "a": 2.0}) == {"b": 1.0, "a": 2.0}
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    assert summed({}) == {}
