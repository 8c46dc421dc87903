"""Evaluation: fixed prompts and noise, averaged weights, no draw of the training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_runs import WORDS, flat_source, perturbed_state, tiny_program

from ddrl_jax import evaluate
from ddrl_jax.data.prompts import draw_prompts
from ddrl_jax.diffusion.gaussian import Gaussian
from ddrl_jax.draws import draw_chunks
from ddrl_jax.errors import UserError
from ddrl_jax.metrics import Metrics
from ddrl_jax.pictures import grid
from ddrl_jax.rewards.registry import make_rewards
from ddrl_jax.rewards.retrieval import load_judge
from ddrl_jax.rollout import transition


class Features:
    """Stands in for the judge, which reads pictures of 32 pixels only."""

    size = 16

    @staticmethod
    def features(images):
        return images.reshape(len(images), -1)[:, :5]


@pytest.fixture(scope="module")
def run():
    # Sizes that leave the last microbatch half empty.
    program = tiny_program({"evaluate.samples": 6}, flat_source())
    return program, perturbed_state(program)


@pytest.fixture(autouse=True)
def no_judge(monkeypatch):
    monkeypatch.setattr(evaluate, "load_judge", lambda: Features)


def evaluation_of(program):
    judges = make_rewards(program.config.rewards)
    return evaluate.Evaluation(program, judges)


def changed(program, **settings):
    """The program with other keys in config.evaluate."""
    config = program.config.copy_and_resolve_references()
    config.evaluate.update(settings)
    return program._replace(config=config)


def noise_of(program, count):
    """Initial noise of the evaluation's samples, by the rule of their keys."""
    root = jax.random.key(program.config.seed)
    root = jax.random.fold_in(root, evaluate.NOISE_STREAM)
    keys = [jax.random.fold_in(root, i) for i in range(count)]
    shape = program.pipeline.latent_shape
    draws = [jax.random.normal(jax.random.fold_in(k, 0), shape) for k in keys]
    return jnp.stack(draws), keys


def test_prompts_are_repeated_in_order(run):
    assert evaluation_of(run[0]).text == (*WORDS, *WORDS[:2])


# The middle of two steps is 1/2, and with shift 3 it is 3/2 / (1 + 2/2).
@pytest.mark.parametrize(
    ("solver", "shift", "middle"),
    [("euler", 1.0, 0.5), ("euler", 3.0, 0.75), ("heun", 1.0, 0.5)],
)
def test_pictures_are_a_solve_from_fixed_noise(run, solver, shift, middle):
    program, state = run
    program = changed(program, solver=solver)
    program.config.sampler.shift = shift
    found = evaluation_of(program).sample(state.ema)[0]
    z, _ = noise_of(program, 6)
    cond = program.pipeline.encode((*WORDS, *WORDS[:2]))
    network = jax.jit(program.pipeline.denoise)
    velocity = lambda z, t: network(state.ema, None, z, jnp.full(6, t), cond)  # noqa: E731
    for t, s in ((1.0, middle), (middle, 0.0)):  # from noise to data
        v = velocity(z, t)
        if solver == "heun":  # the mean of both ends
            v = (v + velocity(z + (s - t) * v, s)) / 2
        z = z + (s - t) * v
    expected = np.asarray((z + 1.0) * 127.5)
    assert found.shape == (6, 16, 16, 3) and found.dtype == np.uint8
    inside = (expected > 1) & (expected < 254)
    assert np.abs(found - expected)[inside].max() < 0.51
    assert inside.mean() > 0.3 and np.ptp(found) > 100


def test_a_picture_does_not_depend_on_how_many_there_are(run):
    program, state = run
    six = evaluation_of(program).sample(state.ema)[0]
    three = evaluation_of(changed(program, samples=3)).sample(state.ema)[0]
    np.testing.assert_array_equal(three, six[:3])


