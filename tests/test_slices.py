"""Which device stands where: slices of a pod, and the torus of one."""

import types

import numpy as np
import pytest

from ddrl_jax.errors import UserError
from ddrl_jax.sharding import hybrid_grid, slice_grid


def slices_of(count, each):
    place = lambda s, i: types.SimpleNamespace(  # noqa: E731
        slice_index=s, id=s * each + i, platform="gpu", device_kind="fake",
        process_index=s,
    )  # fmt: skip
    return [[place(s, i) for i in range(each)] for s in range(count)]


@pytest.mark.parametrize(
    ("shape", "count", "crossing"),
    [
        ((4, 2, 1, 1), 2, {0}),  # data between the slices
        ((1, 8, 1, 1), 2, {1}),  # no data: fsdp between them
        ((2, 4, 2, 1), 4, {0, 1}),  # both
        ((2, 1, 2, 2), 2, {0}),
    ],
)
def test_slices_are_crossed_by_data_first_then_fsdp(shape, count, crossing):
    each = int(np.prod(shape)) // count
    grid = hybrid_grid(shape, slices_of(count, each))
    assert grid.shape == shape
    assert len({d.id for d in grid.flat}) == count * each
    where = np.vectorize(lambda d: d.slice_index)(grid)
    changes = {a for a in range(4) if np.any(np.diff(where, axis=a))}
    assert changes == crossing


def torus(kind, *sides):
    """TPUs as their own description has them: one core a chip, coordinates."""
    return [
        types.SimpleNamespace(
            id=i,
            process_index=i // 4,
            platform="tpu",
            device_kind=kind,
            coords=(*at, 0, 0)[:3],
            core_on_chip=0,
            slice_index=0,
        )
        for i, at in enumerate(np.ndindex(*sides))
    ]


@pytest.mark.parametrize(
    ("kind", "sides", "shape"),
    [
        ("TPU v5", (4, 8, 8), (4, 16, 1, 4)),  # the plan of the README
        ("TPU v6 lite", (8, 8), (1, 16, 1, 4)),
        ("TPU v6 lite", (4, 4), (8, 2, 1, 1)),
        ("TPU v5", (2, 4, 4), (2, 8, 1, 2)),
        ("TPU v5 lite", (4, 4), (2, 2, 2, 2)),
    ],
)
def test_a_mesh_may_divide_the_axes_of_a_torus(kind, sides, shape):
    grid = slice_grid(shape, torus(kind, *sides))
    assert grid.shape == shape
    assert sorted(d.id for d in grid.flat) == list(range(np.prod(sides)))


def test_a_mesh_that_no_torus_has_is_one_message():
    with pytest.raises(UserError, match="can not be laid over the links"):
        slice_grid((3, 3, 1, 1), torus("TPU v5", 2, 4, 4)[:9])


def test_tensor_may_not_cross_slices():
    with pytest.raises(UserError, match=r"multiple of 2"):
        hybrid_grid((1, 1, 8, 1), slices_of(2, 4))
