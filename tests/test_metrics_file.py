import json

import pytest
from edited_config import configured

from configs.base import get_config
from ddrl_jax.metrics import Metrics
from ddrl_jax.metrics_file import continue_from
from ddrl_jax.workdir import open_workdir


def lines(*steps) -> str:
    return "".join(
        json.dumps({"step": step, "reward": step / 2}) + "\n" for step in steps
    )


@pytest.mark.parametrize(
    ("restored", "kept", "moved"),
    [(3, (1, 2, 3), (4, 5)), (5, (1, 2, 3, 4, 5), ()), (-1, (), (1, 2, 3, 4, 5))],
)
def test_metrics_after_the_restored_epoch_move_away(tmp_path, restored, kept, moved):
    with open_workdir(tmp_path, get_config()) as home:
        home.metrics.write_text(lines(1, 2, 3, 4, 5))
        assert continue_from(home, restored) == len(moved)
        assert home.metrics.read_text() == lines(*kept)
        discarded = home.discarded.read_text() if home.discarded.exists() else ""
    assert discarded == lines(*moved)


def test_nothing_is_lost_over_several_restarts_and_torn_lines(tmp_path):
    with open_workdir(tmp_path, get_config()) as home:
        assert continue_from(home, 3) == 0  # no file yet
        home.metrics.write_text(lines(1, 2, 3) + '{"step": 4, "rew')
        continue_from(home, 2)
        home.metrics.write_text(lines(1, 2) + lines(3, 4))
        continue_from(home, 3)
        assert home.metrics.read_text() == lines(1, 2, 3)
        discarded = home.discarded.read_text()
    assert discarded == lines(3) + '{"step": 4, "rew\n' + lines(4)


def test_what_is_there_because_the_run_ended_moves_when_it_goes_on(tmp_path):
    nan = float("nan")
    own, end = {"reward": 0.5, "loss": nan}, {"heldout": 3, "evaluation": nan}
    log = configured({"log.tensorboard": False}).log
    with open_workdir(tmp_path, get_config()) as home:
        with Metrics(home, log) as metrics:
            metrics.write(1, own)
        alone = home.metrics.read_bytes()
        home.metrics.unlink()
        with Metrics(home, log) as metrics:
            metrics.write(1, own | end | {"only_at_end": tuple(end)})
        ended = json.loads(home.metrics.read_text())
        assert ended["heldout"] == 3 and ended["only_at_end"] == [*end]
        assert continue_from(home, 1) == 1
        assert home.metrics.read_bytes() == alone
        lost = json.loads(home.discarded.read_text())
        assert lost == {"step": 1, "heldout": 3, "evaluation": None}
        assert continue_from(home, 1) == 0  # once
