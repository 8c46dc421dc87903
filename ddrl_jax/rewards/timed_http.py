"""HTTP of which every request ends in time, and what it says about time.

A time limit of urllib is one between two bytes: a server that drips holds its client
for as long as it drips. Here it is one of the whole answer: status, headers and body.
"""

import datetime
import email.utils
import http.client
import io
import re
import socket
import time
import urllib.request
from functools import partial
from typing import Any


def timed_opener() -> urllib.request.OpenerDirector:
    """Returns an opener whose `timeout` covers a request until its body is read.

    It starts when a connection is opened; reading from the answer raises TimeoutError
    after it. Only finding and reaching the host may take longer: the resolver has its
    own limits, and each address of a name is tried for `timeout`. No redirect is
    followed.
    """
    return urllib.request.build_opener(_Http(), _Https(), _NoRedirects())


def asked_wait(header: str) -> float:
    """Returns the seconds that a Retry-After asks for (RFC 9110, section 10.2.3).

    Args:
      header: a number of seconds, also one with a fraction, or a date. Anything else,
        a negative number and a date that has passed ask for nothing: 0.
    """
    text = header.strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):  # "²" is a digit too, for str.isdigit
        return float(text)
    try:
        until = email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return 0.0
    if until.tzinfo is None:  # "-0000": the time is UTC, the place is not told
        until = until.replace(tzinfo=datetime.UTC)
    return max(0.0, (until - datetime.datetime.now(datetime.UTC)).total_seconds())


class _Http(urllib.request.HTTPHandler):
    """http:// over connections that end."""

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _Https(urllib.request.HTTPSHandler):
    """https:// over connections that end."""

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another server: it is a failure instead."""

    def redirect_request(self, *args: Any, **keywords: Any) -> None:
        """Follows nothing."""
        return None


class _Connection(http.client.HTTPConnection):
    """A connection for one request, of which all is over `timeout` seconds from now."""

    sock: Any  # None until it is connected
    response_class: Any

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        self._end = time.monotonic() + keywords["timeout"]
        self.response_class = partial(_Response, end=self._end)

    def send(self, data: Any) -> None:
        """Sends within the time that is left."""
        if not self.sock:
            self.connect()
        self.sock.settimeout(_left(self._end))
        super().send(data)


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    """The same over TLS."""


class _Response(http.client.HTTPResponse):
    """An answer that is read until `end`, its status and headers included."""

    def __init__(self, sock: socket.socket, *args: Any, end: float, **keywords: Any):
        super().__init__(sock, *args, **keywords)
        self.fp = io.BufferedReader(_Stream(sock, self.fp.detach(), end))


class _Stream(io.RawIOBase):
    """What a socket receives; each wait is for the rest of the time only."""

    def __init__(self, sock: socket.socket, raw: Any, end: float):
        self._sock, self._raw, self._end = sock, raw, end

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads what has arrived, or waits for the next bytes until the end."""
        self._sock.settimeout(_left(self._end))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        """Closes the connection, of which this is the last part that is open."""
        self._raw.close()
        super().close()


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
