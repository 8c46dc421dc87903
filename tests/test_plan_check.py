"""The small runs whose plan is checked against measurement are as they are called."""

from benchmarks.plan_check import ONE, unet
from ddrl_jax.plan.lowered import describe


def test_the_narrow_unet_has_latents_of_16_x_16(tmp_path):
    config = unet(tmp_path)
    config.mesh.update(ONE)
    assert describe(config).weights.pipeline.latent_shape == (16, 16, 4)