def test_guidance_is_that_of_the_evaluation(run):
    program, state = run
    plain = evaluation_of(program).sample(state.ema)[0]
    strong = evaluation_of(changed(program, guidance_scale=4.0))
    assert np.abs(strong.sample(state.ema)[0].astype(int) - plain).max() > 5


def test_the_sampler_of_training_with_its_noise(run):
    program, state = run
    found = evaluation_of(changed(program, solver="rollout")).sample(state.ema)[0]
    x, keys = noise_of(program, 4)
    cond = program.pipeline.encode(WORDS)
    network = jax.jit(program.objective.apply)
    policy = lambda z, t, c: network(state.ema, {}, z, t, c)  # noqa: E731
    for i, (t, s) in enumerate(program.kernel.levels):
        time = jnp.tile(jnp.asarray([t, s], jnp.float32), (4, 1))
        step, _ = transition(policy, program.kernel, x, time, cond, None)
        assert isinstance(step, Gaussian)
        shape = program.pipeline.latent_shape
        fresh = [jax.random.normal(jax.random.fold_in(k, i + 1), shape) for k in keys]
        x = step.mean + np.asarray(step.std)[:, None, None, None] * jnp.stack(fresh)
    expected = np.clip((np.asarray(x) + 1.0) * 127.5, 0, 255)
    assert np.abs(found[:4] - expected).max() < 0.51
    plain = evaluation_of(program).sample(state.ema)[0]
    assert np.abs(found.astype(int) - plain).max() > 20


def test_noise_of_evaluation_is_never_trained_on(run):
    program, _ = run
    _, keys = noise_of(program, 64)
    held = {bytes(np.asarray(jax.random.key_data(k))) for k in keys}
    for epoch in range(4):
        prompts = draw_prompts(program.prompts, 0, epoch, 2, 4)
        for chunk in draw_chunks(program, prompts, epoch, 0):
            used = np.asarray(jax.random.key_data(chunk.keys))
            assert not held & {bytes(row) for row in used}


# ---- held-out data loss


def test_data_loss_of_a_network_that_says_0():
    # Then the loss is mean (eps - x0)^2 = 1 + x0^2; record i is a page of i / 8.
    program = tiny_program({"evaluate.data_samples": 400}, flat_source())
    state = program.new_state()
    found = evaluation_of(program).data_loss(state.ema)
    levels = np.arange(4) / 8
    assert found == pytest.approx(1 + (levels**2).mean(), abs=0.01)


def test_data_loss_counts_no_padding(run, monkeypatch):
    program, state = run
    evaluation = evaluation_of(changed(program, data_samples=6))
    inner, chunks = evaluation._loss, []

    def noted(*arguments):
        chunks.append(np.asarray(inner(*arguments)))
        return chunks[-1]

    monkeypatch.setattr(evaluation, "_loss", noted)
    found = evaluation.data_loss(state.ema)
    each = np.concatenate(chunks)
    assert each.shape == (8,)  # two chunks of 4, the last two of them repeats
    assert found == pytest.approx(each[:6].mean(), rel=1e-6)
    assert abs(each.mean() - each[:6].mean()) > 1e-4


# ---- what a run is told


@pytest.fixture
def metrics(run, tmp_path):
    with Metrics(tmp_path, run[0].config.log) as writer:
        yield writer


