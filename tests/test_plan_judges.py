"""What judges and text encoder keep on a device: planned by shapes against arrays."""

import gc

import jax
import pytest

from configs import aesthetic, base
from ddrl_jax.errors import UserError
from ddrl_jax.plan.judges import judge_bytes
from ddrl_jax.plan.lowered import describe
from ddrl_jax.plan.memory import resident, uncounted
from ddrl_jax.program import build
from ddrl_jax.rewards.registry import TINY, make_rewards

# Parameters of the published networks, by hand from the whole ViT-L/14: without its
# temperature, the text tower and the two projections.
WHOLE_L, TEXT_L, WHOLE_H = 427_616_513, 123_060_480, 986_109_441
PICTURES_L = WHOLE_L - 1 - TEXT_L - 768 * 768


def rewards(*names, heldout=(), **places):
    c = base.get_config().rewards
    c.weights = dict.fromkeys(names, 1.0)
    c.heldout = heldout
    c.update(places)
    return c


def test_the_published_judges_have_known_sizes():
    one = judge_bytes(rewards("aesthetic"))
    assert list(one.values()) == [4 * PICTURES_L + 4, 4 * 927_969]
    [both] = judge_bytes(rewards("clip_score")).values()
    assert both == 4 * (WHOLE_L - 1) + 8
    preferences = judge_bytes(rewards("pickscore", heldout=("hpsv2",)))
    assert list(preferences.values()) == [4 * (WHOLE_H - 1) + 8] * 2
    assert judge_bytes(rewards("compressibility", "vlm_alignment")) == {}


def test_judges_of_one_folder_share_its_towers():
    found = judge_bytes(rewards("aesthetic", heldout=("clip_score",)))
    assert sum(found.values()) == 4 * (WHOLE_L - 1) + 8 + 4 * 927_969


@pytest.mark.parametrize("place", ["assets", str(TINY)])
def test_planned_judges_are_the_arrays_of_loaded_ones(place):
    head = "assets" if place == "assets" else str(TINY / "head.safetensors")
    section = rewards(
        "aesthetic", heldout=("clip_score",), clip=place, aesthetic_head=head
    )
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    judges = make_rewards(section)
    made = [array for array in jax.live_arrays() if id(array) not in before]
    assert len(judges) == 2
    assert sum(judge_bytes(section).values()) == sum(array.nbytes for array in made)


def test_text_encoder_and_autoencoder_of_a_run():
    config = aesthetic.get_config("smoke")
    config.mesh.data = 1
    pipeline = build(config).pipeline
    plan = describe(config)
    rows = resident(plan)
    for name, parts in {
        "text encoder": pipeline.encode,
        "autoencoder": (pipeline.decode, pipeline.encode_images),
    }.items():
        assert rows[name] == sum(leaf.nbytes for leaf in jax.tree.leaves(parts)) > 0
    assert rows["judges"] == sum(judge_bytes(config.rewards).values()) > 0
    # A repository that nobody knows is told, and adds nothing.
    assert uncounted(plan) == []
    plan.config.rewards.clip = "someone/a-clip-of-their-own"
    (told,) = uncounted(plan)
    assert told.endswith("is here: CLIP of someone/a-clip-of-their-own")
    assert resident(plan)["judges"] < rows["judges"]


def test_the_published_task_is_planned_without_a_hub():
    """Stable Diffusion 1.5 with the aesthetic judge; parameters as published."""
    config = aesthetic.get_config()
    config.mesh.data = 1
    plan = describe(config)
    network = sum(leaf.size for leaf in jax.tree.leaves(plan.weights.shapes["params"]))
    trained = sum(leaf.size for leaf in jax.tree.leaves(plan.weights.abstract.params))
    assert (network, trained) == (859_520_964, 797_184)
    assert plan.weights.pipeline.latent_shape == (64, 64, 4)
    rows = resident(plan)
    assert rows["text encoder"] == 4 * TEXT_L
    assert rows["autoencoder"] == 4 * 83_653_863
    assert rows["judges"] == 4 * (PICTURES_L + 1 + 927_969)
    assert rows["prompt embeddings"] == 45 * 77 * 768 * 4
    config.model.init = "someone/a-model-of-their-own"
    with pytest.raises(UserError, match="someone/a-model-of-their-own"):
        describe(config)
