"""Reading and writing model folders; everything that can be wrong has one message."""

import json
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ddrl_jax.errors import UserError
from ddrl_jax.models import folder
from ddrl_jax.models.folder import (
    fingerprint,
    read_json,
    read_tensors,
    weight_files,
    write_tensors,
)

PLAIN = "diffusion_pytorch_model.safetensors"
A, B = np.arange(6.0, dtype=np.float32).reshape(2, 3), np.ones(2, np.float32)


@pytest.fixture
def unet(tmp_path):
    home = tmp_path / "unet"
    home.mkdir()
    return home


def shard(unet, variant=""):
    """Two shards with an index, named as save_pretrained names them."""
    end = f".{variant}" if variant else ""
    stem = "diffusion_pytorch_model"
    files = [f"{stem}{end}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({"a": A}, unet / files[0])
    save_file({"b": B}, unet / files[1])
    index = {"metadata": {}, "weight_map": dict(zip("ab", files, strict=True))}
    path = unet / f"{stem}.safetensors.index{end}.json"
    path.write_text(json.dumps(index))
    return [unet / name for name in files], path


def refusal(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


@pytest.mark.parametrize("name", [PLAIN, "model.safetensors"])
def test_one_file_is_read_as_it_is(unet, name):
    save_file({"a": A, "ids": np.arange(3)}, unet / name)
    tensors = read_tensors(unet)
    np.testing.assert_array_equal(tensors["a"], A)
    assert tensors["ids"].dtype == np.int64


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named(unet, dtype, value):
    broken = np.where(A == 4.0, value, A).astype(dtype)
    save_file({"a": A, "conv_in.weight": broken}, unet / PLAIN)
    assert "1 tensors not finite: conv_in.weight" in refusal(read_tensors, unet)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_become_float32(unet, dtype):
    save_file({"a": A.astype(dtype)}, unet / PLAIN)
    a = read_tensors(unet)["a"]
    assert a.dtype == np.float32
    np.testing.assert_array_equal(a, A)  # small whole numbers are exact in all


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards_are_put_together(unet, variant):
    shard(unet, variant)
    assert read_tensors(unet, variant).keys() == {"a", "b"}


def test_variants_lie_beside_each_other(unet):
    save_file({"a": A}, unet / PLAIN)
    save_file({"a": 2 * A}, unet / "diffusion_pytorch_model.fp16.safetensors")
    np.testing.assert_array_equal(read_tensors(unet, "fp16")["a"], 2 * A)
    np.testing.assert_array_equal(read_tensors(unet)["a"], A)
    message = refusal(read_tensors, unet, "non_ema")
    assert "'non_ema'" in message and "fp16.safetensors" in message


def test_a_judge_has_no_key_for_a_variant(unet):
    save_file({"a": A}, unet / "model.fp16.safetensors")
    assert "config.model.variant" in refusal(read_tensors, unet)
    message = refusal(partial(read_tensors, judge=True), unet)
    assert "got:     model.fp16.safetensors\n  wanted:  model.safetensors\n" in message
    assert "variant" not in message and "put model.safetensors" in message


def test_a_missing_shard_is_named(unet):
    files, _ = shard(unet)
    files[1].unlink()
    message = refusal(read_tensors, unet)
    assert files[1].name in message and "1 of 2 shards" in message


def test_a_tensor_that_no_shard_holds_is_named(unet):
    files, _ = shard(unet)
    save_file({"other": B}, files[1])
    assert "no shard holds b" in refusal(read_tensors, unet)


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", '{"weight_map": 3}', "{}", '{"weight_map": {"a": ["a.safetensors"]}}']
    + [pytest.param('{"a": ' * 100_000, id="nested")],
)
def test_a_damaged_index_is_refused(unet, content):
    _, index = shard(unet)
    index.write_text(content)
    assert index.name in refusal(read_tensors, unet)


def test_an_index_can_not_point_outside_its_folder(unet, tmp_path):
    save_file({"a": A}, tmp_path / "secret.safetensors")
    _, index = shard(unet)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "no secret.safetensors" in refusal(read_tensors, unet)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_torn_file_is_named(unet, keep):
    save_file({"a": A}, unet / PLAIN)
    whole = (unet / PLAIN).read_bytes()
    (unet / PLAIN).write_bytes(whole[:keep])
    message = refusal(read_tensors, unet)
    assert PLAIN in message and "damaged" in message


def test_a_file_with_a_lying_header_is_refused(unet):
    (unet / PLAIN).write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    assert "damaged" in refusal(read_tensors, unet)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt"])
def test_other_formats_are_never_opened(unet, name):
    (unet / name).write_bytes(b"anything")
    message = refusal(read_tensors, unet)
    assert name in message and "safe_serialization=True" in message


def test_an_empty_or_absent_component_is_named(unet, tmp_path):
    message = refusal(read_tensors, unet)  # as after a download of safetensors only
    assert "no weights at all" in message and "safe_serialization=True" in message
    assert "no folder vae" in refusal(read_tensors, tmp_path / "vae")


@pytest.mark.parametrize(
    "content",
    [None, "", "{", "[]", b"\xff\xfe", pytest.param("[" * 10**5, id="nested")],
)
def test_json_that_is_no_object_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "config.json" in refusal(read_json, path)


def test_files_are_written_whole_and_never_over_others(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    write_tensors(path, {"a": A.T}, {"note": "hello"})
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "note": "hello"}
        np.testing.assert_array_equal(file.get_tensor("a"), A.T)
    assert "already there" in refusal(write_tensors, path, {"a": A})
    assert [f.name for f in path.parent.iterdir()] == ["x.safetensors"]


def test_a_folder_that_can_not_be_made_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "x.safetensors"
    assert "can not be written" in refusal(write_tensors, target, {"a": A})


@pytest.mark.parametrize("whole", [10**9, 0])
def test_the_fingerprint_changes_with_the_weights(unet, monkeypatch, whole):
    """Also where only samples of the file are read."""
    monkeypatch.setattr(folder, "WHOLE_BYTES", whole)
    monkeypatch.setattr(folder, "SAMPLE_BYTES", 64)
    save_file({"a": A}, unet / PLAIN)
    before = fingerprint([unet])
    assert before == fingerprint([unet])
    save_file({"a": A + 1}, unet / PLAIN)
    assert before != fingerprint([unet])
    assert weight_files(unet) == [unet / PLAIN]
