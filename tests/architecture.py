"""The rules of the house as functions: a parsed file in, violations out.

A violation reads `file:line: rule`. `test_architecture.py` runs the rules over the
repository and shows that each of them can fail.
"""

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

FILE_LINES = 350
FUNCTION_LINES = 60
LOOP_LINES = 200  # of the one training loop
LOOP = ("ddrl_jax/train.py", "run")
NESTING = 3
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}

# Who may import whom. A row holds for the module and all below it, the longest row
# that fits wins, and an entry allows the module it names and all below that one.
# `errors`, `interfaces`, `text` and `file_tree` are open to everybody and are added to
# every row.
EVERYBODY = ("errors", "interfaces", "text", "file_tree")
PLUMBING = (
    "optim",
    "sharding",
    "metrics",
    "metrics_file",
    "workdir",
    "preemption",
    "pictures",
)
PLUMBING += (
    "checkpoint",
    "fingerprint",
    "checksum",
    "orbax_log",
    "report",
    "skipped",
    "finite",
    "curves",
    "start_note",
    "board",
    "wandb_run",
)
MEASURES = ("flops", "chips", "profile")
CHECKS = ("config_rules", "config_values", "check_config", "check_objective")
CHECKS += ("check_network", "check_optimizer", "config_file", "command_line")
CHECKS += ("config_notes",)
PARTS = ("diffusion", "objectives", "models", "rewards", "data", "rollout", "learner")
PARTS += ("terms",)
RUN = (
    "sources",
    "weights",
    "program",
    "draws",
    "collect",
    "self_test",
    "resume",
    "mfu",
    "matmul_precision",
)  # one run put together
MODES = ("evaluate", "sample", "export", "plan")
BELOW_TRAIN = (*PARTS, *PLUMBING, "distributed", *MEASURES, *CHECKS, *RUN)
IMPORT_TABLE: dict[str, tuple[str, ...]] = {
    "": (),
    "errors": (),
    "text": (),
    "file_tree": (),
    "interfaces": (),
    "assets": ("assets", "data", "models", "rewards"),  # the scripts that build them
    "diffusion": ("diffusion",),
    "objectives": ("objectives", "diffusion"),
    "models": ("models", "sharding"),
    "rewards": (
        "rewards",
        "models.clip",
        "models.clip_tokenizer",
        "models.convert",
        "models.folder",
        "models.hub",
    ),
    "data": ("data",),
    "rollout": ("diffusion.gaussian",),
    "terms": ("rollout", "objectives", "diffusion"),
    "learner": ("terms", "rollout", "objectives", "diffusion", "optim", "sharding"),
    "watch": (),
    "surroundings": (),
    "lock": (),
    "distributed": ("watch", "surroundings"),
    **{name: ("distributed",) for name in PLUMBING},
    **{name: () for name in MEASURES},
    "checkpoint": ("fingerprint", "orbax_log", "distributed"),
    "fingerprint": ("checksum",),
    "metrics": ("board", "wandb_run"),
    "config_difference": (),
    "report": ("curves", "start_note"),
    "workdir": ("config_difference", "distributed", "lock", "start_note"),
    "metrics_file": ("metrics", "workdir"),
    **{
        name: ("diffusion", "models", "rewards", "data", "terms", *CHECKS)
        for name in CHECKS
    },
    **{
        name: (*PARTS, *PLUMBING, "distributed", *MEASURES, *RUN, "check_optimizer")
        for name in RUN
    },
    **{name: (*BELOW_TRAIN, *MODES) for name in MODES},
    "sample": (*BELOW_TRAIN, *MODES, "lock"),
    "train": (*BELOW_TRAIN, *MODES),
    "compare": (
        *("compare", "config_difference", "train", "main"),
        *(*BELOW_TRAIN, *MODES),
    ),
    "main": (*BELOW_TRAIN, *MODES, "train", "compare", "surroundings"),
}
# Others' packages that only a part of the program may know.
CONFINED = {
    "flax": ("models",),
    "orbax": ("checkpoint",),
    "tensorflow_datasets": ("data", "assets", "sample"),
    "transformers": ("models",),
    "diffusers": ("models",),
    "tensorboardX": ("board",),
    "wandb": ("wandb_run",),
    "torch": (),
    "tensorflow": (),
}


