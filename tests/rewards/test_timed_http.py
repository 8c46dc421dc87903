"""Time in HTTP: how long a server asks to wait."""

import datetime
import email.utils
import math

import pytest

from ddrl_jax.rewards.timed_http import asked_wait


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        (" 1.5 ", 1.5),
        ("9" * 400, math.inf),
        ("²", 0.0),
        ("٣", 0.0),
        ("-5", 0.0),
        ("nan", 0.0),
        ("1e3", 0.0),
        ("soon", 0.0),
        ("", 0.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
        ("Sun, 06 Nov 99999 08:49:37 GMT", 0.0),
        ("Sun, 06 Nov 1994 08:49:37 +99999999999999999999", 0.0),
        ("Sun, 06 Nov 1994 08:49:37 -0000", 0.0),
    ],
)
def test_the_wait_that_a_server_asks_for(header, seconds):
    assert asked_wait(header) == seconds


def test_a_wait_may_be_a_date():
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    assert 3500 < asked_wait(email.utils.format_datetime(later, usegmt=True)) <= 3600
    assert 3500 < asked_wait(email.utils.format_datetime(later)[:-5] + "-0000") <= 3600
