"""Model FLOPs of a run against counts by hand, and what is made of them."""

import json

import jax
import jax.numpy as jnp
import pytest
from edited_config import refused
from tiny_runs import flat_source, tiny_program

import ddrl_jax.mfu as mfu
from configs import quickstart
from ddrl_jax.chips import CHIPS
from ddrl_jax.data.prompts import draw_prompts
from ddrl_jax.draws import draw_chunks, draw_trained_steps, prompts_of
from ddrl_jax.flops import Count
from ddrl_jax.learner import Minibatch
from ddrl_jax.mfu import Utilization, Work, epoch_work, rates
from ddrl_jax.program import Program
from ddrl_jax.train import train

D, BATCH, CHUNKS = 16, 4, 2  # of TINY: width, microbatch, chunks an epoch
STEPS, NOISY = 4, 3  # of its sampler: the last step adds no noise and is not trained
STAGES = ("rollout", "update")
CELLS, WINDOW = 16, 2 * 4 * 2 * 4 * 3  # patches of 16 px, values of a window of two


def _forward(words: int) -> tuple[int, int]:
    """Multiply-adds of DiT for one sample, times 2; and its first product alone."""
    length = CELLS + words
    embed = CELLS * WINDOW * D
    condition = 2 * D * D + D * D
    block = D * 6 * D + length * (3 + 1 + 4 + 4) * D * D + 2 * length * length * D
    head = D * 2 * D + CELLS * D * WINDOW
    return 2 * (embed + condition + block + head), 2 * embed


def _work(edits: dict | None = None, source=None) -> tuple[Work, int, int]:
    """The counted work of an epoch, and FLOPs of `_forward`."""
    program = tiny_program(edits, source)
    config = program.config
    prompts = draw_prompts(
        program.prompts,
        config.seed,
        0,
        config.prompts.per_epoch,
        config.prompts.group_size,
    )
    chunks = [_rolled_out(program, c) for c in draw_chunks(program, prompts, 0, 0)]
    return epoch_work(program, chunks), *_forward(chunks[0].cond[0].shape[1])


def _rolled_out(program: Program, chunk: Minibatch) -> Minibatch:
    """With the shapes of a trajectory of all noisy steps; nothing is computed."""
    steps = draw_trained_steps(program.config, program.kernel, 0, BATCH)
    params = program.abstract_state().params
    _, kept, _ = jax.eval_shape(
        program.rollout, params, program.frozen, chunk.keys, chunk.cond, steps
    )
    flat = jnp.zeros(BATCH)
    return chunk._replace(trajectory=kept, old_log_prob=kept.log_prob, advantages=flat)


def test_the_work_of_an_epoch_is_what_the_hand_counts():
    """A sampler step is a forward; a trained one is three, less the gradient with
    respect to the pixels, which nobody wants; what the checkpoint recomputes is not
    model FLOPs. Two updates an epoch share its chunks."""
    work, forward, embed = _work()
    samples = BATCH * CHUNKS
    assert work.rollout.flops == samples * STEPS * forward
    assert (work.rollout.recomputed, work.rollout.loops) == (0, 0)
    model = work.update.flops - work.update.recomputed
    assert model == samples * NOISY * (3 * forward - embed)
    assert 0 < work.update.recomputed <= samples * NOISY * forward


def test_remat_adds_work_but_no_model_work():
    work, remat = _work()[0].update, _work({"model.remat": "full"})[0].update
    assert remat.flops > work.flops
    assert remat.flops - remat.recomputed == work.flops - work.recomputed


def test_inner_epochs_guidance_and_recomputed_log_probs_add_up():
    work, forward, embed = _work(
        {
            "train.inner_epochs": 3,
            "sampler.guidance_scale": 2.0,
            "policy.old_log_prob": "recompute",
        }
    )
    samples = BATCH * CHUNKS
    assert work.rollout.flops == samples * (STEPS + NOISY) * 2 * forward
    model = work.update.flops - work.update.recomputed
    assert model == 3 * samples * NOISY * 2 * (3 * forward - embed)


def test_without_a_policy_term_there_is_no_rollout():
    """A data loss is one trained step: of each sample one."""
    edits = {"policy.weight": 0.0, "data_term.weight": 1.0, "data.source": "emoji"}
    work, forward, embed = _work(edits, flat_source())
    assert work.rollout == Count()
    model = work.update.flops - work.update.recomputed
    assert model == BATCH * CHUNKS * (3 * forward - embed)


