"""The cache of latents as it is written: equal to encoding, once, through any kill."""

import errno
import fcntl
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from drawn_pictures import write_drawing, write_folder
from fake_encoders import WEIGHTS, FakeImages, FakeTexts

from ddrl_jax.data.latent_writer import write_latents
from ddrl_jax.data.latents import latent_source
from ddrl_jax.data.picture_folder import read_folder
from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Cond

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = ("a cat", "a dog", "a cat", "a Käse", "a dog") * 2
IMAGE_BATCHES = 5  # ten records, four a shard, two a batch
STAGES = ("images:1", "images:4", "settle:4", "settle:5", "texts:2", "rename:1")
# Image batches that are left to encode when the killed writing is taken up again. The
# names are given to captions.json, the card of the table, and then its three shards.
LEFT = (5, 3, 3, 1, 0, 0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_folder(folder, CAPTIONS)
    return read_folder(str(folder), 16)


def write(folder, pictures, images=None, texts=None, **settings):
    images, texts = images or FakeImages(), texts or FakeTexts()
    settings = {"fingerprint": WEIGHTS, "batch": 2, "shard": 4} | settings
    return write_latents(folder, pictures, images, texts, **settings)


def direct(pictures):
    return FakeImages()(np.stack([pictures[i][0] for i in range(len(pictures))]))


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("batch,shard", [(2, 4), (3, 4), (16, 4), (10, 512)])
def test_the_cache_equals_encoding_to_the_bit(tmp_path, pictures, batch, shard):
    images = FakeImages()
    settings = {"batch": batch, "shard": shard, "dtype": "float32"}
    source = latent_source(write(tmp_path, pictures, images, **settings))
    mean, logvar = direct(pictures)
    found = source.fetch(np.arange(10, dtype=np.int32))
    np.testing.assert_array_equal(found["mean"], mean)
    np.testing.assert_array_equal(found["logvar"], logvar)
    assert source.captions == CAPTIONS and source.latent_shape == (2, 2, 4)
    assert set(images.batches) == {batch}, "an encoder sees one shape only"


def test_the_posterior_is_scaled(tmp_path, pictures):
    folder = write(tmp_path, pictures, scale=0.18215, dtype="float32")
    found = latent_source(folder).fetch(np.arange(10))
    mean, logvar = (a.astype(np.float64) for a in direct(pictures))
    np.testing.assert_allclose(found["mean"], 0.18215 * mean, rtol=1e-6, atol=1e-7)
    std = np.exp(0.5 * found["logvar"].astype(np.float64))
    np.testing.assert_allclose(std, 0.18215 * np.exp(0.5 * logvar), rtol=2e-6)


def test_float16_costs_half_a_unit_in_its_last_place(tmp_path, pictures):
    found = latent_source(write(tmp_path, pictures)).fetch(np.arange(10))
    for name, exact in zip(("mean", "logvar"), direct(pictures), strict=True):
        assert found[name].dtype == np.float32
        error = np.abs(found[name].astype(np.float64) - exact)
        # 11 bits of significand; 2^-25 is half of the smallest subnormal.
        assert (error <= 2.0**-11 * np.abs(exact) + 2.0**-25).all()
        assert error.max() > 0, "it was stored as float16"


def test_each_caption_is_encoded_once(tmp_path, pictures):
    texts = FakeTexts()
    source = latent_source(write(tmp_path, pictures, texts=texts))
    assert texts.batches == [("a cat", "a dog"), ("a Käse", "a Käse")]
    found, expected = source.encode(CAPTIONS[1:4]), FakeTexts()(CAPTIONS[1:4])
    np.testing.assert_array_equal(found.emb, expected.emb)
    np.testing.assert_array_equal(found.pooled, expected.pooled)


def test_token_ids_stay_integers_and_text_can_be_float16(tmp_path, pictures):
    ids = lambda captions: Cond(np.array([[len(c), 70_000] for c in captions]))  # noqa: E731
    found = latent_source(write(tmp_path / "ids", pictures, texts=ids)).encode(
        ["a Käse"]
    )
    assert found.emb.tolist() == [[6, 70_000]] and found.pooled is None
    half = latent_source(write(tmp_path / "half", pictures, text_dtype="float16"))
    exact = FakeTexts()(["a cat"]).emb
    error = np.abs(np.asarray(half.encode(["a cat"]).emb) - exact)
    assert 0 < error.max() <= 2.0**-11 * np.abs(exact).max()


def test_a_complete_cache_is_found_and_left_as_it_is(tmp_path, pictures):
    folder = write(tmp_path, pictures)
    before, images, texts = contents(folder), FakeImages(), FakeTexts()
    assert write(tmp_path, pictures, images, texts) == folder
    assert images.batches == [] and texts.batches == [] and contents(folder) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", folder.name]


def test_other_data_weights_or_settings_get_a_folder_of_their_own(tmp_path, pictures):
    first = write(tmp_path, pictures)
    before = contents(first)
    lanczos = read_folder(pictures.root, 16, resample="lanczos")
    larger = read_folder(pictures.root, 32)
    others = [
        write(tmp_path, pictures, fingerprint={**WEIGHTS, "vae": "finetuned"}),
        write(tmp_path, pictures, fingerprint={**WEIGHTS, "text": "other"}),
        write(tmp_path, pictures, dtype="float32"),
        write(tmp_path, pictures, scale=0.5),
        write(tmp_path, lanczos),
        write(tmp_path, larger, lambda x: FakeImages()(x[:, ::2, ::2])),
    ]
    assert len({first, *others}) == 7 and contents(first) == before


def test_a_folder_that_is_in_the_way_is_refused_and_kept(tmp_path, pictures):
    folder = write(tmp_path, pictures)
    text = (folder / "cache.json").read_text()
    (folder / "cache.json").write_text(text.replace("vae-hash", "another"))
    before = contents(folder)
    with pytest.raises(UserError, match="written with another vae"):
        write(tmp_path, pictures)
    assert contents(folder) == before
    (folder / "cache.json").unlink()
    with pytest.raises(UserError, match="damaged"):
        write(tmp_path, pictures)


@pytest.fixture(scope="module")
def killed(pictures, tmp_path_factory):
    """Folders of caches whose writing was killed, one a stage."""
    caches = tmp_path_factory.mktemp("killed")
    script = Path(__file__).with_name("killed_writer.py")
    command = [sys.executable, str(script), pictures.root, str(caches), *STAGES]
    path = os.pathsep.join([str(ROOT), str(script.parent)])
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert run.stdout.split("\n")[:-1] == [f"{s} 9" for s in STAGES], run.stderr
    return caches


@pytest.mark.parametrize("stage,left", list(zip(STAGES, LEFT, strict=True)))
def test_a_killed_writing_is_taken_up_and_ends_with_the_same_bits(
    killed, pictures, tmp_path, stage, left
):
    caches = killed / stage.replace(":", "-")
    assert not [p for p in caches.iterdir() if p.name.startswith("latents-")]
    partial = next(caches.glob(".latents-*.partial"))
    assert (partial / "cache.json").exists() == (stage == "rename:1")
    images = FakeImages()
    folder = write(caches, pictures, images)
    assert len(images.batches) == left
    assert contents(folder) == contents(write(tmp_path, pictures))
    assert sorted(p.name for p in caches.iterdir()) == [".lock", folder.name]


def test_an_encoder_that_fails_costs_only_its_shard(tmp_path, pictures):
    class Failing(FakeImages):
        def __call__(self, images):
            if len(self.batches) == 3:
                raise RuntimeError("out of memory")
            return super().__call__(images)

    with pytest.raises(RuntimeError, match="out of memory"):
        write(tmp_path, pictures, Failing())
    images = FakeImages()
    folder = write(tmp_path, pictures, images)
    assert len(images.batches) == 3
    mean = latent_source(folder).fetch(np.arange(10))["mean"]
    np.testing.assert_array_equal(mean, direct(pictures)[0].astype(np.float16))


def test_a_partial_writing_of_another_plan_starts_again(tmp_path, pictures):
    def fail(captions):
        raise RuntimeError("after all the pictures")

    with pytest.raises(RuntimeError, match="after all the pictures"):
        write(tmp_path, pictures, texts=fail)
    images = FakeImages()
    folder = write(tmp_path, pictures, images, shard=3)
    assert len(images.batches) == 7  # of 3 + 3 + 3 + 1 records, two a batch
    assert len(list(folder.glob("latents-*.array_record"))) == 4
    assert len(latent_source(folder).captions) == 10


@pytest.mark.parametrize("gain,dtype", [(np.nan, "float32"), (1e5, "float16")])
def test_latents_that_are_not_finite_are_refused_by_name(
    tmp_path, pictures, gain, dtype
):
    with pytest.raises(UserError, match=f"of 4 records is not finite in {dtype}") as e:
        write(tmp_path, pictures, FakeImages(gain), dtype=dtype)
    assert "000.png" in str(e.value.got) and "cache_dtype" in e.value.way_out


def test_a_text_the_encoder_refuses_is_an_error_and_so_are_its_nans(tmp_path, pictures):
    def refuse(captions):
        raise ValueError(f"no token for {captions[0]!r}")

    with pytest.raises(UserError, match="no token for 'a cat'"):
        write(tmp_path, pictures, texts=refuse)
    with pytest.raises(UserError, match="text encoder says of 3 records is not finite"):
        write(tmp_path, pictures, texts=lambda c: Cond(np.full((len(c), 2), np.inf)))


def test_bad_pictures_are_refused_before_anything_is_encoded(tmp_path):
    root, images = tmp_path / "set", FakeImages()
    write_folder(root, CAPTIONS)
    (root / "003.png").write_bytes((root / "003.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"003\.png"):
        write(tmp_path / "cache", read_folder(str(root), 16), images)
    assert images.batches == []


def test_skipped_pictures_are_not_in_the_cache_but_counted_there(tmp_path, capsys):
    root = tmp_path / "set"
    write_folder(root, CAPTIONS)
    (root / "003.png").write_bytes((root / "003.png").read_bytes()[:60])
    write_drawing(root / "bare.png", 1)
    lenient = read_folder(str(root), 16, on_bad="skip")
    folder = write(tmp_path / "cache", lenient)
    source = latent_source(folder)
    assert source.captions == CAPTIONS[:3] + CAPTIONS[4:]
    assert source.skipped == {
        "pictures without a caption": 1,
        "pictures that can not be decoded": 1,
    }
    capsys.readouterr()
    assert write(tmp_path / "cache", lenient) == folder
    assert "1 pictures that can not be decoded" in capsys.readouterr().err


def test_a_cache_without_the_bad_ones_does_not_hide_them_from_a_strict_run(tmp_path):
    root = tmp_path / "set"
    write_folder(root, CAPTIONS)
    (root / "003.png").write_bytes((root / "003.png").read_bytes()[:60])
    write(tmp_path / "cache", read_folder(str(root), 16, on_bad="skip"))
    with pytest.raises(UserError, match=r"003\.png"):
        write(tmp_path / "cache", read_folder(str(root), 16))


def test_a_full_disk_is_an_error_and_the_next_start_ends_it(tmp_path, pictures):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(UserError, match="can not be written") as e:
            write(tmp_path, pictures)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(e.value.got)
    assert len(latent_source(write(tmp_path, pictures)).captions) == 10


def test_a_place_that_is_no_folder_is_an_error(tmp_path, pictures):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.cache"):
        write(tmp_path / "file", pictures)


@pytest.mark.parametrize("key", ["dtype", "text_dtype"])
def test_an_unknown_number_format_names_its_key(tmp_path, pictures, key):
    with pytest.raises(UserError, match=f"data.cache_{key}"):
        write(tmp_path, pictures, **{key: "bfloat16"})


def test_a_second_writer_waits_for_the_first(tmp_path, pictures, capsys):
    images = FakeImages()
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second = threading.Thread(target=write, args=(tmp_path, pictures, images))
        second.start()
        told, until = "", time.monotonic() + 20
        while "waiting for another run" not in told and time.monotonic() < until:
            told += capsys.readouterr().err
            time.sleep(0.02)
        assert "waiting for another run" in told and images.batches == []
    second.join(20)
    assert len(images.batches) == IMAGE_BATCHES


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(number, tmp_path, pictures, monkeypatch):
    """Also where it tells only whom it lets wait."""
    answers = [OSError(number, os.strerror(number))]

    def none(*_):
        raise answers[-1] if len(answers) == 1 else answers.pop()

    monkeypatch.setattr(fcntl, "flock", none)
    for first in ([], [BlockingIOError(errno.EAGAIN, "taken")]):
        answers += first
        with pytest.raises(UserError, match="can be locked") as error:
            write(tmp_path, pictures)
        assert os.strerror(number) in error.value.got
        assert "--config.data.cache" in error.value.way_out
