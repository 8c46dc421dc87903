"""Who may call process 0, and what a call that is none of ours does: nothing."""

import json
import socket

import pytest

from ddrl_jax import watch
from ddrl_jax.watch import Watch

TOKEN = "0123456789abcdef"


def welcomed(said: bytes, close: bool = False):
    """Process 0 takes a call that begins so: (its calls, the caller's end)."""
    zero = Watch.__new__(Watch)  # without the service that Watch() asks
    zero._names = {}
    ours, theirs = socket.socketpair()
    theirs.sendall(said)
    if close:
        theirs.shutdown(socket.SHUT_WR)
    zero._welcome(ours, TOKEN)
    return zero._names, theirs


def test_a_process_of_ours_is_taken_in_and_its_next_words_are_kept():
    hello = json.dumps([TOKEN, "process 1 on b"]).encode() + b"\n"
    calls, theirs = welcomed(hello + b'{"stop": "why"}\n')
    ((call, name),) = calls.items()
    assert name == "process 1 on b"
    assert call.recv(99) == b'{"stop": "why"}\n'
    theirs.close()
    call.close()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xfe\n",
        b"{}\n",
        b"7\n",
        b'["another token", "process 1"]\n',
        b"x" * 5000,
    ],
)
def test_a_stranger_is_hung_up_on(said):
    calls, theirs = welcomed(said)
    assert not calls
    theirs.close()


def test_who_says_nothing_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(watch, "HELLO", 0.05)
    calls, theirs = welcomed(b"")
    assert not calls
    assert theirs.recv(1) == b""  # closed at the other end
    theirs.close()
    assert not welcomed(b"", close=True)[0]
