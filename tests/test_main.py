"""The command line: what is understood, what is called, and how a command ends."""

import errno
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from ddrl_jax.command_line import MODES, parse
from ddrl_jax.config_file import PATHS, load_config
from ddrl_jax.config_rules import flatten
from ddrl_jax.errors import UserError
from ddrl_jax.main import run

ROOT = Path(__file__).resolve().parents[1]
SMOKE = f"--config={ROOT}/configs/quickstart.py:smoke"
CALLS = {
    "train": ("train", "train"),
    "evaluate": ("evaluate", "evaluate_mode"),
    "sample": ("sample", "sample_mode"),
    "export": ("export", "export_mode"),
    "report": ("report", "write_report"),
    "compare": ("compare", "compare_mode"),
    "plan": ("plan", "plan_mode"),
}


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a function in the place of a mode, so that nothing is trained."""
    kept = jax.config.jax_compilation_cache_dir  # pyright: ignore

    def replace(mode: str, function) -> None:
        module, name = CALLS[mode]
        fake = types.SimpleNamespace(**{name: function})
        monkeypatch.setitem(sys.modules, f"ddrl_jax.{module}", fake)

    yield replace
    jax.config.update("jax_compilation_cache_dir", kept)


def understood(*arguments: str):
    return parse(["main", SMOKE, "--workdir=w", *arguments]).config


# ---- what is understood


def test_overrides_reach_the_configuration_whatever_their_order_and_form():
    command = parse(
        ["main", "--config.train.epochs=7", "--workdir=w", SMOKE]
        + ["--config.optimizer.lr", "1", "--mode=evaluate", "--noconfig.log.progress"]
    )
    config = command.config
    assert (command.mode, command.workdir) == ("evaluate", "w")
    assert (config.train.epochs, config.log.progress) == (7, False)
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)


@pytest.mark.parametrize("text", ["(0,2)", "0,2", "[0, 2]"])
def test_a_tuple_can_be_written_in_several_ways(text):
    assert understood(f"--config.policy.train_on={text}").policy.train_on == (0, 2)


def test_a_table_of_rewards_is_replaced_as_a_whole_and_changed_in_part():
    replaced = understood("--config.rewards.weights={'incompressibility': 2.0}")
    assert replaced.rewards.weights.to_dict() == {"incompressibility": 2.0}
    changed = understood("--config.rewards.weights.compressibility=2")
    assert changed.rewards.weights.to_dict() == {"compressibility": 2.0}


def test_negative_numbers_and_later_values_count():
    assert understood("--config.mesh.data=2", "--config.mesh.data=-1").mesh.data == -1


def test_the_variant_reaches_get_config_and_the_configuration_is_locked():
    assert load_config(f"{ROOT}/configs/quickstart.py").train.epochs > 2
    config = load_config(f"{ROOT}/configs/quickstart.py:smoke")
    assert config.train.epochs == 2 and config.is_locked
    with pytest.raises(AttributeError):
        config.new_key = 1


def test_a_configuration_may_import_from_the_folder_beside_it(tmp_path):
    folder = tmp_path / "lab_of_test_main"
    folder.mkdir()
    (folder / "width.py").write_text("WIDTH = 64\n")
    (folder / "mine.py").write_text(
        "from configs import base\nfrom lab_of_test_main.width import WIDTH\n"
        "def get_config():\n    c = base.get_config()\n    c.model.width = WIDTH\n"
        "    return c\n"
    )
    before = list(sys.path)
    assert load_config(str(folder / "mine.py")).model.width == 64
    assert sys.path == before


def test_one_command_leaves_no_trace_in_the_next():
    assert understood("--config.train.epochs=7").train.epochs == 7
    assert understood().train.epochs == 2


# ---- what is called


@pytest.mark.parametrize("mode", CALLS)
def test_a_mode_calls_its_function(mode, stand_in, tmp_path, capsys):
    calls = []
    stand_in(mode, lambda *arguments: calls.append(arguments) or "report.html")
    config = [] if mode in ("report", "compare") else [SMOKE]
    assert run(["main", *config, f"--workdir={tmp_path}", f"--mode={mode}"]) == 0
    (arguments,) = calls
    unset = dict.fromkeys(("devices", "chip", "efficiency", "suggest", "slices"))
    unset["compiler"] = None
    assert arguments[-1] == (unset if mode == "plan" else str(tmp_path))
    if mode == "report":
        assert capsys.readouterr().out == "report.html\n"
    elif mode != "compare":
        assert arguments[0].name == "quickstart:smoke"


def test_every_mode_is_tested_here_and_training_is_what_happens_unless_told():
    assert set(CALLS) == set(MODES)
    assert parse(["main", SMOKE, "--workdir=w"]).mode == "train"


def test_a_bad_configuration_never_reaches_its_mode(stand_in, capsys):
    stand_in("train", lambda *_: pytest.fail("trained with a bad configuration"))
    assert run(["main", SMOKE, "--workdir=w", "--config.train.minibatches=3"]) == 2
    assert "train.minibatches" in capsys.readouterr().err


@pytest.fixture
def written(tmp_path):
    """written(body): a configuration file whose get_config ends with these lines."""

    def write(body: str) -> str:
        head = "from ml_collections import FrozenConfigDict, config_dict\n"
        head += "from configs import base\ndef get_config():\n"
        lines = ("c = base.get_config()", *body.splitlines())
        (tmp_path / "mine.py").write_text(head + "".join(f"    {x}\n" for x in lines))
        return f"--config={tmp_path / 'mine.py'}"

    return write


def test_a_placeholder_is_filled_on_the_command_line(written):
    body = "c.seed = config_dict.required_placeholder(int)\nreturn c"
    command = ["main", "--workdir=w", written(body)]
    assert parse([*command, "--config.seed=7"]).config.seed == 7
    with pytest.raises(UserError, match="seed has no value"):
        parse(command)
    with pytest.raises(UserError, match="seed has a value of the wrong type"):
        parse([*command, "--config.seed=x"])


def test_a_frozen_configuration_can_be_overridden(written):
    command = ["main", "--workdir=w", written("return FrozenConfigDict(c)")]
    config = parse([*command, "--config.train.epochs=7"]).config
    assert config.train.epochs == 7 and config.is_locked
    wanted = load_config(f"{ROOT}/configs/base.py")
    wanted.train.epochs = 7
    assert flatten(config) == flatten(wanted)


def test_a_home_is_spelt_out_once_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    overrides = [f"--config.{key}=~/x" for key in PATHS]
    command = parse(["main", SMOKE, "--workdir=~/w", *overrides])
    values = flatten(command.config)
    assert command.workdir == "/somewhere/w"
    assert {values[key] for key in PATHS} == {"/somewhere/x"}
    # of this machine, not of the run: neither stored nor compared as another path
    assert values["data.cache"].startswith("~")
    # every key that reads like a path is one
    paths = {k for k in values if k.split(".")[-1] in ("path", "init", "output")}
    assert paths <= set(PATHS)


def test_a_home_in_a_file_is_spelt_out_too(monkeypatch, written):
    monkeypatch.setenv("HOME", "/somewhere")
    file = written("c.model.init = '~/mine'\nreturn c")
    assert parse(["main", "--workdir=w", file]).config.model.init == "/somewhere/mine"


@pytest.mark.parametrize("key", PATHS)
def test_a_home_of_nobody_is_no_folder_of_that_name(key):
    with pytest.raises(UserError, match=f"--config.{key} begins with a home"):
        parse(["main", SMOKE, "--workdir=w", f"--config.{key}=~no-such-user/x"])


def test_a_home_of_nobody_in_a_file_may_be_overridden(written):
    command = ["main", "--workdir=w", written("c.model.init = '~nobody-'\nreturn c")]
    with pytest.raises(UserError, match=r"--config\.model\.init begins with a home"):
        parse(command)
    assert parse([*command, "--config.model.init=/x"]).config.model.init == "/x"


# ---- how a command ends


def failing(error: BaseException):
    def mode(*_):
        raise error

    return mode


def test_an_error_of_the_user_is_one_message_and_status_2(stand_in, capsys):
    error = UserError("it is full", got="a", wanted="b", way_out="c")
    stand_in("train", failing(error))
    assert run(["main", SMOKE, "--workdir=w"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "ddrl_jax: error: it is full\n  got:     a\n  wanted:  b\n  way out: c\n"
    )
    assert captured.out == ""


REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
REFUSALS += (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


@pytest.mark.parametrize("number", REFUSALS)
def test_a_disk_or_a_path_that_refuses_is_an_error_of_the_user(
    number, stand_in, capsys
):
    stand_in("train", failing(OSError(number, os.strerror(number), "w/state")))
    assert run(["main", SMOKE, "--workdir=w"]) == 2
    message = capsys.readouterr().err
    assert "w/state" in message and os.strerror(number) in message


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_what_may_not_be_read_or_written_need_not_be_the_workdir(
    number, stand_in, capsys
):
    stand_in("train", failing(OSError(number, os.strerror(number), "pictures")))
    assert run(["main", SMOKE, "--workdir=w"]) == 2
    message = capsys.readouterr().err
    assert "in --workdir, or in the key of a path" in message
    if number == errno.EACCES:  # room is not what it lacks
        assert "permission to read" in message and "room" not in message


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EBADF, "?"), OSError(errno.EISDIR, "no path"), ValueError("a bug")],
)
def test_a_bug_keeps_its_traceback(error, stand_in):
    stand_in("train", failing(error))
    with pytest.raises(type(error)):
        run(["main", SMOKE, "--workdir=w"])


def test_an_interrupt_has_the_status_of_one(stand_in):
    stand_in("train", failing(KeyboardInterrupt()))
    assert run(["main", SMOKE, "--workdir=w"]) == 130


def test_help_names_every_mode(capsys):
    assert run(["main", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--mode={mode}" in text for mode in MODES)
    assert "--mode=train     the default: " in text
    assert ":smoke; its header lists them" in text


# ---- the cache of compiled programs


def cache_folder(stand_in) -> str | None:
    found = []
    stand_in(
        "train",
        lambda *_: found.append(jax.config.jax_compilation_cache_dir),  # pyright: ignore
    )
    assert run(["main", SMOKE, "--workdir=w"]) == 0
    return found[0]


def test_compiled_programs_are_kept_where_the_environment_says(
    stand_in, monkeypatch, tmp_path
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "here"))
    assert cache_folder(stand_in) == str(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "~/mine")
    assert cache_folder(stand_in) == str(tmp_path / "mine")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(stand_in) == str(tmp_path / "ddrl_jax" / "jax")


def test_a_cache_that_can_not_be_written_stops_nothing(
    stand_in, monkeypatch, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for folder in (str(tmp_path / "file" / "cache"), "~no-such-user/cache"):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        assert cache_folder(stand_in) is None
        assert "not kept" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- as a program


def program(*arguments: str, code: str = "") -> subprocess.CompletedProcess:
    command = ["-c", code] if code else ["-m", "ddrl_jax.main"]
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_importing_main_loads_nothing_slow():
    slow = "{'jax', 'jaxlib', 'numpy', 'flax', 'orbax', 'tensorflow_datasets'}"
    code = f"import sys, ddrl_jax.main; print({slow} & set(sys.modules))"
    result = program(code=code)
    assert result.stdout == "set()\n", result.stdout + result.stderr


def test_a_platform_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
    result = program(SMOKE, f"--workdir={tmp_path}")
    assert result.returncode == 2
    assert "no_such_platform" in result.stderr and "Traceback" not in result.stderr
    assert "JAX_PLATFORMS=cpu" in result.stderr
