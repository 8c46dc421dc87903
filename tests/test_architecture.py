"""The repository keeps the rules of architecture.py, and each rule can fail."""

import ast
import importlib
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import architecture as rules
import pytest
from architecture import Source

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("ddrl_jax", "configs", "benchmarks", "launch", "tests")
SOURCES = [
    Source.parse(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    for path in [
        ROOT / "setup.py",
        *(p for f in FOLDERS for p in ROOT.glob(f + "/**/*.py")),
    ]
]
MODULES = {
    ("ddrl_jax." + source.module).rstrip(".") for source in SOURCES if source.in_package
}
OF_ONE_FILE = (
    rules.budgets,
    rules.nesting,
    rules.telling_names,
    rules.docstrings,
    rules.quiet_import,
)
OF_IMPORTS = (rules.import_table, rules.confined_packages, rules.config_imports)
RULES = {rule.__name__: rule for rule in OF_ONE_FILE}
RULES |= {
    rule.__name__: lambda source, rule=rule: rule(source, MODULES)
    for rule in OF_IMPORTS
}


def _violations(name: str, path: str, text: str) -> list[str]:
    source = Source.parse(path, textwrap.dedent(text).lstrip("\n"))
    return list(RULES[name](source))


@pytest.mark.parametrize("name", RULES)
def test_the_repository_keeps_the_rule(name):
    assert len(SOURCES) > 20  # the files were found
    found = [violation for source in SOURCES for violation in RULES[name](source)]
    assert not found, "\n" + "\n".join(found)


DEEP = """
    def f(a):
        for b in a:
            if b:
                while b:
                    {}
"""
LADDER = """
    def f(a):
        if a == 1:
            pass
        elif a == 2:
            pass
        elif a == 3:
            pass
        elif a == 4:
            return [x for x in a if x for y in x]
"""
PROTOCOL = '''
    """A module."""
    class P:
        """A protocol."""
        def method(self) -> int: ...
'''
LONG = "def f():\n" + "    x = 1\n" * 60
CASES = {
    # rule, path, text, line of the violation (0: there is none)
    "file of 351 lines": ("budgets", "configs/a.py", "x = 1\n" * 351, 1),
    "file of 350 lines": ("budgets", "configs/a.py", "x = 1\n" * 350, 0),
    "function of 61 lines": ("budgets", "ddrl_jax/a.py", LONG, 1),
    "function of 60 lines": ("budgets", "ddrl_jax/a.py", LONG[:-10], 0),
    "the training loop": (
        "budgets",
        *("ddrl_jax/train.py", LONG.replace(" f", " run")),
        0,
    ),
    "another file's run": (
        "budgets",
        "ddrl_jax/a.py",
        LONG.replace(" f", " run"),
        1,
    ),
    "nested 4 deep": ("nesting", "tests/a.py", DEEP.format("with b: pass"), 5),
    "nested 3 deep": ("nesting", "tests/a.py", DEEP.format("pass"), 0),
    "elif is no nesting": ("nesting", "tests/a.py", LADDER, 0),
    "vague file": ("telling_names", "ddrl_jax/data/io_utils.py", "", 1),
    "vague folder": ("telling_names", "ddrl_jax/common/jpeg.py", "", 1),
    "telling file": ("telling_names", "ddrl_jax/miscible.py", "", 0),
    "module without docstring": ("docstrings", "ddrl_jax/a.py", "x = 1", 1),
    "public method": (
        *("docstrings", "ddrl_jax/a.py"),
        '"""M."""\nclass A:\n    """A."""\n    def f(self): return 1',
        4,
    ),
    "private function": (
        "docstrings",
        "ddrl_jax/a.py",
        '"""M."""\ndef _f(): return 1',
        0,
    ),
    "protocol method": ("docstrings", "ddrl_jax/a.py", PROTOCOL, 0),
    "a test needs none": ("docstrings", "tests/a.py", "def test(): pass", 0),
    "upward": ("import_table", "ddrl_jax/diffusion/a.py", "import ddrl_jax.rollout", 1),
    "upward, from": (
        "import_table",
        "ddrl_jax/rollout.py",
        "from ddrl_jax.models import b",
        1,
    ),
    "upward, relative": (
        "import_table",
        "ddrl_jax/data/a.py",
        "from ..rewards import b",
        1,
    ),
    "upward, hidden": (
        *("import_table", "ddrl_jax/learner.py"),
        "def f():\n    from ddrl_jax import rewards",
        2,
    ),
    "downward": (
        "import_table",
        "ddrl_jax/learner.py",
        "from ddrl_jax.diffusion import b",
        0,
    ),
    "the contract": (
        "import_table",
        "ddrl_jax/data/a.py",
        "from ddrl_jax.errors import b",
        0,
    ),
    "sibling": ("import_table", "ddrl_jax/rewards/a.py", "from . import b", 0),
    "no row": ("import_table", "ddrl_jax/unheard_of.py", "", 1),
    "configs": ("import_table", "ddrl_jax/train.py", "from configs import base", 1),
    "flax above models": (
        "confined_packages",
        "ddrl_jax/train.py",
        "import flax.linen",
        1,
    ),
    "flax in models": (
        "confined_packages",
        "ddrl_jax/models/a.py",
        "from flax import linen",
        0,
    ),
    "torch": ("confined_packages", "ddrl_jax/models/load.py", "import torch", 1),
    "config with code": (
        "config_imports",
        "configs/a.py",
        "from ddrl_jax import main",
        1,
    ),
    "config with base": (
        "config_imports",
        "configs/a.py",
        "from configs import base",
        0,
    ),
    "constant on device": (
        *("quiet_import", "ddrl_jax/a.py"),
        "import jax.numpy as jnp\nZERO = {'a': jnp.zeros(3)}",
        2,
    ),
    "default argument": (
        *("quiet_import", "ddrl_jax/a.py"),
        "import jax\ndef f(key=jax.random.key(0)): pass",
        2,
    ),
    "inside a function": (
        *("quiet_import", "ddrl_jax/a.py"),
        "import jax\n@jax.jit\ndef f(x): return jax.lax.exp(x)",
        0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_rule_sees(case):
    name, path, text, line = CASES[case]
    found = _violations(name, path, text)
    assert [v.rsplit(": ", 1)[0].split(":")[1] for v in found] == [str(line)] * bool(
        line
    )


def _run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_package_itself_imports_nothing_heavy():
    heavy = "{'jax', 'jaxlib', 'flax', 'numpy', 'tensorflow_datasets'}"
    result = _run(f"import sys, ddrl_jax; print({heavy} & set(sys.modules))")
    assert result.stdout.strip() == "set()", result.stdout + result.stderr


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_signatures_can_be_checked(name):
    """The hook of pyproject.toml reads every annotation when a module is imported."""
    importlib.import_module(name)


def test_importing_every_module_touches_no_device():
    """With a platform that does not exist, the first array made would raise."""
    names = sorted(MODULES)
    code = f"import importlib\nfor n in {names}: importlib.import_module(n)"
    result = _run(code, JAX_PLATFORMS="no_such_platform")
    assert result.returncode == 0, result.stderr
    control = _run("import jax; jax.numpy.zeros(1)", JAX_PLATFORMS="no_such_platform")
    assert "no_such_platform" in control.stderr


def _undefined(folder: pathlib.Path) -> list[str]:
    """Undefined names, but for those in strings: ruff takes "b" of a shape for one."""
    ruff = pathlib.Path(sys.executable).with_name("ruff")
    command = [ruff, "check", "--isolated", "--select=F821", "--output-format=json"]
    result = subprocess.run(
        [*command, "--exit-zero", "--exclude=.venv", folder],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = []
    for fault in json.loads(result.stdout):
        path, place = fault["filename"], fault["location"]
        at = (place["row"], place["column"] - 1)
        if not any(begin <= at < end for begin, end in _strings(path)):
            found.append(f"{path}:{at[0]}: {fault['message']}")
    return found


def _strings(path: str) -> list[tuple[tuple, tuple]]:
    tree = ast.parse(pathlib.Path(path).read_text(encoding="utf-8"))
    texts = (n for n in ast.walk(tree) if isinstance(n, ast.Constant))
    texts = (n for n in texts if isinstance(n.value, str))
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in texts]


def test_every_name_is_defined(tmp_path):
    """F821 is off in pyproject.toml, and in pyright: both read shapes as names."""
    assert _undefined(ROOT) == []
    text = 'def f(x: "b"):\n    return missing\n'
    (tmp_path / "bad.py").write_text(text)
    (found,) = _undefined(tmp_path)
    assert found.endswith("bad.py:2: Undefined name `missing`")
