"""TFDS data sets as captioned pictures: by folder, by name, and what is refused."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from drawn_pictures import drawing, encoded

from ddrl_jax.data.picture_tfds import check_tfds, read_tfds
from ddrl_jax.data.samples import write_samples
from ddrl_jax.errors import UserError

CAPTIONS = ("a cat", "a Käse", "a  dog\n", "a cat", "", "x")
IMAGES = np.stack([drawing(i) for i in range(6)])  # 24 x 16


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    write_samples(folder / "pets" / "1.0.0", iter([(IMAGES, CAPTIONS)]))
    return folder


@pytest.fixture(scope="module")
def pets(data_dir):
    return str(data_dir / "pets" / "1.0.0")


class Nested(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Features as other people's sets have them: nested, many texts, labels."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        f = tfds.features
        caption = f.Sequence({"text": f.Text(), "id": f.Scalar(np.int64)})
        features = f.FeaturesDict(
            {
                "photo": {"pixels": f.Image(shape=(None, None, 3)), "id": f.Text()},
                "captions": caption,
                "texts": f.Sequence(f.Text()),
                "label": f.ClassLabel(names=["cat", "dog"]),
                "depth": f.Image(shape=(None, None, 1), dtype=np.uint16),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self, features=features, disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples()}

    def _generate_examples(self):
        depth = encoded(np.full((4, 4), 9 * 257, np.uint16))
        texts = [["", "a red cat"], [], ["", " "]]
        for i, found in enumerate(texts):
            # The middle one has bytes of no picture.
            pixels = b"no picture" if i == 1 else encoded(IMAGES[i])
            yield (
                i,
                {
                    "photo": {"pixels": io.BytesIO(pixels), "id": str(i)},
                    "captions": [{"text": t, "id": 0} for t in found],
                    "texts": found,
                    "label": i % 2,
                    "depth": io.BytesIO(depth),
                },
            )


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    builder = Nested(
        data_dir=str(tmp_path_factory.mktemp("nested")), file_format="array_record"
    )
    builder.download_and_prepare()
    return str(builder.data_dir)


def test_a_set_of_samples_is_read_by_folder(pets):
    pictures = read_tfds(pets, 16, split="train[:4]").checked()
    assert pictures.captions == ("a cat", "a Käse", "a dog", "a cat")
    for i in range(4):
        np.testing.assert_array_equal(pictures[i][0], IMAGES[i][:, 4:20])


def test_and_by_name(data_dir, pets):
    named = read_tfds("pets", 16, split="train[1:3]", data_dir=str(data_dir))
    assert named.captions == ("a Käse", "a dog")
    assert named.rows[0].digest == read_tfds(pets, 16, on_bad="skip").rows[1].digest


def test_empty_captions_are_reported_or_left_out(pets):
    with pytest.raises(UserError, match=r"1 empty captions: train\[4\]"):
        read_tfds(pets, 16)
    pictures = read_tfds(pets, 16, on_bad="skip").checked()
    assert [row.name for row in pictures.rows][-2:] == ["train[3]", "train[5]"]
    assert pictures.skipped == {"empty captions": 1}


@pytest.mark.parametrize("caption", ["texts", "captions/text"])
def test_of_several_texts_the_first_that_is_not_empty_counts(nested, caption):
    pictures = read_tfds(
        nested, 16, "validation", "photo/pixels", caption, on_bad="skip"
    ).checked()
    assert pictures.captions == ("a red cat",)
    np.testing.assert_array_equal(pictures[0][0], IMAGES[0][:, 4:20])
    assert pictures.skipped == {
        "pictures without a caption": 1,
        "empty captions": 1,
    }


def test_a_label_stands_for_its_name_and_corrupt_pictures_are_told(nested):
    where = (nested, 16, "validation", "photo/pixels", "label")
    assert read_tfds(*where).captions == ("cat", "dog", "cat")
    with pytest.raises(UserError, match=r"decoded: validation\[1\] \(not a PNG"):
        read_tfds(*where).checked()
    pictures = read_tfds(*where, on_bad="skip").checked()
    assert pictures.captions == ("cat", "cat")
    np.testing.assert_array_equal(pictures[1][0], IMAGES[2][:, 4:20])


def test_sixteen_bit_images_are_pictures_too(nested):
    pictures = read_tfds(nested, 4, "validation", "depth", "label").checked()
    assert (pictures[0][0] == 9).all()


@pytest.mark.parametrize("settings,word", [
    ({"split": "test"}, "data.split"),
    ({"split": "train["}, "data.split"),
    ({"image": "picture"}, "data.image_feature"),
    ({"image": "caption"}, "data.image_feature"),
    ({"caption": "text"}, "data.caption_feature"),
    ({"caption": "image"}, "data.caption_feature"),
])  # fmt: skip
def test_a_wrong_split_or_feature_names_its_key_and_what_there_is(pets, settings, word):
    with pytest.raises(UserError) as e:
        read_tfds(pets, 16, **settings)
    with pytest.raises(UserError) as early:  # before a model is loaded
        check_tfds(pets, **settings)
    assert str(early.value) == str(e.value)
    assert word in e.value.way_out
    assert ("train" if "split" in settings else "caption (Text)") in str(e.value.got)


def test_a_missing_set_tells_how_to_prepare_one(tmp_path):
    for data in (str(tmp_path), str(tmp_path / "no"), "no_such_set", ""):
        with pytest.raises(UserError, match="tfds build") as e:
            check_tfds(data, data_dir=str(tmp_path))
        assert "\n" not in e.value.what
    assert "data.path is empty" in e.value.what


def test_a_damaged_set_is_an_error(data_dir, tmp_path):
    write_samples(tmp_path / "set", iter([(IMAGES, CAPTIONS)]))
    file = next((tmp_path / "set").glob("*array_record*"))
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 9] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="undamaged array_record"):
        read_tfds(str(tmp_path / "set"), 16)


def test_the_fingerprint_is_of_the_records(pets, tmp_path):
    found = read_tfds(pets, 16, split="train[:4]").fingerprint
    assert read_tfds(pets, 8, split="train[:4]").fingerprint == found
    assert read_tfds(pets, 16, split="train[:3]").fingerprint != found
