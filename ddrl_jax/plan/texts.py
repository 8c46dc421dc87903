"""How many prompts a run has, whose embeddings every device holds, as a plan knows it.

No file has to be there for a plan. One that is here is read as a run reads it; data
sets, whose captions may be the prompts, are not.
"""

from pathlib import Path
from typing import Any, NamedTuple

from ddrl_jax.data.prompts import prompt_list

HERE = ("list", "set")  # sources that are no file
FILES = ("file", "questions")


class Texts(NamedTuple):
    """Prompts of a run.

    Attributes:
      count: of them; where only a file or data set that is not read knows, those of an
        epoch.
      unread: what was not read and may hold more; "" if the count is that of the run.
    """

    count: int
    unread: str = ""


def texts_of(config: Any) -> Texts:
    """Counts the prompts that a run would read.

    Args:
      config: the whole configuration.

    Raises:
      UserError: the file is here and holds no prompts, or fewer than prompts.limit.
    """
    c = config.prompts
    if c.source in HERE or (c.source in FILES and Path(c.path).is_file()):
        return Texts(len(prompt_list(c, (), config.seed)))
    if c.limit:
        return Texts(c.limit)
    place = "the captions of the data" if c.source == "data" else c.path
    return Texts(c.per_epoch, place)
