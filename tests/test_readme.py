"""The README and the headers are true: snippets run, and what is named exists."""

import fnmatch
import hashlib
import importlib
import json
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, smoke
from ddrl_jax.check_config import check_config
from ddrl_jax.command_line import PLACE, PLAN, parse
from ddrl_jax.config_rules import check_keys, flatten
from ddrl_jax.diffusion import kernels, schedules
from ddrl_jax.errors import UserError
from ddrl_jax.models import pipelines
from ddrl_jax.models.emoji import BASE
from ddrl_jax.rewards import registry
from ddrl_jax.train import train

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"```python test=(\w+)\n(.*?)```", README, re.DOTALL))
MODULES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
LINES = 30  # a snippet has fewer, blank ones included


def _run(name: str) -> dict:
    names: dict = {"__name__": f"readme_{name}"}
    exec(compile(SNIPPETS[name], f"README.md, {name}", "exec"), names)
    return names


def test_there_is_a_snippet_for_each_thing_a_user_adds():
    assert set(SNIPPETS) == {"reward", "sampler", "model", "objective"}


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippets_are_short(name):
    assert len(SNIPPETS[name].splitlines()) < LINES


@pytest.fixture
def own_registries():
    """A snippet that registers something does so for one test only."""
    tables = (registry.REWARDS, pipelines.PIPELINES, kernels._KERNELS)
    kept = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, kept, strict=True):
        table.clear()
        table.update(rows)


def test_the_reward_scores_a_blank_page_highest(own_registries):
    judge = _run("reward")["judge"]
    pages = np.zeros((3, 4, 4, 3), np.uint8)
    pages[0] = 255
    pages[1, :, :1] = 255
    scores = judge(pages, ["a", "b", "c"])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [1.0, 0.25, 0.0])


def test_the_sampler_is_on_policy_and_ends_at_the_data():
    names = _run("sampler")
    np.testing.assert_allclose(names["x0"], 2.0, atol=1e-5)
    again = names["replay"](
        *(names["towards_two"], names["kernel"], names["score"]),
        *(names["kept"], names["cond"]),
    )
    assert jnp.array_equal(again, names["kept"].log_prob)


@pytest.mark.parametrize("a", [0.0, 0.5, 2.0])
def test_the_sampler_preserves_the_marginal(a):
    """Data N(1, 0.5^2): z_t is N(1 - t, (1 - t)^2 0.25 + t^2), its velocity is exact.

    In 80 steps the exact recursion of the standard deviation ends 1.8 %, 1.0 % and
    0.01 % off; without the drift's correction 46 % (a = 0.5) and 139 % (a = 2).
    """
    names = _run("sampler")

    def policy(z, time, cond):
        t = time.reshape(-1, 1)
        variance = 0.25 * (1 - t) ** 2 + t**2
        covariance = t - 0.25 * (1 - t)  # of eps - x0 with z_t
        return -1.0 + covariance / variance * (z - (1 - t))

    keys = jax.random.split(jax.random.key(3), 16)
    kernel, cond = names["langevin"](80, a), names["Cond"](jnp.zeros((16, 1)))
    times = jnp.asarray(names["step_times"](kernel, 16))
    trained = jnp.zeros((1, 16), jnp.int32)
    x0, _ = names["rollout"](
        *(policy, kernel, names["score"], keys, cond, (2048,), times, trained)
    )
    np.testing.assert_allclose(jnp.mean(x0), 1.0, atol=0.02)
    np.testing.assert_allclose(jnp.std(x0), 0.5, rtol=0.03)


def test_the_model_paints_what_it_was_told(own_registries):
    pipeline = _run("model")["one_colour"](base.get_config())
    red = jnp.array([1.0, -1.0, -1.0])
    colours = pipeline.init(jax.random.key(0))["params"]["colour"].at[0].set(red)
    cond = pipeline.encode(["red", "blue"])
    z = jax.random.normal(jax.random.key(1), (2, *pipeline.latent_shape))
    velocity = pipeline.denoise({"colour": colours}, None, z, jnp.ones(2), cond)
    pictures = pipeline.decode(z - velocity)
    assert pictures.shape == (2, 32, 32, 3)
    assert (pictures[0] == jnp.array([255, 0, 0])).all()
    assert (pictures[1] == 128).all()
    with pytest.raises(ValueError):  # what a Pipeline owes its caller
        pipeline.encode(["mauve"])


def _one_colour_config():
    """A small run of the model of the snippet."""
    config = smoke.shrink(base.get_config(), "smoke")
    config.model.name = "one_colour"
    config.prompts.update(source="list", list=("red", "green", "blue"), limit=0)
    config.prompts.update(per_epoch=2, group_size=8)
    config.rewards.heldout = ()
    config.data.source = "none"
    config.log.update(tensorboard=False, progress=False)
    return config


