"""Folders of every make as the source of an export: links, odd indices, gaps."""

import json
import shutil

import jax
import pytest

from ddrl_jax.errors import UserError
from ddrl_jax.models.export_diffusers import write_pipeline
from ddrl_jax.models.folder import tensor_shapes
from ddrl_jax.models.load import load_pipeline
from ddrl_jax.models.stable_diffusion import TINY

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def trained():
    return jax.tree.map(lambda a: a + 1, load_pipeline(str(TINY)).load())


@pytest.fixture
def source(tmp_path):
    return shutil.copytree(TINY, tmp_path / "in")


def contents(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_folders_behind_links_are_exported_whole(source, trained, tmp_path):
    plain = write_pipeline(source, tmp_path / "plain", trained)
    for part in ("unet", "vae", "text_encoder"):
        (source / part).rename(tmp_path / f"{part}-elsewhere")
        (source / part).symlink_to(tmp_path / f"{part}-elsewhere")
    (source / "vae" / "round").symlink_to(source)  # and back: no end without a rule
    target = write_pipeline(source, tmp_path / "out", trained)
    assert contents(target) == contents(plain)
    assert len(contents(target)) == len(contents(TINY)) == 10
    assert not any(path.is_symlink() for path in target.rglob("*"))


@pytest.mark.parametrize("above", ["../..", "{}"])  # "{}": the same place from the root
def test_an_index_that_names_places_is_kept_to_the_target(
    source, trained, tmp_path, above
):
    """The shard is read from beside its index, and is written there."""
    unet = source / "unet"
    name = f"{above.format(tmp_path)}/elsewhere/one.safetensors"
    names = dict.fromkeys(tensor_shapes(unet), name)
    (unet / f"{WEIGHTS}.safetensors").rename(unet / "one.safetensors")
    index = unet / f"{WEIGHTS}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    target = write_pipeline(source, tmp_path / "out", trained)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    assert contents(target).keys() == contents(source).keys()
    written = json.loads((target / "unet" / index.name).read_text())
    assert set(written["weight_map"].values()) == {"one.safetensors"}
    again = load_pipeline(str(target)).load()
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), again, trained))


@pytest.mark.parametrize(
    ("part", "file"), [("vae", f"{WEIGHTS}.bin"), ("text_encoder", "pytorch_model.bin")]
)
def test_a_component_that_can_not_be_copied_is_named(
    source, trained, tmp_path, part, file
):
    [weights] = (source / part).glob("*.safetensors")
    weights.rename(source / part / file)
    with pytest.raises(UserError, match="would lack") as error:
        write_pipeline(source, tmp_path / "out", trained)
    assert f"files of {part} that" in error.value.got
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("part", ["scheduler", "tokenizer"])
def test_a_component_that_is_gone_is_named(source, trained, tmp_path, part):
    shutil.rmtree(source / part)
    with pytest.raises(UserError, match=part):
        write_pipeline(source, tmp_path / "out", trained)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
