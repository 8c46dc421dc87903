"""Prompts of an epoch: a pure function of (seed, epoch), the same on every host."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ddrl_jax.data.images import normal_caption
from ddrl_jax.data.prompt_sets import (
    prompt_set,
    read_question_prompts,
    tfds_prompts,
)
from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Prompts
from ddrl_jax.text import is_text

TEXT_BYTES = 4_000_000_000  # of embeddings of texts that every device may hold


def read_prompt_file(path: str) -> tuple[str, ...]:
    """One prompt a line; blank lines are skipped.

    Raises:
      UserError: the file is missing, not UTF-8, or has no prompt.
    """
    try:
        # Other characters than line feeds end a line for splitlines: U+0085, U+2028.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"the prompt file {path!r} can not be read ({e})",
            got=type(e).__name__,
            wanted="a UTF-8 text file, one prompt a line",
            way_out="correct --config.prompts.path",
        ) from e
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UserError(
            f"the prompt file {path!r} has no prompt",
            got="only blank lines" if lines != [""] else "an empty file",
            wanted="at least one prompt",
            way_out="write one prompt a line, or use --config.prompts.source=data",
        )
    return prompts


def prompt_list(prompts_config, captions: Sequence[str], seed: int) -> tuple[str, ...]:
    """The prompts that training draws from, in a fixed order.

    Args:
      prompts_config: config.prompts.
      captions: of the data, for source "data"; repeats are dropped.
      seed: chooses which ones stay where `limit` is set.
    """
    c = prompts_config
    read = {
        "data": lambda: tuple(dict.fromkeys(captions)),
        "list": lambda: tuple(c.list),
        "file": lambda: read_prompt_file(c.path),
        "set": lambda: prompt_set(c.set),
        "questions": lambda: read_question_prompts(c.path),
        "tfds": lambda: tfds_prompts(c.path, c.feature, c.split),
    }
    found = tuple(map(normal_caption, read[c.source]()))  # as captions of data are
    _check_text(found)
    limit = prompts_config.limit or len(found)
    if limit > len(found):
        raise UserError(
            "config.prompts.limit asks for more prompts than there are",
            got=limit,
            wanted=f"at most {len(found)}",
            way_out="lower it, or 0 for all",
        )
    if limit == len(found):
        return found
    chosen = np.random.default_rng([seed, 1]).permutation(len(found))[:limit]
    return tuple(found[i] for i in sorted(chosen))


def _check_text(prompts: Sequence[str]) -> None:
    """Refuses what is no text: bytes of another encoding, half an emoji."""
    for number, prompt in enumerate(prompts):
        if not prompt or not is_text(prompt):
            raise UserError(
                f"prompt {number} is {'not Unicode' if prompt else 'blank'}",
                got=ascii(prompt),
                wanted="valid Unicode that is not blank",
                way_out="correct it where --config.prompts.source takes it from",
            )


def draw_prompts(
    prompts: Sequence[str], seed: int, epoch: int, per_epoch: int, group_size: int
) -> Prompts:
    """Draws the prompts of an epoch without replacement, pass after pass.

    Slot j of all epochs together is entry j mod len of a permutation that is drawn
    anew for each pass, so every prompt comes up equally often.

    Args:
      prompts: the list.
      seed: of the run.
      epoch: from 0.
      per_epoch: groups an epoch.
      group_size: samples a group.
    """
    slots = epoch * per_epoch + np.arange(per_epoch)
    passes, places = np.divmod(slots, len(prompts))
    order = {
        p: np.random.default_rng([seed, 2, int(p)]).permutation(len(prompts))
        for p in np.unique(passes)
    }
    chosen = np.array(
        [order[p][i] for p, i in zip(passes, places, strict=True)], np.int32
    )
    index = np.repeat(chosen, group_size)
    group = np.repeat(np.arange(per_epoch, dtype=np.int32), group_size)
    return Prompts(tuple(prompts[int(i)] for i in index), index, group)


def choose_records(
    prompt_index: np.ndarray,
    records_of: Sequence[np.ndarray],
    seed: int,
    epoch: int,
) -> np.ndarray:
    """A record of the same caption for each sample, drawn by (seed, epoch, sample).

    Args:
      prompt_index: [b] position of each sample's prompt.
      records_of: for each prompt, the records that carry it as caption.
      seed: of the run.
      epoch: from 0.
    """
    draw = np.random.default_rng([seed, 3, epoch]).random(len(prompt_index))
    counts = np.array([len(records_of[i]) for i in prompt_index])
    picks = (draw * counts).astype(np.int64)
    return np.array(
        [records_of[i][k] for i, k in zip(prompt_index, picks, strict=True)], np.int32
    )


def records_by_prompt(
    prompts: Sequence[str], captions: Sequence[str]
) -> tuple[np.ndarray, ...]:
    """For each prompt the records whose caption it is.

    Raises:
      UserError: a prompt has no picture; the data term is conditional on the caption.
    """
    where: dict[str, list[int]] = {}
    for record, caption in enumerate(captions):
        where.setdefault(caption, []).append(record)
    missing = [p for p in prompts if p not in where]
    if missing:
        raise UserError(
            f"{len(missing)} prompts have no picture in the data set",
            got=", ".join(repr(p) for p in missing[:5]),
            wanted="a record with the same caption for every prompt, since the data "
            "term is conditional on it",
            way_out="write base samples of them with --mode=sample and train with "
            "config.data.source='samples', or set config.data_term.weight=0 and "
            "config.data.source='none'",
        )
    return tuple(np.array(where[p], np.int32) for p in prompts)


def require_pictures(prompts: Sequence[str], captions: Sequence[str]) -> None:
    """Refuses prompts without data where only the held-out data loss asks for them.

    Raises:
      UserError: a prompt has no picture to take the loss of.
    """
    known = set(captions)
    missing = [p for p in prompts if p not in known]
    if not missing:
        return
    raise UserError(
        f"{len(missing)} prompts have no picture for the held-out data loss",
        got=", ".join(repr(p) for p in missing[:5]),
        wanted="a record with the same caption for every prompt; nothing is trained on "
        "the data, but the evaluations take their loss",
        way_out="--config.evaluate.data_samples=0 leaves that loss out, "
        "--config.data.source=none the data",
    )


def require_records(total: int, heldout: int) -> None:
    """Raises UserError where holding out so many records leaves none to train on."""
    if heldout < total:
        return
    raise UserError(
        "config.data.heldout leaves no record to train on",
        got=f"{heldout} held out of {total} records",
        wanted=f"fewer than {total}",
        way_out="lower config.data.heldout",
    )


def require_room(count: int, each: int, what: str = "prompts") -> None:
    """Raises UserError where a device can not hold the embeddings of so many texts.

    Args:
      count: of the texts.
      each: bytes of an embedding.
      what: the texts are.
    """
    if count * each <= TEXT_BYTES:
        return
    most = TEXT_BYTES // each
    raise UserError(
        f"the embeddings of all {what} do not fit on a device",
        got=f"{count} of {each:,} bytes: {count * each / 1e9:.1f} GB",
        wanted=f"at most {TEXT_BYTES / 1e9:g} GB, {most} texts",
        way_out=f"--config.prompts.limit={most} keeps a seeded choice"
        if what == "prompts"
        else "a smaller data set, or data_term.captions 'prompt'",
    )
