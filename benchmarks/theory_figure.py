"""Draws what each objective converges to: `python -m benchmarks.theory_figure`.

Trains every arm of benchmarks/theory_toy.py, compares with its closed form, and
writes theory.png and theory.md to benchmarks/results. About ten seconds on two cores.
"""

import argparse
import datetime
import pathlib
import platform

import jax
import matplotlib
import numpy as np

from benchmarks import theory_toy as toys

TITLES = {
    "exact": "DDRL, exact Z",
    "data_mean": "DDRL, centre = mean of the data",
    "group_mean": "DDRL, centre = group mean",
    "linear": "linear reward + data term",
    "kl": "reverse KL to a base model",
    "none": "no regulariser",
}
OPTIMA = {
    "exact": "p exp((r - Z)/beta), the tilted data",
    "data_mean": "p / (exp(-(r - E_p r)/beta) + mu), mu > 0: saturates",
    "group_mean": "p / (exp(-(r - E_q r)/beta) + mu), mu < 0: steeper",
    "linear": "p / (nu - r/beta): heavy upper tail",
    "kl": "p_base exp(r/beta) / Z: tilts the base, not the data",
    "none": "one cell",
}
HIGHEST = 0.75  # of the density axis
DATA, THEORY, TRAINED, TARGET = "#c9ccd1", "#1f4e79", "#d1495b", "#8a8f98"


def draw(toy: toys.Toy, reached: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """One panel an arm: data, closed form, and the density that training reached.

    Args:
      toy: the problem.
      reached: arm -> density.
      path: of the PNG file.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(10.5, 5.3), sharex=True, sharey=True)
    for panel, (arm, title) in zip(axes.flat, TITLES.items(), strict=True):
        _panel(panel, toy, arm, reached[arm])
        panel.set_title(title, fontsize=10)
    handles, labels = axes[1, 1].get_legend_handles_labels()
    for panel in axes[1]:
        panel.set_xlabel("x = reward")
    for panel in axes[:, 0]:
        panel.set_ylabel("density")
    figure.legend(handles, labels, frameon=False, loc="lower center", ncols=5)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(panel, toy: toys.Toy, arm: str, reached: np.ndarray) -> None:
    x, width = toy.x, toy.x[1] - toy.x[0]
    panel.fill_between(x, toy.data / width, color=DATA, step="mid", label="data")
    tilted = toys.optimum(toy, "exact") / width
    panel.plot(x, tilted, ":", color=TARGET, lw=1.5, label="tilted data")
    if arm == "kl":
        base = toy.reference / width
        panel.plot(x, base, "--", color=TARGET, lw=1, label="base model")
    if arm != "none":
        theory = toys.optimum(toy, arm) / width
        panel.plot(x, theory, color=THEORY, lw=1.6, label="closed form")
    panel.plot(x, reached / width, "o", color=TRAINED, ms=3.2, label="trained")
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_ylim(0.0, HIGHEST)
    at = int(np.argmax(reached))
    if reached[at] / width > HIGHEST:  # an arrow where a point left the axes
        panel.annotate(
            f"{reached[at]:.0%} in one cell",
            xy=(x[at], 0.99 * HIGHEST),
            xytext=(x[at] - 3.2, 0.9 * HIGHEST),
            arrowprops={"arrowstyle": "->", "color": TRAINED},
            color=TRAINED,
            fontsize=9,
        )


def table(reached: dict[str, dict[str, np.ndarray]], date: str, machine: str) -> str:
    """The text of theory.md.

    Args:
      reached: "exact" and "sampled" -> arm -> density.
      date: of the measurement.
      machine: where it was made.
    """
    discrete, mixture = toys.discrete(), toys.gaussian_mixture()
    lines = [
        "# What each objective converges to",
        "",
        "Command: `python -m benchmarks.theory_figure`",
        "",
        f"{date}, {machine}, Python {platform.python_version()}, jax {jax.__version__},"
        f" numpy {np.__version__}.",
        "",
        "Exact: 8 cells, exact expectations, 6000 steps of gradient ascent. Sampled: a",
        "Gaussian mixture on 32 cells, 6000 Adam steps on 512 draws of the policy and",
        "512 of the data (the figure). Both run `reinforce` and `reward_transform` of",
        "the package and start at the data. The error is the largest difference of a",
        "cell's probability from the closed form; TV is the total variation distance.",
        "",
        "| objective | its optimum | exact: error | sampled: error | sampled: TV "
        "| TV of its optimum to the tilted data | E[r] |",
        "|---|---|---|---|---|---|---|",
    ]
    tilted = toys.optimum(mixture, "exact")
    for arm, title in TITLES.items():
        q, target = reached["sampled"][arm], toys.optimum(mixture, arm)
        error = np.abs(reached["exact"][arm] - toys.optimum(discrete, arm)).max()
        cells = [
            title,
            OPTIMA[arm],
            f"{error:.1e}",
            f"{np.abs(q - target).max():.4f}",
            f"{_variation(q, target):.4f}",
            f"{_variation(target, tilted):.3f}",
            f"{q @ mixture.reward:.3f}",
        ]
        if arm == "none":  # softmax ascent ends in any cell where it is alone
            cells[3:5] = ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_reading(mixture)]
    return "\n".join(lines) + "\n"


def _reading(toy: toys.Toy) -> list[str]:
    """What the table means, with the numbers it rests on."""
    p, r, beta = toy.data, toy.reward, toy.beta
    z, tilted = toys.centre(p, r, beta), toys.optimum(toy, "exact")
    _, c = toys.self_centred(p, r, beta)
    return [
        "Only the exact Z gives the tilted data. Any other centre c has the optimum",
        "p / (exp(-(r - c)/beta) + mu). The mean reward of the data lies below Z (by",
        "Jensen), so mu > 0 and the tilt saturates. The mean reward of the policy's",
        "own samples, which a group mean estimates, lies above it: at the tilted data",
        "it is Z + beta KL(q || p). So mu < 0 and the tilt is steeper than meant.",
        f"Here Z = {z:.3f}, E_p[r] = {p @ r:.3f}, E[r] of the tilted data =",
        f"{tilted @ r:.3f}, and the group mean settles at {c:.3f}. The linear reward",
        "of the released code leads to p / (nu - r/beta) with nu > max r/beta: where",
        "the best cells have few data, nu comes close to that bound and mass condenses",
        "there. Without a regulariser all mass ends in one cell beyond the data.",
    ]


def _variation(p: np.ndarray, q: np.ndarray) -> float:
    return 0.5 * float(np.abs(p - q).sum())


def main() -> None:
    """Trains, draws and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    results = pathlib.Path(__file__).parent / "results"
    parser.add_argument("--output", type=pathlib.Path, default=results)
    parser.add_argument("--date", default=str(datetime.date.today()))
    parser.add_argument("--machine", default="this machine")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    reached = {
        "exact": toys.train_exactly(toys.discrete()),
        "sampled": toys.train_on_samples(toys.gaussian_mixture()),
    }
    draw(toys.gaussian_mixture(), reached["sampled"], options.output / "theory.png")
    text = table(reached, options.date, options.machine)
    (options.output / "theory.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
