"""What a compiled program sends between devices, read from the text of its HLO.

Bytes are those that one device sends in the ring algorithms of the usual libraries; an
instruction in a loop counts as often as the loop runs, and belongs to the axes of the
mesh along which the members of its groups differ.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
WIDTHS |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({KINDS})(-start)?\(")
_CALLED = re.compile(
    r"(?:body|calls|to_apply|branch_computations|(?:true|false)_computation)="
    r"(\{[^}]*\}|%[^,}\s]+)"
)
_NAME = re.compile(r"%([^,}\s]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_BELOW = re.compile(r"ROOT .* compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((\[.*?)\))? \{(.*?)\}"
)


class Collective(NamedTuple):
    """All runs of one instruction.

    Attributes:
      kind: "all-reduce", "all-gather", and so on.
      axes: of the mesh, along which it communicates.
      count: how often it runs.
      bytes: that a device sends, all runs together.
      wide: whether it moves float32.
      source: the operation of the program that it stands for.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float
    wide: bool
    source: str


def collectives(text: str, mesh: dict[str, int]) -> list[Collective]:
    """Every collective of a compiled program that moves anything.

    Args:
      text: `compiled.as_text()`.
      mesh: axis -> size, in the order of the devices.

    Raises:
      ValueError: a loop with collectives runs an unknown number of times.
    """
    bodies, entry = _computations(text)
    runs = _runs(bodies, entry)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match is None or not runs[name] or _continued(line, lines):
                continue
            if math.isnan(runs[name]):
                raise ValueError(f"a loop of unknown length: {line.strip()[:120]}")
            kept = name.startswith("all-reduce-scatter")
            found.append(_read(line, match, int(runs[name]), mesh, kept))
    return [c for c in found if c.bytes]


def _continued(line: str, lines: list[str]) -> bool:
    """Whether an instruction is a later part of one that is under way already.

    libtpu writes what an asynchronous collective does beside products as a chain: the
    whole instruction stands in the computation of AsyncCollectiveStart, again in every
    `async_collective_fusion` that carries it on, and again in that of
    AsyncCollectiveDone. Its channel does not name it: programs have several
    instructions of `shard_map`, and of a reduce-scatter, on channel 1.
    """
    if "async_collective_fusion_config" not in line:
        return False
    return not any('"AsyncCollectiveStart"' in other for other in lines)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            name = start[2]
            bodies[name] = []
            entry = name if start[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _runs(bodies: dict[str, list[str]], entry: str) -> dict[str, float]:
    """How often each computation runs; NaN below a loop of unknown length.

    Which branch of a conditional runs is not known: each counts as if it did.
    """
    runs: dict[str, float] = defaultdict(float)

    def visit(name: str, times: float) -> None:
        runs[name] += times
        for line in bodies[name]:
            called = _NAME.findall(" ".join(_CALLED.findall(line)))
            for inner in filter(bodies.__contains__, called):
                visit(inner, times * _trips(line, bodies))

    visit(entry, 1.0)
    return runs


def _trips(line: str, bodies: dict[str, list[str]]) -> float:
    """A loop's length: as the compiler notes it, or from `i < n` in its condition.

    JAX's own loops of known length all count from 0 by 1.
    """
    if " while(" not in line:
        return 1.0
    if found := _TRIPS.search(line):
        return float(found[1])
    condition = _CONDITION.search(line)
    lines = bodies.get(condition[1], []) if condition else []
    ends = [end[1] for end in map(_BELOW.search, lines) if end]
    values = [
        int(value[1])
        for text in lines
        for end in ends
        if (value := re.search(rf"%{re.escape(end)} = s32\S* constant\((\d+)\)", text))
    ]
    return float(values[0]) if values else math.nan


def _read(
    line: str, match: re.Match, runs: int, mesh: dict[str, int], scattered: bool
) -> Collective:
    """`scattered`: an all-reduce of which, on TPUs, each device only gets its part."""
    kind, shapes = match[2], _SHAPE.findall(match[1])
    if match[3] and kind != "all-reduce":
        # (operands, results) of an async start; a TPU has handles beside them.
        data = [shape for shape in shapes if shape != ("u32", "")] or shapes
        shapes = data[len(data) // 2 :]
    size = sum(
        WIDTHS[d] * math.prod(map(int, filter(None, s.split(",")))) for d, s in shapes
    )
    pairs = re.search(r"source_target_pairs=\{\{(.*?)\}\}", line)
    if pairs:
        group = np.array([p.split(",") for p in pairs[1].split("},{")], int)
        axes, ways = _axes_of(group, mesh), 2
    else:
        groups = _groups(line, math.prod(mesh.values()))
        axes, ways = _axes_of(groups, mesh), groups.shape[1]
    share = {
        "all-reduce": 2 * (ways - 1) / ways,
        "all-gather": (ways - 1) / ways,
        "reduce-scatter": ways - 1,  # its result is one part of what it reads
        "all-to-all": (ways - 1) / ways,
        "collective-permute": 1.0,
    }[kind]
    if scattered:
        kind, share = "reduce-scatter", share / 2
    source = re.search(r'op_name="(.*?)"', line)
    wide = all(dtype == "f32" for dtype, _ in shapes)
    name = source[1] if source else ""
    return Collective(kind, axes, runs, runs * share * size, wide, name)


def _axes_of(groups: np.ndarray, mesh: dict[str, int]) -> tuple[str, ...]:
    """The axes along which members of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())))
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, d in zip(mesh, differ, strict=True) if d)


def _groups(line: str, devices: int) -> np.ndarray:
    """The devices of each group [groups ways], from any of HLO's three notations."""
    named = _NAMED.search(line)
    if named:
        return _named_groups(named, devices)
    iota = _IOTA.search(line.split("replica_groups=")[-1])
    if iota and "replica_groups=[" in line:
        return _iota(iota).reshape(_numbers(iota[1]))
    listed = re.search(r"replica_groups=\{\{(.*?)\}\}", line)
    if listed:
        return np.array([g.split(",") for g in listed[1].split("},{")], int)
    return np.arange(devices)[None]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _iota(match: re.Match) -> np.ndarray:
    sizes = _numbers(match[2])
    order = _numbers(match[3]) if match[3] else range(len(sizes))
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(-1)


def _named_groups(match: re.Match, devices: int) -> np.ndarray:
    """mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}: groups along the axis b."""
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
    order = np.arange(devices)
    if match[2]:
        order = _iota(_transposed(match[2]))
    split: list[tuple[int, bool]] = []  # sizes, and whether groups go along them
    used = dict(_members(match[3]))
    for name, size in axes.items():
        if name not in used:
            split.append((size, False))
            continue
        before, ways = used[name] or (1, size)
        split += [(before, False), (ways, True), (size // before // ways, False)]
    sizes, along = zip(*split, strict=True)
    grid = order.reshape(sizes)
    last = [i for i, a in enumerate(along) if a]
    grid = np.moveaxis(grid, last, range(len(sizes) - len(last), len(sizes)))
    return grid.reshape(-1, math.prod(sizes[i] for i in last))


def _transposed(text: str) -> re.Match:
    """[4,2]T(1,0 as the iota notation [8]<=[4,2]T(1,0)."""
    closed = text if text.endswith("]") else text + ")"
    found = _IOTA.match("[1]<=" + closed)
    assert found is not None, text
    return found


def _members(text: str) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """'a', or 'a':(2)4 for four ways of it, each two apart from the first axis on."""
    for name, before, ways in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", text):
        yield name, (int(before), int(ways)) if ways else None
