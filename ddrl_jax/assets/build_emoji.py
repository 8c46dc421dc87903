"""Builds the embedded emoji data set from the npm package emoji-datasource-google.

    npm pack emoji-datasource-google@16.0.0
    python -m ddrl_jax.assets.build_emoji emoji-datasource-google-16.0.0.tgz

Writes a TFDS data set over array_record (64 px PNG on white, caption, category) and
the vocabulary beside it. The pictures are stored at twice the training resolution so
that a random size and rotation stay sharp.
"""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

PIXELS = 64
CAPTIONS = 256
# Sub-categories in order of preference; the first CAPTIONS usable names are kept.
GROUPS = [
    "animal-mammal",
    "animal-bird",
    "animal-amphibian",
    "animal-reptile",
    "animal-marine",
    "animal-bug",
    "plant-flower",
    "plant-other",
    "food-fruit",
    "food-vegetable",
    "food-prepared",
    "food-asian",
    "food-sweet",
    "drink",
    "sport",
    "event",
    "musical-instrument",
]
# Near duplicates of another caption's picture, or pictures without colour on white.
LEFT_OUT = set(
    """service dog|guide dog|mouse|rabbit|cat|horse|pig|cow|tiger|bactrian camel|
    black bird|front-facing baby chick|dragon|spider web|cricket|fly|microbe|mosquito|
    bird|dove|feather|wing|white flower|rosette|blossom|leafless tree|empty nest|
    shamrock|ear of rice|leaf fluttering in wind|fallen leaf|salt shaker|
    cooked rice|glass of milk|clinking beer mugs|clinking glasses|pouring liquid|
    sake bottle and cup|tumbler glass|ice cube|fishing pole and fish|
    running shirt with sash|ski and ski boot|goal net|flag in hole|ribbon|
    reminder ribbon|admission tickets|ticket|japanese dolls|tanabata tree|
    firework sparkler|fireworks|moon viewing ceremony|sparkles|flute|
    field hockey stick and ball|cricket bat and ball|fish|whale|poodle|pig nose|
    paw prints|monkey|ox|water buffalo|wilted flower|rat|boar|chicken|hatching chick|
    fortune cookie|sauropod|cockroach|worm|spoon|takeout box""".replace("\n", "")
    .replace("    ", "")
    .split("|")
)


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Noto emoji on white with their names as captions."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, rows=(), **kwargs):
        self._rows = rows
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Noto emoji (Google, Apache-2.0) on white, with names.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(PIXELS, PIXELS, 3), encoding_format="png"
                    ),
                    "caption": tfds.features.Text(),
                    "category": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded: the rows come from the tarball
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, (caption, category, png) in enumerate(self._rows):
            yield (
                index,
                {"image": io.BytesIO(png), "caption": caption, "category": category},
            )


def on_white(png: bytes) -> bytes:
    """Flattens an RGBA picture on white and returns it as an optimised PNG."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    flat = page.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    flat.save(out, "PNG", optimize=True)
    return out.getvalue()


def read_rows(tarball: Path) -> list[tuple[str, str, bytes]]:
    """Returns (caption, category, png) of the kept emoji, in the package's order."""
    with tarfile.open(tarball) as tar:
        files = {
            m.name: tar.extractfile(m).read()  # pyright: ignore[reportOptionalMemberAccess]
            for m in tar
            if m.name == "package/emoji.json" or "/img/google/64/" in m.name
        }
    entries = json.loads(files["package/emoji.json"])
    wanted = [
        e
        for group in GROUPS
        for e in entries
        if e["subcategory"] == group and e["has_img_google"]
        if e["name"].lower() not in LEFT_OUT
    ]
    if len(wanted) < CAPTIONS:
        raise ValueError(f"got {len(wanted)} usable emoji, wanted {CAPTIONS}")
    return [
        (
            e["name"].lower(),
            e["subcategory"],
            on_white(files["package/img/google/64/" + e["image"]]),
        )
        for e in wanted[:CAPTIONS]
    ]


def nearest_pairs(rows: list[tuple[str, str, bytes]], count: int) -> list[str]:
    """Names the most alike pictures, to choose LEFT_OUT by eye."""
    small = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(p)).resize((16, 16)), np.float32).ravel()
            for _, _, p in rows
        ]
    )
    distance = ((small[:, None] - small[None]) ** 2).mean(-1)
    distance[np.tril_indices(len(rows))] = np.inf
    order = np.argsort(distance, axis=None)[:count]
    pairs = [np.unravel_index(k, distance.shape) for k in order]
    return [f"{distance[i, j]:8.1f} {rows[i][0]} ~ {rows[j][0]}" for i, j in pairs]


def main(tarball: str) -> None:
    """Builds the data set into ddrl_jax/assets/emoji."""
    home = Path(__file__).parent
    rows = read_rows(Path(tarball))
    print("\n".join(nearest_pairs(rows, 25)))
    if (home / "emoji").exists():  # TFDS would keep it, whatever the rows are
        raise SystemExit(f"{home / 'emoji'} is there: move it away to build it anew")
    builder = Emoji(rows=rows, data_dir=home)
    builder.download_and_prepare()
    words = sorted({w for caption, _, _ in rows for w in caption.split()})
    (home / "emoji" / "words.txt").write_text("\n".join(words) + "\n")
    print(f"{len(rows)} captions, {len(words)} words, in {builder.data_dir}")


if __name__ == "__main__":
    main(sys.argv[1])
