"""A checksum is the same for any cut of an array, and for no other array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ddrl_jax import checksum
from ddrl_jax.checksum import Part, checksums, host_parts
from ddrl_jax.sharding import AXES, make_mesh

RANDOM = np.random.default_rng(0)


def by_the_formula(array: np.ndarray) -> int:
    """sum_i word_i k(i) mod 2^64 in Python's integers."""
    word, total = min(array.dtype.itemsize, 4), 0
    content = array.tobytes()
    for i in range(len(content) // word):
        k = i * 0x9E3779B97F4A7C15 % 2**64
        k = (k ^ (k >> 32)) | 1
        total += int.from_bytes(content[word * i : word * (i + 1)], "little") * k
    return total % 2**64


def checksum_of(array) -> int | None:
    return checksums([host_parts(array)])[0]


@pytest.mark.parametrize(
    "array",
    [
        RANDOM.normal(size=(3, 5, 7)).astype(np.float32),
        RANDOM.normal(size=(130, 140)).astype(np.float32),  # more than one block
        RANDOM.normal(size=(2, 9000)),  # two words a value, rows longer than a block
        RANDOM.integers(-9, 9, (4, 6)).astype(np.int8),
        np.array([[True, False, True]]),
        np.asarray(jnp.arange(7, dtype=jnp.bfloat16)),
        np.float32(2.5),
        np.zeros((0, 3), np.float32),
    ],
    ids=lambda a: f"{a.dtype}{list(np.shape(a))}",
)
def test_it_is_the_formula(array):
    assert checksum_of(array) == by_the_formula(np.asarray(array))


SHAPE = (8, 12, 16)


@pytest.mark.parametrize(
    "spec",
    [
        P(),
        P("data"),
        P(None, "fsdp"),
        P(None, None, "tensor"),
        P("fsdp", None, "data"),
        P(("data", "tensor"), "fsdp"),
        P(("tensor", "data", "fsdp")),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "key"])
def test_no_mesh_changes_it(spec, kind):
    mesh = make_mesh(dict(zip(AXES, (2, 2, 2, 1), strict=True)))
    if kind == "key":
        whole = jax.random.split(jax.random.key(3), SHAPE)
        wanted = np.asarray(jax.random.key_data(whole))
    else:
        wanted = np.asarray(jnp.asarray(RANDOM.normal(size=SHAPE), kind))
        whole = jnp.asarray(wanted)
    placed = jax.device_put(whole, NamedSharding(mesh, spec))
    assert checksum_of(placed) == by_the_formula(wanted)


def test_a_changed_bit_and_words_that_change_places_are_seen():
    array = RANDOM.integers(0, 2**32, 4000, dtype=np.uint32)
    found = {checksum_of(array)}
    for bit in range(32):
        other = array.copy()
        other[117 * bit] ^= np.uint32(1 << bit)
        found.add(checksum_of(other))
    for i in range(100):
        other = array.copy()
        other[[i, 3 * i + 1]] = other[[3 * i + 1, i]]
        found.add(checksum_of(other))
    assert len(found) == 1 + 32 + 100


def of_processes(monkeypatch, held: list[list[list[Part]]]) -> list[int | None]:
    """The checksums that processes find which hold these parts of each array."""
    tables = []
    with monkeypatch.context() as patch:
        patch.setattr(checksum, "every", lambda t: tables.append(t) or t[None])
        for process, leaves in enumerate(held):
            patch.setattr(jax, "process_index", lambda own=process: own)
            checksums(leaves)
        patch.setattr(checksum, "every", lambda _: np.stack(tables))
        return checksums(held[0])


def test_processes_add_up_what_each_of_them_holds(monkeypatch):
    a = RANDOM.normal(size=(6, 4)).astype(np.float32)
    b = RANDOM.normal(size=(3,)).astype(np.float32)
    top, low = Part(a[:4], (0, 0), a.shape, (0, 1)), Part(a[4:], (4, 0), a.shape, (1,))
    both = [Part(b, (0,), b.shape, (0, 1))]
    wanted = [by_the_formula(a), by_the_formula(b)]
    held = [[[top], both], [[top, low], both]]
    assert of_processes(monkeypatch, held) == wanted
    other = [Part(b + 1, (0,), b.shape, (0, 1))]
    held = [[[top], both], [[top, low], other]]
    assert of_processes(monkeypatch, held) == [wanted[0], None]
