"""Time in HTTP: how long an answer may take, how long a server asks to wait."""

import datetime
import email.utils
import math
import time
import urllib.error

import pytest
from vlm_server import dripping

from ddrl_jax.rewards.timed_http import asked_wait, timed_opener

RECORD = b"\x16\x03\x03\x40\x00"  # of TLS, with 16,384 bytes to come


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def test_a_handshake_that_drips_ends_in_time():
    start = time.monotonic()
    with dripping(RECORD, b"\x02") as (url, callers):
        with pytest.raises(urllib.error.URLError) as error:
            timed_opener().open(url.replace("http:", "https:"), timeout=1.0)
        assert isinstance(error.value.reason, TimeoutError)
        assert time.monotonic() - start < 6 and callers[0].wait(5)


def test_a_proxy_that_drips_ends_in_time(monkeypatch):
    monkeypatch.delenv("no_proxy")
    start = time.monotonic()
    with dripping(b"HTTP/1.1 200 OK\r\nName: ", b"x") as (url, callers):
        monkeypatch.setenv("https_proxy", url.removesuffix("/v1"))
        with pytest.raises(urllib.error.URLError) as error:
            timed_opener().open("https://host.invalid/v1", timeout=1.0)
        assert isinstance(error.value.reason, TimeoutError)
        assert time.monotonic() - start < 6 and callers[0].wait(5)


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
