"""What the figures of a comparison draw: their lines, bands, words and pictures."""

import numpy as np
import pytest
from matplotlib.colors import same_color
from PIL import Image
from synthetic_runs import DDPO, DDRL, load, shifted, write

from ddrl_jax import compare
from ddrl_jax.compare import figures
from ddrl_jax.pictures import grid

# Three seeds that lie unevenly, or their middle one would be their mean, and their
# extremes would be their mean and one standard deviation around it.
SEEDS = (0.0, 0.03, 0.15)
CALLS = {"DDPO": [0, 192, 384, 576], "DDRL 0.01": [0, 576, 1152, 1728]}
CURVES = {"DDPO": DDPO, "DDRL 0.01": DDRL}
ARMS = {"ddrl": "DDRL 0.01", "ddpo": "DDPO"}
KEYS = {"kilobytes": "size", "retrieval": "retrieval", "data_loss": "loss"}
TITLES = {
    "JPEG size (kB)": "kilobytes",
    "held-out retrieval": "retrieval",
    "diversity within a prompt": "within_prompt",
    "held-out data loss": "data_loss",
}


def seed_curve(curve, seed):
    """A curve of which every seed's numbers are other ones, the base's too."""
    more = SEEDS[seed]
    return shifted(curve, **{k: [v + more for v in curve[k]] for k in KEYS.values()})


def values(label, name, seed):
    if name == "within_prompt":
        return np.full(4, 0.2)
    return np.array(seed_curve(CURVES[label], seed)[KEYS[name]])


def mean(label, name):
    return np.mean([values(label, name, seed) for seed in range(3)], axis=0)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The figures of two arms of three seeds by the names of their files."""
    found = {}

    def keep(figure, path):
        found[path.stem] = figure
        return path

    monkeypatch.setattr(figures, "_save", keep)
    for arm, label in ARMS.items():
        for seed in range(3):
            write(tmp_path, arm, seed_curve(CURVES[label], seed), seed)
    compare.draw(load(tmp_path, ARMS, (0, 1, 2)), tmp_path / "c.png")
    return found


def words(axes):
    """label -> (where it points, its colour); the bounds are no labels of lines."""
    notes = {note.get_text(): note for note in axes.texts}
    return {
        text: (note.xy, note.get_color())
        for text, note in notes.items()
        if "x base" not in text
    }


def thick(axes):
    """The lines of means by their colours' arm: label -> line."""
    lines = [line for line in axes.lines if line.get_linewidth() == 1.8]
    named = {label: colour for label, (_, colour) in words(axes).items()}
    found = {}
    for line in lines:
        (label,) = [k for k, c in named.items() if same_color(c, line.get_color())]
        found[label] = line
    assert len(found) == len(lines) == 2
    return found


def test_the_curves_are_the_means_over_reward_calls(drawn):
    panels = drawn["c"].axes
    assert [TITLES[axes.get_title(loc="left")] for axes in panels] == [*TITLES.values()]
    for axes, name in zip(panels, TITLES.values(), strict=True):
        assert axes.get_xlabel().startswith("reward calls")
        for label, line in thick(axes).items():
            np.testing.assert_array_equal(line.get_xdata(), CALLS[label])
            np.testing.assert_allclose(line.get_ydata(), mean(label, name))
            xy, _ = words(axes)[label]
            np.testing.assert_allclose(xy, (CALLS[label][-1], mean(label, name)[-1]))
        assert not axes.xaxis_inverted() and not axes.yaxis_inverted()
    scales = [axes.get_yscale() for axes in panels]
    assert scales == ["linear", "linear", "linear", "log"]


def test_the_bands_reach_from_the_smallest_seed_to_the_largest(drawn):
    for axes, name in zip(drawn["c"].axes, TITLES.values(), strict=True):
        lines = thick(axes)
        assert len(axes.collections) == len(lines)
        for band in axes.collections:
            (label,) = [
                k
                for k, line in lines.items()
                if same_color(line.get_color(), band.get_facecolor()[0][:3])
            ]
            x, y = band.get_paths()[0].vertices.T
            for i, calls in enumerate(CALLS[label]):
                here = y[x == calls]
                seeds = [values(label, name, seed)[i] for seed in range(3)]
                np.testing.assert_allclose(
                    (here.min(), here.max()), (min(seeds), max(seeds))
                )


