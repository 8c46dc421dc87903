"""The reward pool: order, parts, and every way a reward can fail."""

import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.errors import UserError
from ddrl_jax.rewards.pool import RewardPool

PICTURES = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones(
    (1, 2, 2, 3), np.uint8
)
PROMPTS = tuple("abcdef")


def _number(images, prompts):
    """The number painted on each picture; later pictures take less time."""
    time.sleep(0.02 * (6 - int(images[0, 0, 0, 0])) / 6)
    assert len(images) == len(prompts)
    return images[:, 0, 0, 0].astype(np.float32)


class Splittable:
    splittable = True

    def __init__(self):
        self.sizes, self.threads = [], set()
        self.meet = threading.Barrier(3, timeout=20)

    def __call__(self, images, prompts):
        self.meet.wait()  # passes only if three parts are under way at once
        self.sizes.append(len(images))
        self.threads.add(threading.get_ident())
        return images[:, 0, 0, 0].astype(np.float32)


def _scores(reward, on_failure="error", timeout=30.0, parts=((0, 6),)):
    with RewardPool({"r": reward}, 2, timeout, on_failure) as pool:
        handles = [pool.submit(PICTURES[a:b], PROMPTS[a:b]) for a, b in parts]
        return pool.collect(handles), pool.failures


def test_scores_come_in_the_order_of_submission():
    scores, _ = _scores(_number, parts=((0, 1), (1, 2), (2, 5), (5, 6)))
    np.testing.assert_array_equal(scores.values["r"], np.arange(6))
    assert scores.values["r"].dtype == np.float32 and scores.valid.all()


def test_handles_can_be_collected_in_another_order():
    with RewardPool({"r": _number}, 2) as pool:
        first = pool.submit(PICTURES[:2], PROMPTS[:2])
        second = pool.submit(PICTURES[2:], PROMPTS[2:])
        scores = pool.collect([second, first])
    np.testing.assert_array_equal(scores.values["r"], [2, 3, 4, 5, 0, 1])


def test_a_splittable_batch_is_spread_over_the_threads():
    reward = Splittable()
    with RewardPool({"r": reward}, threads=3) as pool:
        scores = pool.collect([pool.submit(PICTURES, PROMPTS)])
    assert sorted(reward.sizes) == [2, 2, 2] and len(reward.threads) == 3
    np.testing.assert_array_equal(scores.values["r"], np.arange(6))


def test_prompts_stay_with_their_pictures():
    def reward(images, prompts):
        numbers = [ord(p) - ord("a") for p in prompts]
        return (images[:, 0, 0, 0] == numbers).astype(float)

    reward.splittable = True
    scores, _ = _scores(reward, parts=((0, 5), (5, 6)))
    assert scores.values["r"].all()


def test_a_device_array_is_fetched_by_a_thread():
    seen = []

    def reward(images, prompts):
        seen.append((type(images), threading.current_thread().name))
        return images[:, 0, 0, 0]

    pictures = jnp.asarray(PICTURES)
    pictures.copy_to_host_async()
    with RewardPool({"r": reward}, 1) as pool:
        scores = pool.collect([pool.submit(pictures, PROMPTS)])
    assert seen == [(np.ndarray, "reward")]
    np.testing.assert_array_equal(scores.values["r"], np.arange(6))


def test_submission_does_not_wait_for_the_reward():
    gate = threading.Event()

    def reward(images, prompts):
        assert gate.wait(20)
        return np.zeros(len(images))

    with RewardPool({"r": reward}, 1) as pool:
        handle = pool.submit(PICTURES, PROMPTS)
        assert not handle.calls[0].done.is_set()
        gate.set()
        assert pool.collect([handle]).valid.all()


def test_more_submissions_than_the_queue_holds():
    with RewardPool({"r": _number}, 1) as pool:
        handles = [pool.submit(PICTURES[:1], ("a",)) for _ in range(20)]
        assert len(pool.collect(handles).valid) == 20