def test_sparse_rwr_rolls_out_all_samples_and_fits_the_kept_ones():
    edits = {
        "policy.term": "sparse_rwr",
        "advantages.kind": "batch",
        "prompts.per_epoch": 4,  # 16 samples, of which one chunk is kept
        "train.minibatches": 1,
        "train.inner_epochs": 3,
    }
    program = tiny_program(edits)
    chunk = draw_chunks(program, prompts_of(program, 0), 0, 0)[0]
    latents = jnp.zeros((BATCH, *program.pipeline.latent_shape))
    kept = chunk._replace(x0=latents, advantages=jnp.zeros(BATCH))
    forward, embed = _forward(chunk.cond[0].shape[1])
    work = epoch_work(program, [kept])
    assert work.rollout.flops == 16 * STEPS * forward
    model = work.update.flops - work.update.recomputed
    assert model == 3 * BATCH * (3 * forward - embed)


def test_rates_are_of_one_device():
    work = Work(Count(6_000), Count(45_000, recomputed=10_000, repeated=5_000))
    times = {"time/rollout": 2.0, "time/update": 3.0}
    found = rates(work, times, devices=4, peak=1e4)
    assert found == {
        "mfu": pytest.approx(36_000 / 4 / 5.0 / 1e4),
        "perf/mfu_rollout": pytest.approx(6_000 / 4 / 2.0 / 1e4),
        "perf/mfu_update": pytest.approx(30_000 / 4 / 3.0 / 1e4),
        "perf/tflops": pytest.approx(36_000 / 4 / 5.0 / 1e12),
    }
    assert set(rates(work, times, 4, 0.0)) == {"perf/tflops"}


def test_a_stage_that_did_not_run_has_no_rate():
    times = {"time/rollout": 0.0, "time/update": 3.0}
    found = rates(Work(Count(), Count(3_000)), times, 1, 1e3)
    assert found.pop("mfu") == found.pop("perf/mfu_update") == 1.0
    assert found == {"perf/tflops": pytest.approx(1e-9)}


def test_what_can_not_be_counted_is_not_written():
    times = {"time/rollout": 1.0, "time/update": 1.0}
    assert rates(Work(Count(1), Count(1, loops=1)), times, 1, 1e3) == {}


@pytest.mark.parametrize(
    "chip, key, peak",
    [(None, 0.0, 0.0), ("H100", 0.0, 989.4e12), ("H100", 1e12, 1e12), (None, 5e9, 5e9)],
)
def test_the_peak_is_the_configs_or_the_chips_or_none(monkeypatch, chip, key, peak):
    monkeypatch.setattr(mfu, "detect", lambda: CHIPS.get(chip))
    use = Utilization(tiny_program({"log.peak_flops": key}))
    use._work = Work(Count(), Count(1_000))
    found = use([], {"time/rollout": 0.0, "time/update": 1.0})
    assert found.get("perf/mfu_update", 0) == (1_000 / peak if peak else 0)


def test_a_peak_is_no_negative_number():
    assert refused({"log.peak_flops": -1.0}).what.startswith("log.peak_flops")


@pytest.mark.slow
def test_a_run_writes_its_trace_and_its_use_of_the_peak(tmp_path):
    """Seconds and rate of an epoch multiply to the same work in each."""
    config = quickstart.get_config("smoke")
    config.mesh.data = 1  # of the eight of the tests
    config.log.update(peak_flops=1e12, tensorboard=False, progress=False)
    train(config.lock(), str(tmp_path), (2, 2))
    text = (tmp_path / "metrics.jsonl").read_text()
    first, *epochs = map(json.loads, text.splitlines())
    assert [key for key in first if key.startswith("perf/")] == []
    work = []
    for line in epochs:
        stages = {s: line[f"perf/mfu_{s}"] * line[f"time/{s}"] for s in STAGES}
        seconds = sum(line[f"time/{s}"] for s in STAGES)
        assert line["perf/tflops"] * seconds == pytest.approx(sum(stages.values()))
        assert line["mfu"] == pytest.approx(line["perf/tflops"])  # of a peak of 1e12
        work.append(sum(stages.values()) * 1e12)
    assert work[0] == pytest.approx(work[1])
    assert work[0] > 1e6
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