def test_what_the_snippets_register_a_configuration_can_name(own_registries, tmp_path):
    """One row a thing, and `check_config` takes it."""
    config = _one_colour_config()
    with pytest.raises(UserError, match=r"model\.name has an unknown name"):
        check_config(config, 8)
    _run("model")
    check_config(config, 8)
    config.data.update(source="samples", path=str(tmp_path))  # pictures, as its latents
    config.data_term.weight = 0.1
    check_config(config, 8)
    langevin = _run("sampler")["langevin"]
    row = (lambda sampler, read: langevin(sampler.steps), schedules.FLOW)
    kernels._KERNELS["langevin"] = row
    config.sampler.kernel = "langevin"
    check_config(config, 8)
    _run("reward")
    with config.ignore_type():
        config.rewards.weights = {"whiteness": 1.0}
    check_config(config, 8)


@pytest.mark.slow
def test_the_model_goes_through_the_whole_loop(own_registries, tmp_path):
    """Rollout, judges, update, checkpoint, evaluation and report know only Pipeline."""
    _run("model")
    config = _one_colour_config()
    check_config(config, jax.device_count())
    train(config, str(tmp_path / "run"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["policy/ratio_max_deviation"] == 0.0
    assert last["samples_seen"] == config.train.epochs * 16
    assert last["reward/compressibility/std"] == 0.0  # flat pictures, all as small
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_objective_starts_as_reinforce():
    """d/dlp of -mean(A exp(lp - old)) at lp = old is -A / n; the leash has slope 0."""
    names = _run("objective")
    np.testing.assert_allclose(names["gradient"], [-0.5, 0.5], rtol=1e-6)
    far = names["log_prob"] + 1.0
    loss, metrics = names["leashed"](far, names["log_prob"], names["advantages"], 10.0)
    np.testing.assert_allclose(metrics["approx_kl"], 0.5)
    np.testing.assert_allclose(loss, 5.0)  # the gains of +1 and -1 cancel


def test_the_base_policy_it_describes_is_the_one_that_is_shipped():
    """Size, weights and both rates: what is retrained has to be judged anew."""
    assets = ROOT / "ddrl_jax" / "assets"
    assert sum(p.stat().st_size for p in assets.rglob("*") if p.is_file()) <= 20e6
    with np.load(BASE) as file:
        leaves = [file[name] for name in file.files]
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float16")}
    count = sum(leaf.size for leaf in leaves)
    assert count <= 5e6 and f"{count / 1e6:.2f} M parameters" in README
    judged = (ROOT / "benchmarks/results/base_policy.md").read_text(encoding="utf-8")
    assert hashlib.sha256(BASE.read_bytes()).hexdigest()[:16] in judged
    rates = dict(re.findall(r"^\| (\d) \| ([\d.]+) % \|", judged, re.MULTILINE))
    assert float(rates["1"]) >= 50 and float(rates["3"]) >= 70
    text = " ".join(README.split())
    assert f"names {rates['3']} % of 512 such samples" in text
    assert f"{rates['1']} % without guidance" in text


def _table(name: str) -> tuple[str, dict[str, list[str]]]:
    """A page of benchmarks/results, and its rows by their first cells."""
    page = (ROOT / "benchmarks/results" / f"{name}.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*) \|$", page, re.MULTILINE)
    return page, {cells[0]: cells[1:] for cells in (row.split(" | ") for row in rows)}


def test_the_seconds_it_gives_are_those_of_the_profile():
    page, rows = _table("profile")
    text = " ".join(README.split())
    for stage in ("rollout", "update"):
        seconds, share = rows[stage]
        assert f"{stage} {float(seconds):.2f} s ({share})" in text
    share = float(rows["rest"][1].split()[0])
    assert share <= 5 and f"rest {rows['rest'][0]} s ({share} %" in text
    cold, warm = rows["compiling, or reading the cache: seconds"]
    assert f"takes {cold} s cold and {warm} s with the persistent cache" in text
    assert "Recompilations after the first epoch: 0" in page


def test_the_quickstart_it_describes_is_the_one_that_was_run():
    page, rows = _table("quickstart")
    seconds = int(re.search(r"(\d+) seconds from start to report", page)[1])
    text = " ".join(README.split())
    assert seconds <= 600 and f"{seconds / 60:.1f} minutes on two cores" in text
    first, last = rows["0"], rows["60"]
    assert f"{first[0]} to {last[0]} kB" in text
    assert f"retrieval {first[1][:-2]} to {last[1]}" in text
    rise = 100 * (float(last[2]) / float(first[2]) - 1)
    assert f"held-out data loss {rise:+.0f} %" in text
    assert f"{seconds} seconds on 2 CPU cores" in CONFIGS["quickstart"].__doc__


def test_the_map_names_every_module_and_nothing_else():
    block = re.search(r"<!-- map -->\n```\n(.*?)```", README, re.DOTALL)
    assert block, "README.md has no map"
    shown = set(re.findall(r"^  (\w+(?:\.py|/))", block[1], re.MULTILINE))
    package = ROOT / "ddrl_jax"
    modules = {p.name for p in package.glob("*.py")} - {"__init__.py"}
    folders = {f"{p.parent.name}/" for p in package.glob("*/__init__.py")}
    assert shown == modules | folders


def test_the_files_it_points_to_exist():
    linked = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", README)
    quoted = re.findall(r"\b(?:configs|tests|benchmarks|ddrl_jax)/[\w/]+\.\w+", README)
    missing = {name for name in [*linked, *quoted] if not (ROOT / name).exists()}
    assert not missing


def test_the_targets_it_names_exist():
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", README))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test"} <= named
    assert named <= set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))


