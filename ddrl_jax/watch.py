"""Each process of a run learns at once that another one has ended.

A connection to process 0 is open for as long as a process lives: the kernel closes it
when the process is killed, long before a heartbeat is missed, and whoever fails says
why. Where a machine or the way to it is gone, nobody closes it: the kernel asks, and
gives it up. jax.distributed would abort the others with a stack of C++ instead.
"""

import errno
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import Any, NamedTuple

from ddrl_jax.errors import EXIT_AGAIN, TryAgain, UserError
from ddrl_jax.text import parse_json

MEETING = "ddrl_jax/watch"  # where process 0 says how it is reached
GONE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
END = "ddrl_jax/end"  # the barrier after which connections may close
PATIENCE = 60  # seconds until all are connected
HELLO = 5.0  # seconds in which whoever calls has to say who it is
ECHO = 3.0  # seconds in which the cause of an error of ours may show in another process
FAREWELL = 3.0  # seconds that process 0 waits for the others to have read
# Seconds after which the kernel asks for a sign of life, and again; of 3 without an
# answer, or 20 s that nothing which was sent arrives, it gives up.
KEEPALIVE = {
    "TCP_KEEPIDLE": 5,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 20_000,
}
FOREVER_MS = 30 * 24 * 3600 * 1000


class Rank(NamedTuple):
    """Which process of how many."""

    index: int
    count: int


class Watch:
    """The connections of one process, and the thread that reads them.

    Args:
      client: of jax.distributed.
      coordinator: its HOST:PORT; process 0 is reached at this host.
      rank: of this process.
    """

    def __init__(self, client: Any, coordinator: str, rank: Rank):
        self._client = client
        self._index, self._count = rank
        self._names: dict[socket.socket, str] = {}
        self._left: set[socket.socket] = set()  # those that have said goodbye
        self._partial: dict[socket.socket, bytes] = {}
        self._ending = threading.Lock()
        if self._index == 0:
            self._receive(coordinator)
        else:
            self._connect()
        threading.Thread(target=self._read, name="watch", daemon=True).start()

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process ends, and why."""
        if not isinstance(error, UserError):
            # Likely an operation that broke because another process is gone: then the
            # thread knows its name in a moment, and ends this process.
            time.sleep(ECHO)
        self._ending.acquire()  # for good: the end of the others is no news any more
        what = getattr(error, "what", None) or f"{type(error).__name__}: {error}"
        status = getattr(error, "status", EXIT_AGAIN)  # a mistake is the whole run's
        self._tell_and_wait(f"{self._me()}: {what[:1000]}", status)

    def finish(self) -> None:
        """Waits for all processes to be done; then nobody is missed any more."""
        self._client.wait_at_barrier(END, FOREVER_MS)
        self._send({"bye": True})

    def _me(self) -> str:
        return f"process {self._index} on {socket.gethostname()} (pid {os.getpid()})"

    def _receive(self, coordinator: str) -> None:
        """Process 0: takes the calls of all others."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        server.settimeout(PATIENCE)
        token, host = secrets.token_hex(8), coordinator.rsplit(":", 1)[0]
        meeting = [host.strip("[]"), server.getsockname()[1], token]
        self._client.key_value_set(MEETING, json.dumps(meeting))
        with server:
            while len(self._names) < self._count - 1:
                self._welcome(server.accept()[0], token)

    def _welcome(self, call: socket.socket, token: str) -> None:
        """Takes a call in, if it is one of ours: anybody can find an open port."""
        call.settimeout(HELLO)
        try:
            key, name = parse_json(call.makefile("rb", 0).readline(4096))
        except (OSError, ValueError, TypeError):
            key, name = "", ""
        if key != token:
            call.close()
            return
        self._keep(call, name)

    def _connect(self) -> None:
        """The others: call process 0."""
        found = self._client.blocking_key_value_get(MEETING, 1000 * PATIENCE)
        host, port, token = parse_json(found)
        call = socket.create_connection((host, port), timeout=PATIENCE)
        self._keep(call, f"process 0 at {host}")
        call.sendall(json.dumps([token, self._me()]).encode() + b"\n")

    def _keep(self, call: socket.socket, name: str) -> None:
        call.settimeout(None)
        call.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):  # Linux has all of them
                call.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._names[call] = name

    def _send(self, message: dict[str, Any]) -> None:
        for call in self._names:
            try:
                call.sendall(json.dumps(message).encode() + b"\n")
            except OSError:  # it has ended; the reading thread sees that as well
                continue

    def _read(self) -> None:
        ready = selectors.DefaultSelector()
        for call in self._names:
            ready.register(call, selectors.EVENT_READ)
        while ready.get_map():
            for key, _ in ready.select():
                call = key.fileobj
                assert isinstance(call, socket.socket)
                if not self._heard(call):
                    ready.unregister(call)

    def _heard(self, call: socket.socket) -> bool:
        """Reads what a process says; False when it has nothing more to say."""
        how = "ended without a word, as when killed"
        try:
            said = call.recv(65536)
        except OSError as error:
            said = b""
            if error.errno in GONE:
                how = "is not reached any more: its machine, or the network"
        *lines, self._partial[call] = (self._partial.get(call, b"") + said).split(b"\n")
        for line in lines:
            message = parse_json(line)
            if "stop" in message:
                self._end(message["stop"], message["status"])
            if "bye" in message:
                self._left.add(call)
        if not said and call not in self._left:
            self._end(f"{self._names[call]} {how}", EXIT_AGAIN)
        return bool(said)

    def _end(self, cause: str, status: int) -> None:
        """Ends this process because of another one, and tells those that follow."""
        self._ending.acquire()
        error = TryAgain(
            "the run has ended because one of its processes has",
            got=cause,
            wanted=f"all {self._count} processes to the end",
            way_out="start all of them again with the same command: the run goes on "
            "from its last checkpoint"
            if status == EXIT_AGAIN
            else "see what that process says, and start all of them again",
        )
        # os.write: it has to be out before anything else of this process ends it.
        os.write(2, f"ddrl_jax: error: {error}\n".encode())
        self._tell_and_wait(cause, status)
        os._exit(status)

    def _tell_and_wait(self, cause: str, status: int) -> None:
        """Says why; process 0, whose end ends the others, lets them read it first."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._send({"stop": cause, "status": status})
        limit = time.monotonic() + FAREWELL
        calls = [c for c in self._names if c not in self._left] * (self._index == 0)
        for call in calls:
            call.settimeout(max(limit - time.monotonic(), 0.01))
            try:
                while call.recv(65536):
                    pass
            except OSError:  # it is gone, or slower than we wait
                continue
