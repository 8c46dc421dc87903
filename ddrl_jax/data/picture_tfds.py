"""Captioned pictures of a TFDS data set over array_record, read without TensorFlow.

Also the form that `data.samples` writes: samples of the base model are data like any.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from ddrl_jax.data.images import (
    EMPTY_CAPTION,
    NO_CAPTION,
    NOT_UTF8,
    Pictures,
    Row,
    make_pictures,
    normal_caption,
)
from ddrl_jax.errors import UserError

_CHUNK = 64  # records in memory while the captions are read


def read_tfds(
    data: str,
    resolution: int,
    split: str = "train",
    image: str = "image",
    caption: str = "caption",
    data_dir: str = "",
    resample: str = "bicubic",
    on_bad: str = "error",
) -> Pictures:
    """Lists the captioned pictures of a prepared TFDS data set.

    All records are read once, for captions and checksums; pictures are decoded later.

    Args:
      data: the folder of one version of a data set (with dataset_info.json), or
        NAME[/CONFIG][:VERSION] of one prepared below `data_dir`.
      resolution: pixels of a side.
      split: of TFDS, slices as in "train[:1000]" included.
      image: name of the image feature, "a/b" for b inside a.
      caption: name of the text feature; of several texts a record the first one that
        is not empty counts, and a class label stands for its name.
      data_dir: where NAME is looked for; "" is the default of TFDS.
      resample: "bicubic" or "lanczos".
      on_bad: "error", or "skip" to leave out what can not be used and count it.

    Raises:
      UserError: no such data set, split or feature; nothing usable; or faults with
        on_bad="error".
    """
    builder = _builder(data, data_dir)
    features = builder.info.features
    _check_features(data, features, image, caption)
    records = _records(builder, data, split)
    names = getattr(_at(features, caption), "names", None)
    rows: list[Row] = []
    faults: dict[str, list[str]] = {}
    for i, record in _enumerated(records, data):
        name, content = f"{split}[{i}]", _at(record, image)
        texts = _texts(_at(record, caption), names)
        text = next((t for t in texts or () if t), "")
        if text:
            digest = hashlib.sha256(content).hexdigest()
            rows.append(Row(name, text, partial(_content, records, i, image), digest))
            continue
        kind = EMPTY_CAPTION if texts else NO_CAPTION
        kind = NOT_UTF8 if texts is None else kind
        faults.setdefault(kind, []).append(name)
    found = {kind: tuple(names) for kind, names in faults.items()}
    return make_pictures(data, rows, found, resolution, resample, on_bad)


def check_tfds(
    data: str,
    split: str = "train",
    image: str = "image",
    caption: str = "caption",
    data_dir: str = "",
) -> None:
    """Opens a data set and reads no record; arguments as `read_tfds`.

    Raises:
      UserError: no such data set, split or feature.
    """
    builder = _builder(data, data_dir)
    _check_features(data, builder.info.features, image, caption)
    _records(builder, data, split)


def tfds_folder(data: str, data_dir: str = "") -> Path:
    """Where the files of a prepared TFDS data set lie; arguments as `read_tfds`.

    Raises:
      UserError: no such data set.
    """
    return Path(_builder(data, data_dir).data_dir)


def _builder(data: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds  # slow import, only where data is read
    from tensorflow_datasets.core import read_only_builder

    try:
        if not data:  # Path("") is where the program was started
            raise ValueError("config.data.path is empty")
        if Path(data).is_dir():
            return tfds.builder_from_directory(data)
        # Never the code of the data set: that may need TensorFlow and downloads.
        kwargs = {"data_dir": data_dir} if data_dir else {}
        return read_only_builder.builder_from_files(data, **kwargs)
    except Exception as e:
        why = str(e).partition("\n")[0]  # TFDS explains its names in a page of text
        raise UserError(
            f"the TFDS data set {data!r} can not be opened ({type(e).__name__}: {why})",
            got="a folder" if data and Path(data).is_dir() else f"no folder {data!r}",
            wanted="the folder of a prepared data set (VERSION/dataset_info.json), or "
            "the name of one below --config.data.tfds_dir",
            way_out="prepare it once: tfds build NAME --file_format=array_record",
        ) from e


def _records(builder: Any, data: str, split: str) -> Any:
    skip = _skip_decoding(builder.info.features)
    try:
        return cast(Any, builder).as_data_source(split, decoders=skip)
    except Exception as e:
        has = ", ".join(builder.info.splits or ()) or "none"
        raise UserError(
            f"split {split!r} of {data} can not be read ({type(e).__name__}: {e})",
            got=f"splits {has}, stored as {builder.info.file_format}",
            wanted="a split of the set, or a slice of one, stored as array_record",
            way_out="correct --config.data.split, or convert the set: "
            "tfds build NAME --file_format=array_record",
        ) from e


def _skip_decoding(features: Any) -> dict[str, Any]:
    """Decoders that leave each image as its bytes; TFDS itself would need OpenCV."""
    import tensorflow_datasets as tfds

    found: dict[str, Any] = {}
    for name, feature in features.items():
        if isinstance(feature, tfds.features.Image):
            found[name] = tfds.decode.SkipDecoding()
        elif isinstance(feature, tfds.features.FeaturesDict):
            found[name] = _skip_decoding(feature)
    return {name: value for name, value in found.items() if value != {}}


def _check_features(data: str, features: Any, image: str, caption: str) -> None:
    import tensorflow_datasets as tfds

    f = tfds.features
    text = (f.Text, f.ClassLabel)
    for key, name, kinds in (("image", image, (f.Image,)), ("caption", caption, text)):
        found = _at(features, name)
        inner = found.feature if isinstance(found, f.Sequence) else found
        if isinstance(inner, kinds) and (inner is found or isinstance(inner, f.Text)):
            continue
        raise UserError(
            f"the data set {data} has no {key} feature {name!r}",
            got=f"{type(found).__name__}; the features are "
            + ", ".join(f"{n} ({type(v).__name__})" for n, v in features.items()),
            wanted=" or ".join(kind.__name__ for kind in kinds),
            way_out=f"set --config.data.{key}_feature; a/b names b inside a",
        )


def _enumerated(records: Any, data: str):
    """(index, record), a chunk in memory at a time."""
    for start in range(0, len(records), _CHUNK):
        span = range(start, min(start + _CHUNK, len(records)))
        try:
            chunk = records.__getitems__(list(span))
        except Exception as e:
            raise UserError(
                f"records {span[0]} to {span[-1]} of {data} can not be read",
                got=f"{type(e).__name__}: {e}",
                wanted="undamaged array_record files of Text and Image features",
                way_out="copy or build the data set again",
            ) from e
        yield from zip(span, chunk, strict=True)


def _at(tree: Any, path: str) -> Any:
    """tree["a"]["b"] for "a/b", or None where there is no such thing."""
    for part in path.split("/"):
        inner = getattr(tree, "feature", tree)  # of a Sequence of TFDS
        try:
            tree = inner[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _texts(value: Any, names: Sequence[str] | None) -> list[str] | None:
    """The captions of one record, white space made normal; None if not UTF-8."""
    if names is not None:
        return [names[int(value)]] if int(value) >= 0 else []
    items = [value] if isinstance(value, bytes) else value
    try:
        return [normal_caption(item.decode()) for item in items]
    except UnicodeDecodeError:
        return None


def _content(records: Any, index: int, image: str) -> bytes:
    try:
        return _at(records[index], image)
    except Exception as e:  # array_record raises any kind, as in `_enumerated`
        raise OSError(f"{type(e).__name__}: {e}") from e
