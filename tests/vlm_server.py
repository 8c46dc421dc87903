"""A vision-language model on this machine: an endpoint that answers as a test says."""

import base64
import contextlib
import io
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


def said(text):
    """A chat completion with this text: (status, body)."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


class Seen:
    """What the server was asked: JSON bodies, headers, and how many at once."""

    def __init__(self):
        self.bodies, self.headers, self.paths = [], [], []
        self.now = self.most = 0
        self.lock = threading.Lock()


def question_of(body):
    return body["messages"][0]["content"][1]["text"]


def picture_of(body):
    """The picture of a request as uint8 [h w 3], and its format."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    kind, data = url.split(";base64,")
    assert kind == "data:image/jpeg"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    return np.asarray(picture.convert("RGB")), picture


@contextlib.contextmanager
def serving(reply, models=("judge",)):
    """Serves `reply(body, nth) -> (status, dict | str[, headers])`; yields url, Seen.

    A dict is sent as JSON, a str as it is; nth counts the requests from 0.
    """
    seen = Seen()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.answer(200, {"data": [{"id": m} for m in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with seen.lock:
                nth = len(seen.bodies)
                seen.bodies.append(body)
                seen.headers.append(dict(self.headers))
                seen.paths.append(self.path)
                seen.now += 1
                seen.most = max(seen.most, seen.now)
            try:
                found = reply(body, nth)
            finally:
                with seen.lock:
                    seen.now -= 1
            self.answer(*found)

        def answer(self, status, body, headers=()):
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            with contextlib.suppress(OSError):  # the client may have given up
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def after(seconds, text="late"):
    """A reply that takes its time."""

    def reply(body, nth):
        time.sleep(seconds)
        return said(text)

    return reply


@contextlib.contextmanager
def dripping(head, drop, seconds=20.0):
    """A server that sends `head`, then a drop each 50 ms; yields url, and who called.

    The callers are threading.Events, set when their connection has ended.
    """
    callers = []

    def drip(connection, ended):
        until = time.monotonic() + seconds
        with connection, contextlib.suppress(OSError):
            connection.sendall(head)
            while time.monotonic() < until:
                time.sleep(0.05)
                connection.sendall(drop)
        ended.set()

    def accept(listener):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                callers.append(threading.Event())
                threading.Thread(
                    target=drip, args=(connection, callers[-1]), daemon=True
                ).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", callers
        listener.shutdown(socket.SHUT_RDWR)  # wakes accept
