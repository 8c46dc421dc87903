"""A prepared TFDS data set as other people write them, for tests of whole runs."""

import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def write_set(data_dir: Path, captions: tuple[str, ...]) -> str:
    """Writes noise of uneven sizes under these captions; returns the set's name.

    The features are `photo` and `texts` (several a picture: an empty one, then the
    caption), stored as array_record with the one split "validation".
    """

    class Captioned(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # no script beside which TFDS looks for checksums

        def _info(self):
            f = tfds.features
            photo = f.Image(shape=(None, None, 3), encoding_format="png")
            features = f.FeaturesDict({"photo": photo, "texts": f.Sequence(f.Text())})
            return tfds.core.DatasetInfo(
                builder=self, features=features, disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"validation": self._generate_examples()}

        def _generate_examples(self):
            random = np.random.default_rng(0)
            for i, text in enumerate(captions):
                file, shape = io.BytesIO(), (40 + i, 52 - i, 3)
                pixels = random.integers(0, 256, shape, np.uint8)
                Image.fromarray(pixels).save(file, "PNG")
                file.seek(0)
                yield i, {"photo": file, "texts": ["", text]}

    builder = Captioned(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return builder.name