def test_values_and_pictures(run, metrics, tmp_path):
    program, state = run
    program = changed(program, pictures=3)
    # The trained weights are never looked at, only their average.
    broken = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), state.params)
    evaluation = evaluation_of(program)
    values = evaluation.run(state._replace(params=broken), metrics, 7)
    assert set(values) == {
        "evaluation/compressibility/mean",
        "data/heldout_loss",
        "diversity/within_prompt",
        "diversity/across_prompts",
    }
    assert np.isfinite(list(values.values())).all()
    assert values == evaluation.run(state, metrics, 8)
    [picture, _] = sorted((tmp_path / "samples").iterdir())
    assert picture.name == "evaluation_000007.png"
    shown = evaluation.sample(state.ema)[0][:3]
    np.testing.assert_array_equal(
        np.asarray(Image.open(picture)), grid(shown, 3, 128 // 16, WORDS[:3])
    )


def test_diversity_is_that_of_pictures_the_judge_can_read(run, monkeypatch):
    monkeypatch.setattr(evaluate, "load_judge", load_judge)
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    found = evaluation_of(run[0]).judged(images)
    assert set(found) == {"evaluation/compressibility/mean"}
    config = run[0].config.copy_and_resolve_references()
    config.model.image_size = load_judge().size
    large = evaluation_of(run[0]._replace(config=config))
    values = large.judged(images.repeat(2, 1).repeat(2, 2))
    assert values["diversity/across_prompts"] > 0


def test_held_out_judges_have_a_name_of_their_own(run):
    program = run[0]
    config = program.config.copy_and_resolve_references()
    config.rewards.heldout = ("incompressibility",)
    found = evaluation_of(program._replace(config=config))
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    values = found.judged(images)
    assert values["heldout/incompressibility/mean"] == pytest.approx(
        -values["evaluation/compressibility/mean"]
    )
    assert values["heldout/incompressibility/mean"] > 0


def test_what_a_judge_can_not_score_is_left_out_where_masking_is_configured(run):
    config = run[0].config.copy_and_resolve_references()
    found = evaluation_of(run[0]._replace(config=config))

    def half(images, prompts):
        portions.append(len(prompts))
        scores = images[:, 0, 0, 0].astype(np.float32)
        return np.where(scores % 2, scores, np.nan).astype(np.float32)

    portions = []
    found.judges = {"compressibility": half}
    images = np.zeros((6, 16, 16, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(6)
    with pytest.raises(UserError, match="compressibility"):
        found.judged(images)
    config.rewards.on_failure = "mask"
    values = found.judged(images)
    assert values["evaluation/compressibility/mean"] == 3.0  # of 1, 3 and 5
    assert values["evaluation/compressibility/valid"] == 0.5
    # A judge's time limit is that of a portion of training's size.
    assert max(portions) == run[0].chunk == 4
    nothing = np.full(6, np.nan, np.float32)
    found.judges = {"compressibility": lambda images, prompts: nothing[: len(images)]}
    assert "evaluation/compressibility/mean" not in found.judged(images)


def test_a_judge_that_fails_takes_nothing_from_the_mean_of_another(run):
    config = run[0].config.copy_and_resolve_references()
    config.rewards.on_failure = "mask"
    found = evaluation_of(run[0]._replace(config=config))
    level = np.arange(6, dtype=np.uint8)

    def score(images, prompts):
        return images[:, 0, 0, 0].astype(np.float32)

    def down(images, prompts):
        raise OSError("no route to the server")

    found.judges = {"compressibility": score, "retrieval": down}
    values = found.judged(np.tile(level[:, None, None, None], (1, 16, 16, 3)))
    assert values["evaluation/compressibility/mean"] == 2.5
    assert values["heldout/retrieval/valid"] == 0.0
    judged = {"evaluation/compressibility/mean", "heldout/retrieval/valid"}
    assert judged == {n for n in values if "compress" in n or "retrieval" in n}


def test_without_data_or_pictures_nothing_is_said_of_them(metrics, tmp_path):
    program = tiny_program({"evaluate.pictures": 0, "evaluate.samples": 2})
    values = evaluation_of(program).run(program.new_state(), metrics, 0)
    assert "data/heldout_loss" not in values and values
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("edits", [{"sampler.steps": 3}, {"sampler.noise_level": 0.0}])
def test_without_a_policy_term_a_rollout_needs_no_noisy_steps(edits):
    plain = {"policy.weight": 0.0, "policy.train_steps": 3, "evaluate.pictures": 0}
    data = {"data_term.weight": 1.0, "evaluate.solver": "rollout"}
    program = tiny_program(plain | data | edits, flat_source())
    values, _ = evaluation_of(program).judge(program.new_state())
    assert np.isfinite(values["evaluation/compressibility/mean"])
