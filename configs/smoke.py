"""What `:smoke` does to every experiment here: the same row, in seconds, on noise.

No experiment itself; the variants of a file are checked here too.

    python -m ddrl_jax.main --config=configs/quickstart.py:smoke --workdir=runs/smoke

A random network of one narrow block, two epochs of sixteen samples: it shows that a row
runs from the first rollout to the last checkpoint, and nothing about its results.
"""

from ml_collections import ConfigDict


class UnknownVariant(ValueError):
    """A variant that a file does not have; the command line names those it has."""

    def __init__(self, variant: str, known: tuple[str, ...]):
        super().__init__(f'unknown variant "{variant}", there are {", ".join(known)}')
        self.variant, self.known = variant, known


def check_variant(variant: str, known: tuple[str, ...]) -> None:
    """Raises UnknownVariant unless it is one of these, or none."""
    if variant not in ("", *known):
        raise UnknownVariant(variant, known)


def shrink(config: ConfigDict, variant: str) -> ConfigDict:
    """Returns the configuration itself, or made small for the variant "smoke"."""
    check_variant(variant, ("smoke",))
    if not variant:
        return config
    c = config
    c.name = f"{c.name}:smoke"
    if c.model.name == "stable_diffusion":
        return _shrink_diffusion(c)
    c.model.update(init="random", width=32, depth=1, heads=2)
    _shrink_run(c)
    return c


def _shrink_diffusion(c: ConfigDict) -> ConfigDict:
    """The tiny random Stable Diffusion of ddrl_jax/assets, on pictures of 32 px."""
    c.model.update(init="assets", image_size=0, dtype="float32", remat="none")
    c.rewards.update(clip="assets", aesthetic_head="assets")
    c.rewards.vlm.scorer = "words"
    c.lora.rank = min(c.lora.rank, 2)
    _shrink_run(c)
    groups = 4 if c.advantages.kind == "group" else 16
    c.prompts.update(per_epoch=groups, group_size=16 // groups)
    c.data.heldout = min(c.data.heldout, 1)
    c.train.inner_epochs = min(c.train.inner_epochs, 2)
    c.advantages.update(tracker_size=8, tracker_min=4)
    return c


def _shrink_run(c: ConfigDict) -> None:
    c.prompts.update(limit=8, per_epoch=4, group_size=4)
    c.sampler.steps = 4
    # of the steps it trained, keep what the short sampler has
    c.policy.train_on = tuple(i for i in c.policy.train_on if i < c.sampler.steps - 1)
    c.policy.train_steps = min(c.policy.train_steps, 2)
    if c.sampler.window:  # two steps of noise, or all that it had of them
        first, stop = c.sampler.window
        c.sampler.window = (min(first, 1), min(stop, c.sampler.steps - 1))
    c.train.update(epochs=2, minibatches=min(c.train.minibatches, 2), microbatch=8)
    c.optimizer.warmup = 0
    c.evaluate.update(every=1, samples=8, steps=2, data_samples=8, pictures=4)
    if c.evaluate.solver == "rollout":  # whose steps are the sampler's
        c.evaluate.steps = c.sampler.steps
    c.checkpoint.every = 1
    c.sample.update(per_prompt=2, steps=2)
