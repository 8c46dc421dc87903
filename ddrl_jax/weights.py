"""Where a run's weights come from and where they live: shapes, shards, starting values.

Shapes and shardings need no memory. What allocates is called, never built in advance:
a run that goes on from a checkpoint does not make starting weights first.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ddrl_jax.interfaces import Params, Pipeline
from ddrl_jax.learner import TrainState, init_state
from ddrl_jax.sharding import (
    AXES,
    RULES,
    Rules,
    params_shardings,
    put,
    replicated,
    spec_for,
    table,
    without,
)


class Weights(NamedTuple):
    """The starting weights of a run, described but not made."""

    config: Any
    pipeline: Pipeline
    mesh: Mesh
    init: Callable[[jax.Array], dict[str, Params]]  # the pipeline's, in our dtypes
    shapes: dict[str, Params]  # "params", and "lora" where there is one
    shardings: dict[str, Params]
    abstract: TrainState  # shapes with shardings
    fresh: Callable[[Params], TrainState]  # jitted, takes its argument over

    @property
    def trained(self) -> str:
        """Which part is trained: "lora" or "params"."""
        return "lora" if self.config.lora.rank else "params"

    def frozen(self) -> Params:
        """Makes what is never trained: the base under a LoRA, else nothing."""
        return self.base() if self.trained == "lora" else {}

    def reference(self, frozen: Params) -> Any:
        """Makes the starting policy where a KL is taken to it, as (params, frozen)."""
        if not self.config.policy.kl_weight:
            return None
        return (None, frozen) if self.trained == "lora" else (self.base(), frozen)

    def new_state(self) -> TrainState:
        """Makes the state before the first update."""
        lora = self.trained == "lora"
        return self.fresh(self._initial("lora") if lora else self.base())

    def base(self) -> Params:
        """Makes the network's weights, loaded or random, each on its shards only."""
        loaded = self.pipeline.load()
        if loaded is None:
            return self._initial("params")
        narrow = jax.tree.map(
            lambda a, like: a.astype(like.dtype, copy=False),
            loaded,
            self.shapes["params"],
        )
        return jax.tree.map(put, narrow, self.shardings["params"])

    def _initial(self, part: str) -> Params:
        key = jax.random.fold_in(jax.random.key(self.config.seed), 7)
        init = lambda k: self.init(k)[part]  # noqa: E731
        return jax.jit(init, out_shardings=self.shardings[part])(key)

    def sampling(self) -> Callable[[Params, Params], tuple[Params, Params]]:
        """Returns (trained, frozen) -> the same as the rollout has them.

        config.rollout.layout "train" passes them on; another one makes a copy at each
        call, once an epoch, which lives as long as the rollout does.
        """
        dtype, rules = self.config.rollout.dtype, rollout_rules(self.config)
        if rules is None:
            return lambda params, frozen: (params, frozen)

        def copier(part: str):
            names, shapes = self.pipeline.axes[part], self.shapes[part]
            places = params_shardings(names, shapes, self.mesh, rules)
            narrow = partial(at_most, dtype=dtype, but=self.pipeline.precise)
            return jax.jit(narrow, out_shardings=places)

        copy = copier(self.trained)
        still = copier("params") if self.trained == "lora" else lambda nothing: nothing
        return lambda params, frozen: (copy(params), still(frozen))


def rollout_rules(config: Any) -> Rules | None:
    """The table that lays out the rollout's own copy of the weights; None: no copy."""
    layout, dtype = config.rollout.layout, config.rollout.dtype
    if layout == "train" and dtype == "float32":
        return None
    kept = {"replicated": (), "tensor": ("tensor",), "train": AXES}[layout]
    return without(table(config.sharding), *(a for a in AXES if a not in kept))


def describe_weights(
    config: Any, pipeline: Pipeline, tx: optax.GradientTransformation, mesh: Mesh
) -> Weights:
    """Resolves every weight and moment to its shards; allocates nothing.

    Args:
      config: the whole configuration.
      pipeline: the model.
      tx: the optimizer.
      mesh: of the run.
    """
    init = partial(_init, config, pipeline)
    shapes = jax.eval_shape(init, jax.random.key(0))
    rules = table(config.sharding)
    shardings = params_shardings(pipeline.axes, shapes, mesh, rules)
    part = "lora" if config.lora.rank else "params"

    def fresh(params: Params) -> TrainState:
        return init_state(params, tx, config.optimizer.ema_decay)

    state = jax.eval_shape(fresh, shapes[part])
    states = _state_shardings(state, shardings[part], tx, mesh)
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, states
    )
    start = jax.jit(fresh, out_shardings=states, donate_argnums=0)
    return Weights(config, pipeline, mesh, init, shapes, shardings, abstract, start)