def test_the_bounds_are_multiples_of_the_mean_of_the_bases(drawn):
    wanted = {
        "kilobytes": {},
        "retrieval": {"0.333 x base": 0.66 / 3},  # bases 0.60, 0.63 and 0.75
        "within_prompt": {},
        "data_loss": {"1.25 x base": 0.26 * 1.25, "2 x base": 0.26 * 2},
    }
    for axes, name in zip(drawn["c"].axes, TITLES.values(), strict=True):
        notes = [note for note in axes.texts if "x base" in note.get_text()]
        assert {n.get_text(): n.xy[1] for n in notes} == pytest.approx(wanted[name])
        flat = [line.get_ydata() for line in axes.lines if line.get_linewidth() == 0.8]
        assert [a for a, b in flat if a == b] == pytest.approx([*wanted[name].values()])


def test_the_fronts_are_what_a_size_costs(drawn):
    left, right = drawn["c_fronts"].axes
    for axes, name in ((left, "retrieval"), (right, "data_loss")):
        assert (
            TITLES[axes.get_title(loc="left").removesuffix(" at a JPEG size")] == name
        )
        assert axes.get_xlabel().startswith("JPEG size (kB)")
        assert axes.xaxis_inverted()  # smaller files lie to the right
        lines = thick(axes)
        for label, line in lines.items():
            np.testing.assert_allclose(line.get_xdata(), mean(label, "kilobytes"))
            np.testing.assert_allclose(line.get_ydata(), mean(label, name))
            end = mean(label, "kilobytes")[-1], mean(label, name)[-1]
            np.testing.assert_allclose(words(axes)[label][0], end)
        thin = [line for line in axes.lines if line.get_linewidth() == 0.6]
        found = []
        for line in thin:
            (label,) = [
                k
                for k, other in lines.items()
                if same_color(line.get_color(), other.get_color())
            ]
            found.append((label, *line.get_xdata(), *line.get_ydata()))
        wanted = [
            (label, *values(label, "kilobytes", seed), *values(label, name, seed))
            for label in CURVES
            for seed in range(3)
        ]
        assert [row[0] for row in found] == [row[0] for row in wanted]
        np.testing.assert_allclose([r[1:] for r in found], [r[1:] for r in wanted])
        base = mean("DDPO", "kilobytes")[0], mean("DDPO", name)[0]
        (dot,) = [line for line in axes.lines if len(line.get_xdata()) == 1]
        np.testing.assert_allclose((dot.get_xdata()[0], dot.get_ydata()[0]), base)
        np.testing.assert_allclose(words(axes)["base"][0], base)


@pytest.fixture
def sheet(tmp_path, monkeypatch):
    """The axes of the pictures: green is the base, red DDPO's end, blue DDRL's."""
    found = {}
    monkeypatch.setattr(
        figures, "_save", lambda f, p: found.setdefault(p.stem, f) and p
    )
    for arm, last in (("ddpo", 0), ("ddrl", 2)):
        for seed in (0, 1):
            samples = write(tmp_path, arm, {"ddpo": DDPO, "ddrl": DDRL}[arm], seed)
            samples = samples / "samples"
            samples.mkdir()
            end = {"ddpo": 9, "ddrl": 27}[arm]
            for step, channel in ((0, 1), (end, last)):
                pictures = np.zeros((3, 32, 32, 3), np.uint8)
                pictures[..., channel] = 255 - 100 * seed
                Image.fromarray(grid(pictures, 3, 4, ["a", "b", "c"])).save(
                    samples / f"evaluation_{step:06d}.png"
                )
    compare.draw(load(tmp_path, ("ddpo", "ddrl"), (1, 0)), tmp_path / "c.png")
    return found["c_pictures"].axes[0]


def test_each_row_of_pictures_has_its_name_beside_it(sheet):
    heads = [label.get_text() for label in sheet.get_yticklabels()]
    assert heads == ["base", "DDPO\n576 calls", "DDRL 0.01\n1,728 calls"]
    pixels = np.asarray(sheet.images[0].get_array())[:, 10]
    for channel, middle in zip((1, 0, 2), sheet.get_yticks(), strict=True):
        here = np.zeros(3, np.uint8)
        here[channel] = 255  # seed 0, the first that all arms have
        rows = np.flatnonzero((pixels == here).all(-1))
        assert len(rows) == 128
        assert rows.min() < middle < rows.max()
