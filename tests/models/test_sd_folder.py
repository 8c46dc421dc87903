"""What the JSON of a Stable Diffusion folder says of its networks, as one name."""

import json
import shutil

import pytest

from ddrl_jax.models.sd_folder import read_source
from ddrl_jax.models.stable_diffusion import TINY

PATHS = [f"{part}/config.json" for part in ("unet", "vae", "text_encoder")]
PATHS += ["scheduler/scheduler_config.json", "model_index.json"]


def edited(folder, path, changes):
    shutil.copytree(TINY, folder)
    content = json.loads((folder / path).read_text())
    assert content | changes != content
    (folder / path).write_text(json.dumps(content | changes))
    return read_source(folder)


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("vae/config.json", {"scaling_factor": 0.13025}),
        ("text_encoder/config.json", {"hidden_act": "gelu"}),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
        ("unet/config.json", {"flip_sin_to_cos": False}),
    ],
)
def test_what_changes_a_network_changes_its_name(tmp_path, path, changes):
    found = edited(tmp_path / "model", path, changes).described
    assert len(found) == 16 and found != read_source(TINY).described


@pytest.mark.parametrize("path", PATHS)
def test_notes_of_the_writer_change_no_name(tmp_path, path):
    notes = {"_diffusers_version": "0.6.0", "_name_or_path": "elsewhere"}
    source = edited(tmp_path / "model", path, notes)
    assert source.described == read_source(TINY).described