def test_the_keys_it_names_exist():
    config = base.get_config()
    sections = "|".join(key for key in config if hasattr(config[key], "keys"))
    named = set(re.findall(rf"(?<![\w.])(?:{sections})\.\w+\b(?!\.)", README))
    named = {name for name in named if not name.endswith((".py", ".jsonl"))}
    assert "data_term.weight" in named
    unknown = {n for n in named if n.split(".")[1] not in config[n.split(".")[0]]}
    assert not unknown


def _commands(text: str) -> list[list[str]]:
    """The arguments of its commands `python -m ddrl_jax.main`, lines joined."""
    lines = text.replace("\\\n", " ")
    return [shlex.split(a) for a in re.findall(r"-m ddrl_jax\.main +([^`\n#]+)", lines)]


@pytest.mark.parametrize(
    "path", ["README.md", *(f"configs/{name}.py" for name in MODULES)]
)
def test_the_commands_it_shows_are_understood(path, monkeypatch):
    """Each file, variant, flag and key is there, and each value one that fits."""
    monkeypatch.chdir(ROOT)
    commands = _commands((ROOT / path).read_text(encoding="utf-8"))
    assert len(commands) >= 4 or path != "README.md"
    for arguments in commands:
        command = parse(["main", *arguments])
        check_keys(command.config)


def test_the_flags_it_names_exist():
    """Those in the midst of a sentence too."""
    flags = re.findall(r"--((?:config|plan|distributed)\.[\w.]*\w)", README)
    keys = {f"config.{key}" for key in flatten(base.get_config())}
    assert "config.train.microbatch" in flags
    assert set(flags) <= keys | set(PLAN) | set(PLACE)


def test_the_benchmarks_it_names_exist():
    named = set(re.findall(r"-m benchmarks\.(\w+)", README))
    assert len(named) > 4
    assert named <= {path.stem for path in (ROOT / "benchmarks").glob("*.py")}


def test_the_places_it_sends_a_new_name_to_exist():
    for table, where in (("REWARDS", registry), ("_KERNELS", kernels)):
        assert f"`{table}`" in README
        assert isinstance(getattr(where, table), dict)
    for table in ("PIPELINES", "SOURCES"):
        assert f"`{table}`" in README
        assert isinstance(getattr(pipelines, table), dict)


# ---- the headers of the configurations, to which --help sends a reader

CONFIGS = {name: importlib.import_module(f"configs.{name}") for name in MODULES}


def _header(name: str) -> str:
    """That of the file, and of the one in which it says that its variants are."""
    text = CONFIGS[name].__doc__
    other = re.search(r"ariants\s+and\s+what\s+they\s+set:\s+configs/(\w+)\.py", text)
    return text + (_header(other[1]) if other else "")


@pytest.mark.parametrize(
    "name", [n for n in CONFIGS if hasattr(CONFIGS[n], "get_config")]
)
def test_a_header_lists_the_variants_of_its_file(name, monkeypatch):
    known = []
    for module in CONFIGS.values():
        if hasattr(module, "check_variant"):
            monkeypatch.setattr(module, "check_variant", lambda _, k: known.extend(k))
    CONFIGS[name].get_config()
    text = _header(name)
    assert "`--config=FILE:smoke`" in base.__doc__  # it is that of every file
    words = {word for variant in known for word in variant.split("-")} - {"smoke"}
    patterns = re.findall(r"\w+_\*", text)
    named = set(re.findall(r"\w+", text))
    named |= {w for w in words if any(fnmatch.fnmatch(w, p) for p in patterns)}
    assert words - named == set()
