"""A cache of VAE latents and text embeddings, read by record; `latent_writer` wrote it.

    FOLDER/latents-DIGEST/            complete, put there by one rename
      cache.json                      the fingerprint and what was skipped
      captions.json                   the unique captions, and which each record has
      latents-00000.array_record ...  posterior mean and logvar of each record
      texts-00000.array_record ...    what the text encoder says, once a caption
    FOLDER/.latents-DIGEST.partial/   an interrupted writing, taken up shard by shard

The digest is of all that decides the bytes, so other data, weights or settings go to a
folder of their own and nothing is overwritten. array_record checks a hash of each
record, so damaged bytes are an error and never a training picture.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ddrl_jax.data.record_table import Table, damaged, read_json
from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Cond


def latent_source(
    folder: str | Path, fingerprint: Mapping[str, Any] | None = None
) -> "LatentSource":
    """Opens a cache that `write_latents` returned.

    Args:
      folder: of the one cache.
      fingerprint: names and values that the cache must have been written with; those
        not given are not compared.

    Raises:
      UserError: no complete cache there, another fingerprint, or damaged files.
    """
    folder = Path(folder)
    if not (folder / "cache.json").is_file():
        raise UserError(
            f"there is no cache of latents in {folder}",
            got="a folder without cache.json" if folder.is_dir() else "no folder",
            wanted="a folder latents-DIGEST that was written to its end",
            way_out="start the run again with --config.data.cache set: it is made anew",
        )
    if fingerprint is not None:
        check_card(folder, fingerprint)
    return LatentSource(folder)


class LatentSource:
    """A cache opened for reading, by any number of threads.

    Attributes:
      captions: the caption of each record.
      skipped: how many pictures were left out when it was written, by kind of fault.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            known = read_json(folder / "captions.json")
            texts, index = known["texts"], known["record"]
            self.captions = tuple(texts[i] for i in index)
            self.skipped: dict[str, int] = dict(read_card(folder)["skipped"])
        except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
            raise damaged(folder, e) from e
        self._row_of = {text: row for row, text in enumerate(texts)}
        self._latents, self._texts = Table(folder, "latents"), Table(folder, "texts")
        if (self._latents.rows, self._texts.rows) != (len(index), len(texts)):
            raise damaged(folder, "tables of another length than the captions")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape (h, w, c) of one latent."""
        return self._latents.leaves["mean"][1]

    def fetch(
        self, records: Int[np.ndarray, " b"]
    ) -> dict[str, Float[np.ndarray, "b h w c"]]:
        """Reads the posteriors of some records, in this order, repeats allowed.

        Args:
          records: indices into `captions`.

        Returns:
          {"mean", "logvar"} of the scaled latents, float32, for `latents`.

        Raises:
          UserError: damaged files.
        """
        return {k: _wide(v) for k, v in self._latents.read(records).items()}

    def encode(self, captions: Sequence[str]) -> Cond:
        """The text encoder's answer for captions of this cache; [b ...] leaves.

        Raises:
          UserError: a caption is not in the cache, or damaged files.
        """
        missing = [c for c in captions if c not in self._row_of]
        if missing:
            raise UserError(
                f"{len(missing)} captions are not in the cache {self.folder}",
                got=", ".join(repr(c) for c in missing[:5]),
                wanted="captions of the cached data",
                way_out="encode them with the text encoder itself",
            )
        rows = self._texts.read(np.array([self._row_of[c] for c in captions]))
        # They stay on the host until they are asked for.
        wide: dict[str, Any] = {name: _wide(values) for name, values in rows.items()}
        return Cond(wide["emb"], wide.get("pooled"))

    def latents(
        self, fetched: Mapping[str, Float[Array, "b h w c"]], keys: Key[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        """`draw_latents`, as a data source offers it."""
        return draw_latents(fetched, keys)


def draw_latents(
    fetched: Mapping[str, Float[Array, "b h w c"]], keys: Key[Array, " b"]
) -> Float[Array, "b h w c"]:
    """Draws from the cached posterior: z = mean + exp(logvar / 2) eps.

    Args:
      fetched: {"mean", "logvar"} [b h w c], of `LatentSource.fetch`.
      keys: one a sample; a record and a key give the same latent anywhere.
    """
    mean, logvar = fetched["mean"], fetched["logvar"]
    eps = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    return mean + jnp.exp(0.5 * logvar) * eps


def read_card(folder: Path) -> dict[str, Any]:
    """The fingerprint of a complete cache, and what was skipped."""
    try:
        card = read_json(folder / "cache.json")
        return {"fingerprint": card["fingerprint"], "skipped": card["skipped"]}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise damaged(folder, e) from e


def check_card(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Refuses a cache that was written with other values of these names.

    Raises:
      UserError: it names them.
    """
    found = read_card(folder)["fingerprint"]
    wanted = json.loads(json.dumps(dict(wanted)))
    other = [k for k in wanted if k not in found or found[k] != wanted[k]]
    if other:
        raise UserError(
            f"the cache {folder} was written with another {', '.join(other)}",
            got=", ".join(f"{k} {found.get(k, '(none)')!r}" for k in other),
            wanted=", ".join(f"{k} {wanted[k]!r}" for k in other),
            way_out="use the configuration it was written with, or let this run write "
            "one of its own: --config.data.cache=FOLDER holds any number of them",
        )


def _wide(leaf: np.ndarray) -> np.ndarray:
    return leaf.astype(np.float32) if leaf.dtype.kind == "f" else leaf
