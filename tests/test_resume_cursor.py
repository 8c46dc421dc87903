"""What a checkpoint says of its run beside the arrays, and what a start makes of it."""

import pytest
from tiny_runs import WORDS, tiny_program

from ddrl_jax.checkpoint import Checkpoints
from ddrl_jax.errors import UserError
from ddrl_jax.resume import save, start


@pytest.fixture(scope="module")
def program():
    return tiny_program()


@pytest.fixture
def checkpoints(tmp_path):
    """checkpoints(read_only): of one folder, closed at the end."""
    opened = []

    def of_the_run(read_only: bool = False) -> Checkpoints:
        opened.append(Checkpoints(tmp_path / "run", 1, 2, read_only=read_only))
        return opened[-1]

    yield of_the_run
    for each in opened:
        each.close()


def save_begin(program, checkpoints, epoch=1, **more):
    """A checkpoint of the state that the run begins with."""
    begin, kept = start(program, checkpoints), checkpoints
    save(kept, epoch, begin.state, begin.tracker, program, force=True, **more)
    kept.wait()


OTHERS = {
    "another text": (*WORDS[:3], "moon"),
    "another order": (*WORDS[1:], WORDS[0]),
    "one more": (*WORDS, "moon"),
    "one less": WORDS[:3],
    "another cut": (WORDS[0], *WORDS[2:], WORDS[1]),
}


def test_a_run_goes_on_with_its_own_prompts_alone(program, checkpoints):
    save_begin(program, checkpoints())
    assert start(program, checkpoints()).epoch == 1
    for others in OTHERS.values():
        changed = program._replace(prompts=others)
        with pytest.raises(UserError, match="prompts of the run have changed") as error:
            start(changed, checkpoints())
        assert error.value.got.startswith(f"{len(others)} prompts, digest ")
        assert error.value.wanted.startswith("4 prompts, digest ")
        assert error.value.got.split()[-1] != error.value.wanted.split()[-1]
        assert "--workdir" in error.value.way_out
    changed = program._replace(prompts=OTHERS["another text"])
    assert start(changed, checkpoints(read_only=True)).epoch == 1  # it trains nothing


def test_a_checkpoint_that_says_nothing_of_prompts_is_taken(program, checkpoints):
    """As those of earlier versions."""
    kept = checkpoints()
    begin, cursor = start(program, kept), {"epoch": 1, "weights": "random"}
    state = {"train": begin.state, "tracker": begin.tracker}
    assert kept.save(1, state, cursor, force=True)
    kept.wait()
    assert start(program, checkpoints()).epoch == 1
