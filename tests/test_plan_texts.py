"""How many prompts a plan takes a run to have, by what is here of them."""

import json
from typing import Any

import pytest
from edited_config import configured
from tiny_runs import TINY

from ddrl_jax.data.prompts import prompt_list
from ddrl_jax.errors import UserError
from ddrl_jax.plan import plan_mode
from ddrl_jax.plan.lowered import describe
from ddrl_jax.plan.memory import embedding_bytes, resident, uncounted
from ddrl_jax.plan.texts import texts_of

LINES = ("cat", "dog", "red apple", "cat dog", "apple")
FILES = {
    "file": "\n".join(LINES),
    "questions": "\n".join(json.dumps({"prompt": line}) for line in LINES),
}


def planned(source, path, limit=0) -> Any:
    edits = {"prompts.source": source, "prompts.path": str(path)}
    return configured(TINY | edits | {"prompts.limit": limit, "mesh.data": 1})


@pytest.mark.parametrize("limit", [0, 4])
@pytest.mark.parametrize("source", FILES)
def test_prompts_of_a_file_that_is_here_are_those_of_a_run(source, limit, tmp_path):
    path = tmp_path / "prompts"
    path.write_text(FILES[source])
    config = planned(source, path, limit)
    read = len(prompt_list(config.prompts, (), config.seed))
    assert texts_of(config) == (read, "") == (limit or 5, "")


@pytest.mark.parametrize("source", [*FILES, "tfds", "data"])
def test_what_was_not_read_has_the_prompts_of_an_epoch_or_its_limit(source, tmp_path):
    path = tmp_path / "prompts"
    place = "the captions of the data" if source == "data" else str(path)
    assert texts_of(planned(source, path)) == (2, place)  # of TINY, an epoch
    assert texts_of(planned(source, path, limit=4)) == (4, "")


def test_a_limit_above_the_lines_of_a_file_is_refused_as_in_training(tmp_path):
    path = tmp_path / "prompts"
    path.write_text(FILES["file"])
    with pytest.raises(UserError, match="more prompts than there are"):
        texts_of(planned("file", path, limit=6))


def test_each_prompt_has_a_row_in_memory_and_what_is_not_here_is_told(tmp_path):
    path = tmp_path / "prompts"
    path.write_text(FILES["file"])
    plan = describe(planned("file", path))
    each = embedding_bytes(plan)
    assert resident(plan)["prompt embeddings"] == 5 * each > 0
    assert uncounted(plan) == []
    path.unlink()
    plan = plan._replace(texts=texts_of(plan.config))
    assert resident(plan)["prompt embeddings"] == 2 * each
    told = f"prompts beyond the 2 of an epoch, {each} bytes each: {path}"
    assert uncounted(plan) == [told]


def test_more_prompts_than_a_device_holds_are_refused_as_in_training(monkeypatch):
    monkeypatch.setattr("ddrl_jax.data.prompts.TEXT_BYTES", 50)
    config = configured(TINY | {"mesh.data": 1, "evaluate.pictures": 0})
    with pytest.raises(UserError, match="all prompts do not fit on a device"):
        plan_mode(config, {"devices": "1", "chip": "H100"})