class Source(NamedTuple):
    """A file: its path from the root of the repository, its text, its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @classmethod
    def parse(cls, path: str, text: str) -> "Source":
        return cls(path, text, ast.parse(text))

    @property
    def in_package(self) -> bool:
        return self.path.startswith("ddrl_jax/")

    @property
    def module(self) -> str:
        """Dotted name below ddrl_jax: "" for the package itself."""
        name = self.path.removeprefix("ddrl_jax/").removesuffix(".py")
        return name.removesuffix("__init__").strip("/").replace("/", ".")

    def at(self, node: ast.AST | int, rule: str) -> str:
        line = node if isinstance(node, int) else node.lineno  # type: ignore
        return f"{self.path}:{line}: {rule}"


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, ast.AsyncFor)


def budgets(source: Source) -> Iterator[str]:
    """Lines of a file and of its functions, signature and docstring included."""
    lines = source.text.count("\n")
    if lines > FILE_LINES:
        yield source.at(1, f"{lines} lines, at most {FILE_LINES}: split by noun")
    for node in ast.walk(source.tree):
        if not isinstance(node, FUNCTIONS):
            continue
        if source.path.startswith("configs/") and node.name == "get_config":
            continue  # a table of keys
        limit = LOOP_LINES if (source.path, node.name) == LOOP else FUNCTION_LINES
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > limit:
            yield source.at(node, f"{node.name} has {length} lines, at most {limit}")


def nesting(source: Source) -> Iterator[str]:
    """Depth of blocks; `elif` adds none, and an inner function starts again."""

    def walk(node: ast.AST, depth: int) -> Iterator[str]:
        for field, children in ast.iter_fields(node):
            for child in children if isinstance(children, list) else [children]:
                if not isinstance(child, ast.AST):
                    continue
                elif_branch = isinstance(node, ast.If) and field == "orelse"
                elif_branch = elif_branch and isinstance(child, ast.If)
                inner = depth + (isinstance(child, BLOCKS) and not elif_branch)
                inner = 0 if isinstance(child, DEFINITIONS) else inner
                if inner > NESTING and inner > depth:
                    yield source.at(child, f"nested {inner} deep, at most {NESTING}")
                yield from walk(child, inner)

    yield from walk(source.tree, 0)


def telling_names(source: Source) -> Iterator[str]:
    """No file or folder called after nothing in particular."""
    for part in source.path.removesuffix(".py").split("/"):
        words = set(part.lower().split("_"))
        if words & VAGUE:
            yield source.at(1, f'"{part}" says nothing: name what is in it')


def docstrings(source: Source) -> Iterator[str]:
    """Every public name of the package says what it is."""
    if not source.in_package:
        return
    if not ast.get_docstring(source.tree):
        yield source.at(1, "the module has no docstring")

    def walk(owner: ast.Module | ast.ClassDef) -> Iterator[str]:
        for node in owner.body:
            public = isinstance(node, DEFINITIONS) and not node.name.startswith("_")
            if not public or _is_stub(node):
                continue
            if not ast.get_docstring(node):
                yield source.at(node, f"{node.name} is public and has no docstring")
            if isinstance(node, ast.ClassDef):
                yield from walk(node)

    yield from walk(source.tree)


def _is_stub(node: ast.AST) -> bool:
    """A method of a Protocol, `def f(...): ...`, is documented by its class."""
    if not isinstance(node, FUNCTIONS) or len(node.body) != 1:
        return False
    only = node.body[0]
    return isinstance(only, ast.Expr) and getattr(only.value, "value", 0) is Ellipsis


def imported(source: Source, modules: set[str]) -> Iterator[tuple[ast.AST, str]]:
    """Every import of a file, at any depth, as (node, full dotted name)."""
    package = ("ddrl_jax." + source.module).rstrip(".").split(".")
    if not source.path.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        if not isinstance(node, ast.ImportFrom):
            continue
        above = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:
            full = f"{base}.{alias.name}"
            yield node, full if full in modules else base


def _below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def import_table(source: Source, modules: set[str]) -> Iterator[str]:
    """Imports within the package follow the table, arrows downward only."""
    if not source.in_package:
        return
    rows = [row for row in IMPORT_TABLE if row and _below(source.module, (row,))]
    row = max(rows, key=len, default="")
    if source.module and not row:
        yield source.at(1, f"ddrl_jax.{source.module} has no row in IMPORT_TABLE")
        return
    allowed = (*IMPORT_TABLE[row], *EVERYBODY)
    for node, name in dict.fromkeys(imported(source, modules)):
        if name.split(".")[0] == "configs":
            yield source.at(node, "the package never imports configs")
        inside = name.startswith("ddrl_jax.")
        if inside and not _below(name.removeprefix("ddrl_jax."), allowed):
            owner = row or "ddrl_jax"
            yield source.at(node, f"{owner} may not import {name}, see IMPORT_TABLE")


def confined_packages(source: Source, modules: set[str]) -> Iterator[str]:
    """A dependency is known to the part that owns it and to no other."""
    if not source.in_package:
        return
    for node, name in imported(source, modules):
        owners = CONFINED.get(name.split(".")[0])
        if owners is not None and not _below(source.module, owners):
            where = " and ".join(owners) or "nothing"
            yield source.at(node, f"{name} is imported by {where} only")


def config_imports(source: Source, modules: set[str]) -> Iterator[str]:
    """An experiment file knows ml_collections and its base, and no code."""
    if not source.path.startswith("configs/"):
        return
    for node, name in imported(source, modules):
        if not _below(name, ("ml_collections", "configs")):
            yield source.at(node, f"configs import ml_collections and base, not {name}")


def quiet_import(source: Source) -> Iterator[str]:
    """No call into JAX while a module is read; decorators wrap and do not run."""
    if not source.in_package:
        return
    roots = {"jax", "jnp", "lax", "nn"} & _aliases(source.tree)

    def walk(node: ast.AST) -> Iterator[str]:
        children: list[ast.AST] = list(ast.iter_child_nodes(node))
        if isinstance(node, FUNCTIONS):
            children = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        if isinstance(node, ast.Lambda):
            children = []
        if isinstance(node, ast.ClassDef):
            children = list(node.body)
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if re.split(r"\W", name)[0] in roots:
            yield source.at(node, f"{name}(...) runs at import")
        for child in children:
            yield from walk(child)

    yield from walk(source.tree)


def _aliases(tree: ast.Module) -> set[str]:
    nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom))
    return {(a.asname or a.name).split(".")[0] for n in nodes for a in n.names}