def tell_undivided(weights: Weights) -> None:
    """Names, on process 0, the weights that are not split as config.sharding has it.

    A run says it once: a plan describes more meshes than the one it is asked for.

    Args:
      weights: of the mesh of the run.
    """
    rules = table(weights.config.sharding)
    pipeline = weights.pipeline
    found = undivided(pipeline.axes, weights.shapes, weights.mesh, rules)
    if not found or jax.process_index():
        return
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    print(
        "sharding: not split as config.sharding has it, as they do not divide: "
        f"{'; '.join(found[:3])}{more}",
        file=sys.stderr,
        flush=True,
    )


def undivided(axes: Any, shapes: Params, mesh: Mesh, rules=RULES) -> list[str]:
    """Returns the weights that the table wants split over axes that they do not get.

    Returns:
      Lines such as "words.kernel [315, 64]: vocab 315 over tensor 2", and "..., which
      embed has" where an earlier axis of the weight is split over that one.
    """
    names = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
    found = []
    for (path, leaf), axis in zip(
        jax.tree.leaves_with_path(shapes), names, strict=True
    ):
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        lines = _not_split(axis, leaf.shape, mesh, rules)
        found += [f"{where} {list(leaf.shape)}: {line}" for line in lines]
    return found


def _not_split(axes: tuple, shape: tuple, mesh: Mesh, rules: Rules) -> list[str]:
    spec, had, found = spec_for(axes, shape, mesh, rules), {}, []
    for name, size, part in zip(axes, shape, spec, strict=False):
        wanted = [a for a in rules.get(name, ()) if mesh.shape[a] > 1]
        got = part if isinstance(part, tuple) else (part,)
        if set(wanted) - set(got):
            over = " x ".join(f"{a} {mesh.shape[a]}" for a in wanted)
            taken = [had[a] for a in wanted if a in had]
            why = f", which {taken[0]} has" if taken else ""
            found.append(f"{name} {size} over {over}{why}")
        had |= {a: name for a in got}
    return found


def _init(config: Any, pipeline: Pipeline, key: jax.Array) -> dict[str, Params]:
    """The trees of a pipeline, each leaf in the dtype in which the run keeps it."""
    trees, lora = pipeline.init(key), config.lora
    if not lora.rank:
        return trees | {"params": at_most(trees["params"], config.optimizer.master)}
    if lora.base_dtype == "compute":
        base = at_most(trees["params"], config.model.dtype, pipeline.precise)
        trees = trees | {"params": base}
    return trees | {"lora": at_most(trees["lora"], config.optimizer.master)}


def at_most(tree: Params, dtype: str, but: str = "") -> Params:
    """Rounds the leaves of a tree that are wider than a dtype.

    Args:
      tree: of arrays.
      dtype: "float32" or "bfloat16".
      but: a pattern of the names of leaves that stay as they are: Pipeline.precise.
    """
    narrow = jnp.dtype(dtype)

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        wide = leaf.dtype.itemsize > narrow.itemsize and not re.fullmatch(but, name)
        return leaf.astype(narrow) if wide else leaf

    return jax.tree_util.tree_map_with_path(cast, tree)


def _state_shardings(
    state: TrainState, shardings: Params, tx: Any, mesh: Mesh
) -> TrainState:
    """Shardings of a TrainState: moments follow their parameter, scalars replicate."""
    everywhere = replicated(mesh)

    def absent(leaf: Any) -> bool:  # in a part of the optimizer that skips this weight
        return isinstance(leaf, optax.MaskedNode)

    opt = optax.tree.map_params(
        tx,
        lambda leaf, sharding: leaf if absent(leaf) else sharding,
        state.opt_state,
        shardings,
        transform_non_params=lambda _: everywhere,
        is_leaf=absent,
    )
    return state._replace(
        step=everywhere,
        params=shardings,
        opt_state=opt,
        ema=None if state.ema is None else shardings,
        bad_updates=everywhere,
    )
