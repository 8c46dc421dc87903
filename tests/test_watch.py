"""Who may call process 0, and with which status the others follow one that ends."""

import json
import socket
import threading

import pytest

from ddrl_jax import watch
from ddrl_jax.errors import EXIT_AGAIN, EXIT_ERROR, TryAgain, UserError
from ddrl_jax.watch import Watch

TOKEN = "0123456789abcdef"


def tcp() -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        return server.accept()[0], theirs


def welcomed(said: bytes, close: bool = False):
    """Process 0 takes a call that begins so: (its calls, the caller's end)."""
    zero = Watch.__new__(Watch)  # without the service that Watch() asks
    zero._names = {}
    ours, theirs = tcp()
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
        pytest.param(b"[" * 4000 + b"\n", id="nested"),
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


# ---- with which status


def connected():
    """Process 1 of two, and the other end of its connection."""
    one = Watch.__new__(Watch)
    ours, theirs = tcp()
    one._index, one._count, one._names = 1, 2, {ours: "process 0 at a"}
    one._left, one._partial, one._ending = set(), {}, threading.Lock()
    return one, ours, theirs


PARTS = {"got": "a", "wanted": "b", "way_out": "c"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("a mistake", **PARTS), EXIT_ERROR),
        (TryAgain("nobody came", **PARTS), EXIT_AGAIN),
        (ValueError("a bug"), EXIT_AGAIN),
        (KeyboardInterrupt(), EXIT_AGAIN),
    ],
)
def test_a_mistake_is_the_whole_runs_and_an_exception_is_not(
    error, status, monkeypatch
):
    monkeypatch.setattr(watch, "ECHO", 0.0)
    one, _, theirs = connected()
    one.fail(error)
    said = json.loads(theirs.recv(4096))
    assert said["status"] == status and "process 1 on" in said["stop"]


@pytest.mark.parametrize(
    ("said", "status", "way_out"),
    [
        ({"stop": "why", "status": 2}, EXIT_ERROR, "see what that process says"),
        ({"stop": "why", "status": 75}, EXIT_AGAIN, "with the same command"),
        (None, EXIT_AGAIN, "with the same command"),
    ],
)
def test_who_hears_of_an_end_ends_with_its_status(
    said, status, way_out, monkeypatch, capfd
):
    def ended(status):
        raise SystemExit(status)

    monkeypatch.setattr(watch.os, "_exit", ended)
    one, ours, theirs = connected()
    if said:
        theirs.sendall(json.dumps(said).encode() + b"\n")
    theirs.close()
    with pytest.raises(SystemExit) as found:
        one._heard(ours)
    assert found.value.code == status
    assert way_out in capfd.readouterr().err