def test_without_rewards_every_sample_is_valid():
    with RewardPool({}, 2) as pool:
        scores = pool.collect([pool.submit(PICTURES, PROMPTS)])
        assert scores.values == {} and scores.valid.tolist() == [True] * 6
        assert len(pool.collect([]).valid) == 0


def _raises(images, prompts):
    if 4 in images:
        raise ConnectionError("endpoint is down")
    return np.zeros(len(images))


def _user_error(images, prompts):
    raise UserError("bad prompt", got="'zebr'", wanted="near: zebra", way_out="spell")


def _kills_its_thread(images, prompts):
    raise SystemExit(3)


def _nan(images, prompts):
    values = images[:, 0, 0, 0].astype(np.float64)
    values[values == 4] = np.nan
    return values


def _overflow(images, prompts):
    return np.where(images[:, 0, 0, 0] == 4, 1e300, 1.0)


FAILURES = {  # reward: (failed samples when given as 0-3 and 3-6, words in the error)
    "raises": (_raises, [3, 4, 5], "ConnectionError: endpoint is down"),
    "user_error": (_user_error, [0, 1, 2, 3, 4, 5], "'zebr'"),
    "exits": (_kills_its_thread, [0, 1, 2, 3, 4, 5], "SystemExit"),
    "nan": (_nan, [4], "nan"),
    "inf in float32": (_overflow, [4], "1e+300"),
    "column": (lambda x, p: np.zeros((len(x), 1)), [0, 1, 2, 3, 4, 5], "[3, 1]"),
    "too few": (lambda x, p: np.zeros(2), [0, 1, 2, 3, 4, 5], "[2]"),
    "scalar": (lambda x, p: 1.0, [0, 1, 2, 3, 4, 5], "[]"),
    "None": (lambda x, p: None, [0, 1, 2, 3, 4, 5], "[]"),
    "text": (lambda x, p: ["good"] * len(x), [0, 1, 2, 3, 4, 5], "<U4"),
    "complex": (lambda x, p: np.zeros(3) * 1j, [0, 1, 2, 3, 4, 5], "complex128"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_error(name):
    reward, samples, words = FAILURES[name]
    with pytest.raises(UserError) as error:
        _scores(reward, parts=((0, 3), (3, 6)))
    message = str(error.value)
    first = [i for i in samples if i < 3] or samples
    assert f"'r' failed on samples {first}" in message
    assert words in error.value.got
    assert error.value.wanted and error.value.way_out


def test_a_failure_is_named_by_the_numbers_of_its_samples():
    """Of several processes each judges some rows of the epoch."""
    numbers, parts = np.array([4, 5, 6, 12, 13, 14]), ((0, 3), (3, 6))
    with RewardPool({"r": _nan}, 2) as pool:
        handles = [pool.submit(PICTURES[a:b], PROMPTS[a:b]) for a, b in parts]
        with pytest.raises(UserError, match=r"failed on samples \[13\] \(1 in all"):
            pool.collect(handles, numbers)


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_can_be_masked(name):
    reward, samples, _ = FAILURES[name]
    scores, failures = _scores(reward, "mask", parts=((0, 3), (3, 6)))
    assert np.flatnonzero(~scores.valid).tolist() == samples
    assert np.isnan(scores.values["r"][samples]).all()  # never a made-up number
    assert np.isfinite(scores.values["r"][scores.valid]).all()
    assert failures == {"r": len(samples)}


@pytest.mark.parametrize("name", FAILURES)
def test_a_masked_failure_says_why(name, caplog):
    reward, samples, words = FAILURES[name]
    _scores(reward, "mask", parts=((0, 3), (3, 6)))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == len({sample // 3 for sample in samples})
    assert all("'r' has no score for" in line and words in line for line in told)


def test_one_bad_reward_masks_the_sample_for_all():
    with RewardPool({"good": _number, "bad": _nan}, 2, 30.0, "mask") as pool:
        scores = pool.collect([pool.submit(PICTURES, PROMPTS)])
    assert scores.valid.tolist() == [True] * 4 + [False, True]
    np.testing.assert_array_equal(scores.values["good"], np.arange(6))


def _hangs_on_2(gate):
    def reward(images, prompts):
        if 2 in images:
            gate.wait(60)
        return images[:, 0, 0, 0]

    return reward


@pytest.mark.parametrize("on_failure", ["error", "mask"])
def test_a_reward_that_hangs_does_not_hold_the_others(on_failure):
    gate, parts = threading.Event(), [(i, i + 1) for i in range(6)]
    began = time.monotonic()
    pool = RewardPool({"r": _hangs_on_2(gate)}, 1, 0.3, on_failure)
    with pool:  # one thread: without a replacement 3, 4, 5 would never run
        handles = [pool.submit(PICTURES[a:b], PROMPTS[a:b]) for a, b in parts]
        if on_failure == "mask":
            scores = pool.collect(handles)
            assert scores.valid.tolist() == [True, True, False, True, True, True]
            assert pool.failures == {"r": 1}
        else:
            with pytest.raises(UserError, match=r"samples \[2\]") as error:
                pool.collect(handles)
            assert "0.3 s" in error.value.got and "timeout" in error.value.way_out
    assert time.monotonic() - began < 20
    gate.set()


def test_what_a_late_reward_brings_is_dropped():
    gate = threading.Event()
    with RewardPool({"r": _hangs_on_2(gate)}, 1, 0.2, "mask") as pool:
        handle = pool.submit(PICTURES[2:3], "c")
        scores = pool.collect([handle])
        gate.set()
        time.sleep(0.2)
        again = pool.collect([handle])
    assert np.isnan(scores.values["r"]).all() and np.isnan(again.values["r"]).all()


def test_waiting_for_pictures_does_not_count_as_the_rewards_time():
    class Slow:
        shape = PICTURES.shape

        def __array__(self, dtype=None, copy=None):
            time.sleep(0.6)
            return PICTURES

    with RewardPool({"r": _number}, 1, timeout=0.3) as pool:
        assert pool.collect([pool.submit(Slow(), PROMPTS)]).valid.all()


def test_pictures_that_fail_on_the_device_are_not_a_rewards_failure():
    class Broken:
        shape = PICTURES.shape

        def __array__(self, dtype=None, copy=None):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    down = pytest.raises(jax.errors.JaxRuntimeError, match="EXHAUSTED")
    with RewardPool({"r": _number}, 1, 30.0, "mask") as pool, down:
        pool.collect([pool.submit(Broken(), PROMPTS)])


def test_counts_that_differ_are_refused():
    refused = pytest.raises(ValueError, match="6 pictures for 2 prompts")
    with RewardPool({"r": _number}, 1) as pool, refused:
        pool.submit(PICTURES, PROMPTS[:2])


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"timeout": 0.0}, {"on_failure": "ignore"}]
)
def test_broken_options_are_refused(options):
    with pytest.raises(UserError, match="config.rewards"):
        RewardPool({"r": _number}, **options)


def test_a_closed_pool_says_so_instead_of_waiting():
    gate = threading.Event()
    pool = RewardPool({"r": _hangs_on_2(gate)}, 1, 0.2)
    running = pool.submit(PICTURES[2:3], "c")
    waiting = pool.submit(PICTURES[:1], "a")
    while running.calls[0].begun is None:
        time.sleep(0.01)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.collect([waiting])
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(PICTURES, PROMPTS)
    gate.set()


def test_a_reward_that_never_returns_does_not_keep_the_program_alive():
    program = """
import time
import numpy as np
from ddrl_jax.rewards.pool import RewardPool
pool = RewardPool({"r": lambda images, prompts: time.sleep(1000)}, 2)
pool.submit(np.zeros((2, 4, 4, 3), np.uint8), ["a", "b"])
raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=120)
    assert done.returncode == 7
