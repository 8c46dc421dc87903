"""A folder of pictures and captions, in either of the two usual forms.

    metadata.jsonl   {"file_name": "a.png", "text": "a cat"}   Hugging Face ImageFolder
    a.png a.txt      the caption of NAME.png is the text of NAME.txt

Folders may be nested; `file_name` is relative to the metadata.jsonl it stands in. The
key may also be "caption". Hidden files are left alone, and README* and LICENSE* that
are no pictures.
"""

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ddrl_jax.data.images import (
    EMPTY_CAPTION,
    NO_CAPTION,
    NOT_UTF8,
    THREADS,
    Pictures,
    Row,
    make_pictures,
    normal_caption,
)
from ddrl_jax.errors import UserError
from ddrl_jax.file_tree import walk
from ddrl_jax.text import is_text, parse_json

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"
_LEFT_ALONE = ("readme", "license")
_TEXT_KEYS = ("text", "caption")

UNREADABLE = "files or folders that can not be read"
UNSUPPORTED = "files of an unsupported kind"
BROKEN_LINE = "broken lines of metadata.jsonl"
NO_PICTURE = "captions without a picture"
TWICE = "pictures with more than one caption"
SAME_NAME = "pictures that share one caption file"


def read_folder(
    path: str,
    resolution: int,
    resample: str = "bicubic",
    on_bad: str = "error",
) -> Pictures:
    """Lists the captioned pictures below a folder, in the order of their names.

    Every file is read once, for its checksum; `Pictures.checked` decodes them.

    Args:
      path: the folder.
      resolution: pixels of a side.
      resample: "bicubic" or "lanczos".
      on_bad: "error", or "skip" to leave out what can not be used and count it.

    Raises:
      UserError: no such folder, nothing usable in it, or faults with on_bad="error".
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(
            f"the folder of pictures {path!r} is not there",
            got="a file" if root.exists() else "nothing of this name",
            wanted="a folder with pictures and captions",
            way_out="correct --config.data.path",
        )
    reader = _Reader(root)
    captions = reader.captions()
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(partial(_digest, root), captions))
    rows = []
    for (name, caption), digest in zip(captions.items(), digests, strict=True):
        if isinstance(digest, OSError):
            reader.fault(UNREADABLE, f"{name} ({digest.strerror})")
        else:
            rows.append(Row(name, caption, (root / name).read_bytes, digest))
    faults = {kind: tuple(names) for kind, names in reader.faults.items()}
    return make_pictures(str(root), rows, faults, resolution, resample, on_bad)


def _digest(root: Path, name: str) -> str | OSError:
    """SHA-256 of a file, or why it can not be read."""
    try:
        with (root / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        return e


class _Reader:
    """The files below a folder by kind, and what is wrong with them."""

    def __init__(self, root: Path):
        self.root = root
        self.faults: dict[str, list[str]] = {}
        self.pictures: dict[str, None] = {}  # an ordered set of names below root
        self.texts: list[str] = []
        self.metadata: list[str] = []
        self.told: set[str] = set()  # pictures whose caption was reported already
        for name in self._files():
            self._sort(name)

    def fault(self, kind: str, name: str) -> None:
        self.faults.setdefault(kind, []).append(name)

    def _files(self) -> list[str]:
        """Names of all files, behind links too."""
        names = []

        def refused(e: OSError) -> None:
            where = os.path.relpath(e.filename or self.root, self.root)
            self.fault(UNREADABLE, f"{where} ({e.strerror})")

        for top, folders, files in walk(self.root, onerror=refused):
            folders[:] = [f for f in folders if f[0] != "."]
            below = Path(top).relative_to(self.root)
            names += [(below / f).as_posix() for f in files if f[0] != "."]
        return sorted(names)

    def _sort(self, name: str) -> None:
        base, extension = os.path.splitext(os.path.basename(name).lower())
        if extension in EXTENSIONS:
            self.pictures[name] = None
        elif os.path.basename(name) == METADATA:
            self.metadata.append(name)
        elif extension == ".txt":
            self.texts.append(name)
        elif not base.startswith(_LEFT_ALONE):
            self.fault(UNSUPPORTED, name)

    def captions(self) -> dict[str, str]:
        """Name -> caption of the pictures that have exactly one."""
        found = [*self._from_metadata(), *self._from_texts()]
        times = Counter(name for name, _ in found)
        captions = dict(found)
        for name in self.pictures:
            if times[name] > 1:
                self.fault(TWICE, name)
                del captions[name]
            elif name not in captions:
                if name not in self.told:
                    self.fault(NO_CAPTION, name)
            elif not captions[name]:
                self.fault(EMPTY_CAPTION, name)
                del captions[name]
        return {name: captions[name] for name in self.pictures if name in captions}

    def _text(self, name: str) -> str | None:
        try:
            return (self.root / name).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            self.fault(NOT_UTF8, name)
        except OSError as e:
            self.fault(UNREADABLE, f"{name} ({e.strerror})")
        return None

    def _from_texts(self) -> list[tuple[str, str]]:
        stems: dict[str, list[str]] = {}
        for name in self.pictures:
            stems.setdefault(os.path.splitext(name)[0], []).append(name)
        found = []
        for name in self.texts:
            owners = stems.get(os.path.splitext(name)[0], [])
            if not owners:  # a caption, unless it is one of the folder's papers
                if not os.path.basename(name).lower().startswith(_LEFT_ALONE):
                    self.fault(NO_PICTURE, name)
            elif len(owners) > 1:  # whose is it?
                self.fault(SAME_NAME, " + ".join(owners))
                self.told.update(owners)
            elif (text := self._text(name)) is None:
                self.told.update(owners)
            else:
                found.append((owners[0], normal_caption(text)))
        return found

    def _from_metadata(self) -> list[tuple[str, str]]:
        found = []
        for name in self.metadata:
            lines = (self._text(name) or "").split("\n")
            for number, line in enumerate(lines, 1):
                if line.strip():
                    found += self._row(name, f"{name}:{number}", line)
        return found

    def _row(self, metadata: str, where: str, line: str) -> list[tuple[str, str]]:
        """The (picture, caption) of one line, or none and a fault."""
        try:
            row = parse_json(line)
        except ValueError as e:
            self.fault(BROKEN_LINE, f"{where} ({e})")
            return []
        file_name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(file_name, str) or not file_name:
            self.fault(BROKEN_LINE, f'{where} (no "file_name")')
            return []
        name = os.path.normpath(os.path.join(os.path.dirname(metadata), file_name))
        name = Path(name).as_posix()
        caption = next((row[key] for key in _TEXT_KEYS if key in row), None)
        if name not in self.pictures:
            self.fault(NO_PICTURE, f"{where} ({file_name})")
        elif caption is None:
            return []  # reported as a picture without a caption
        elif not isinstance(caption, str):
            self.fault(BROKEN_LINE, f"{where} (the caption is no text)")
            self.told.add(name)
        elif not is_text(caption):
            self.fault(BROKEN_LINE, f"{where} (the caption is not Unicode)")
            self.told.add(name)
        else:
            return [(name, normal_caption(caption))]
        return []
