"""The client of a vision-language model: every way an endpoint can fail it."""

import contextlib
import socket
import threading
import time

import numpy as np
import pytest
from vlm_server import after, dripping, picture_of, question_of, said, serving

from ddrl_jax.errors import UserError
from ddrl_jax.rewards import vlm
from ddrl_jax.rewards.endpoint import Endpoint
from ddrl_jax.rewards.vlm import Refused, VlmClient

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
PICTURES = np.broadcast_to(COLOURS[:, None, None], (3, 16, 16, 3)).copy()
HTML = "<html><body>502 Bad Gateway</body></html>"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def client(url, **settings):
    return VlmClient(
        Endpoint(
            url, "judge", **{"timeout": 5.0, "backoff": 0.01, "retries": 2, **settings}
        )
    )


def failing(reply, **settings):
    """Asks one question that never gets an answer; returns counters and Seen."""
    with serving(reply) as (url, seen):
        asker = client(url, **settings)
        assert asker.ask_all(PICTURES[:1], [["?"]]) == [[None]]
    counters = asker.counters()
    assert counters["failures"] == 1 and counters["requests"] == len(seen.bodies)
    assert asker.last_failure()
    return counters, seen


def colour(body, nth):
    picture, _ = picture_of(body)
    name = ("red", "green", "blue")[int(picture.mean((0, 1)).argmax())]
    return said(f" {question_of(body)}: {name}\n")


def test_answers_come_back_in_their_places():
    with serving(colour) as (url, _):
        asker = client(url)
        found = asker.ask_all(PICTURES, [["a", "b"], [], ["c"]])
    assert found == [["a: red", "b: red"], [], ["c: blue"]]
    assert asker.counters() == {"requests": 3, "retries": 0, "failures": 0}
    assert asker.last_failure() == ""


def test_a_request_is_the_one_of_ddpo(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-1234\n")
    with serving(colour) as (url, seen):
        client(url + "/", api_key_env="JUDGE_KEY").ask_all(PICTURES[:1], [["what?"]])
    (body,), (headers,) = seen.bodies, seen.headers
    assert seen.paths == ["/v1/chat/completions"]
    assert headers["Authorization"] == "Bearer sk-1234"
    assert body["model"] == "judge" and body["temperature"] == 0
    assert body["max_tokens"] == 64
    pixels, picture = picture_of(body)
    assert picture.format == "JPEG" and pixels.shape == (16, 16, 3)
    # libjpeg scales its table by 200 - 2 q = 40 %: the first entry, 16, becomes 6
    assert picture.quantization[0][0] == 6


def test_without_a_configured_key_none_is_sent():
    with serving(colour) as (url, seen):
        client(url).ask_all(PICTURES[:1], [["?"]])
    assert "Authorization" not in seen.headers[0]


def test_fields_can_be_replaced_and_removed():
    body = {"max_tokens": None, "max_completion_tokens": 9}
    with serving(colour) as (url, seen):
        client(url, body=body).ask_all(PICTURES[:1], [["?"]])
    assert "max_tokens" not in seen.bodies[0]
    assert seen.bodies[0]["max_completion_tokens"] == 9


def test_no_more_requests_at_once_than_allowed():
    with serving(after(0.05, "ok")) as (url, seen):
        asker = client(url, threads=3)
        callers = [
            threading.Thread(target=asker.ask_all, args=(PICTURES, [["a"] * 4] * 3))
            for _ in range(2)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert len(seen.bodies) == 24 and seen.most == 3


def test_a_500_is_asked_again():
    with serving(lambda b, n: (500, "oops") if n < 2 else said("cat")) as (url, _):
        asker = client(url)
        assert asker.ask_all(PICTURES[:1], [["?"]]) == [["cat"]]
    assert asker.counters() == {"requests": 3, "retries": 2, "failures": 0}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_stays_broken_gives_no_answer(status):
    counters, _ = failing(lambda b, n: (status, "oops"))
    assert counters[f"failures/status_{status}"] == 1
    assert counters["requests"] == 3 and counters["retries"] == 2


def test_a_slow_server_is_given_up_on():
    start = time.monotonic()
    counters, _ = failing(after(3.0), timeout=0.1, retries=1)
    assert counters["failures/timeout"] == 1 and counters["retries"] == 1
    assert time.monotonic() - start < 2


OK, LONG = b"HTTP/1.1 200 OK\r\n", b"Content-Length: 100000\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "drop", "kind"),
    [
        (OK + LONG, b" ", "timeout"),
        (OK + b"Name: ", b"x", "timeout"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", "timeout"),
        (b"HTTP/1.1 500 Oops\r\n" + LONG, b" ", "status_500"),
    ],
)
def test_a_server_that_drips_is_given_up_on(head, drop, kind):
    """Each byte comes in time, the whole never: neither thread nor slot waits on."""
    start = time.monotonic()
    with dripping(head, drop) as (url, callers):
        asker = client(url, timeout=1.0, retries=0, threads=1)
        assert asker.ask_all(PICTURES[:2], [["?"], ["?"]]) == [[None], [None]]
        assert time.monotonic() - start < 12
        assert asker.counters()[f"failures/{kind}"] == 2
        assert len(callers) == 2 and all(ended.wait(5) for ended in callers)


def test_a_refused_connection_is_tried_again_and_counted():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    asker = client(f"http://127.0.0.1:{port}/v1")
    assert asker.ask_all(PICTURES[:2], [["?"], ["?"]]) == [[None], [None]]
    counters = asker.counters()
    assert counters["failures/connection"] == 2 and counters["retries"] == 4
    assert "refused" in asker.last_failure()


def cut(head, body):
    """A server that ends its connection after this much of an answer."""

    def answer(connection):
        with connection:
            connection.recv(1 << 20)
            connection.sendall(OK + head + b"\r\n\r\n" + body)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):  # the rest of the question
                pass

    def accept(listener):
        with contextlib.suppress(OSError):
            while True:
                answer(listener.accept()[0])

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=accept, args=(listener,), daemon=True).start()
    return listener


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"Content-Length: 100", b'{"choices": ['),
        (b"Content-Length: 100", b""),
        (b"Transfer-Encoding: chunked", b'40\r\n{"choices": ['),
    ],
)
def test_an_answer_cut_short_is_a_lost_connection(head, body):
    with cut(head, body) as listener:
        asker = client(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        assert asker.ask_all(PICTURES[:1], [["?"]]) == [[None]]
        listener.shutdown(socket.SHUT_RDWR)  # wakes accept
    assert asker.counters()["failures/connection"] == 1
    assert asker.counters()["retries"] == 2


@pytest.mark.parametrize(
    ("kind", "reply"),
    [
        ("not_json", HTML),
        ("not_json", ""),
        ("not_json", "[" * 100_000),
        ("no_choices", {"choices": []}),
        ("no_choices", {"error": {"message": "overloaded"}}),
        ("no_choices", "[1, 2]"),
        ("no_choices", "null"),
        ("no_choices", {"choices": [{"message": None}]}),
        ("no_choices", said(5)[1]),
        ("no_choices", said({"text": "a cat"})[1]),
    ],
)
def test_nonsense_is_no_answer(kind, reply):
    counters, _ = failing(lambda b, n: (200, reply))
    assert counters[f"failures/{kind}"] == 1
    assert counters["requests"] == 1  # asked again, temperature 0 says the same


@pytest.mark.parametrize("content", ["  \n", None, [{"type": "image_url"}]])
def test_an_empty_answer_is_asked_for_again_and_then_none(content):
    counters, _ = failing(lambda b, n: said(content))
    assert counters["failures/empty"] == 1
    assert counters["requests"] == 3 and counters["retries"] == 2
    with serving(lambda b, n: said("cat" if n else content)) as (url, _):
        assert client(url).ask_all(PICTURES[:1], [["?"]]) == [["cat"]]


def test_content_in_parts_is_an_answer():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "cat"}]
    with serving(lambda b, n: said(parts)) as (url, _):
        assert client(url).ask_all(PICTURES[:1], [["?"]]) == [["a cat"]]


def test_an_endless_answer_is_no_answer(monkeypatch):
    monkeypatch.setattr(vlm, "LARGEST_BODY", 1000)
    counters, _ = failing(lambda b, n: said("word " * 1000))
    assert counters["failures/not_json"] == 1


def test_a_redirect_is_not_followed(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-1234")
    with serving(colour) as (other, seen_there):
        counters, _ = failing(
            lambda b, n: (302, "", [("Location", other + "/chat/completions")]),
            api_key_env="JUDGE_KEY",
        )
    assert counters["failures/status_302"] == 1 and not seen_there.bodies


def test_one_failure_leaves_the_other_answers():
    def reply(body, nth):
        return (400, "no") if question_of(body) == "b" else said("yes")

    with serving(reply) as (url, _):
        asker = client(url)
        found = asker.ask_all(PICTURES, [["a", "b"], ["a"], ["b"]])
    assert found == [["yes", None], ["yes"], [None]]
    assert asker.counters()["failures/status_400"] == 2


def test_the_waits_double_with_jitter(monkeypatch):
    waits = []

    class Recorded(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return False

    monkeypatch.setattr(vlm.threading, "Event", Recorded)
    asker = VlmClient(Endpoint("http://127.0.0.1:9", "m", backoff=1.0, retries=6))
    monkeypatch.setattr(
        asker, "_post", lambda *_: (_ for _ in ()).throw(vlm.Failure("x", "", True))
    )
    stop = Recorded()
    with pytest.raises(vlm.Failure):
        asker._persist("", "", time.monotonic() + 1e4, stop)
    longest = np.minimum(2.0 ** np.arange(6), 30.0)
    assert np.all(waits <= longest) and np.all(waits >= longest / 2)


def test_a_server_may_ask_for_a_longer_wait():
    def reply(body, nth):
        return (429, "", [("Retry-After", "1")]) if nth == 0 else said("ok")

    with serving(reply) as (url, _):
        start = time.monotonic()
        assert client(url).ask_all(PICTURES[:1], [["?"]]) == [["ok"]]
    assert time.monotonic() - start >= 1


def test_a_batch_ends_with_its_budget():
    start = time.monotonic()
    with serving(after(0.2, "ok")) as (url, _):
        asker = client(url, threads=1, budget=0.5)
        found = asker.ask_all(PICTURES, [["?"] * 10] * 3)
    answered = sum(answer == "ok" for row in found for answer in row)
    assert 1 <= answered <= 3 and time.monotonic() - start < 2
    assert asker.counters()["failures"] == 30 - answered
    assert asker.counters()["failures/budget"] >= 26


@pytest.mark.parametrize("asked", ["60", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_wait_beyond_the_budget_is_not_begun(asked):
    start = time.monotonic()
    reply = (503, "", [("Retry-After", asked)])
    counters, _ = failing(lambda b, n: reply, budget=2.0)
    assert counters["failures/status_503"] == 1 and counters["retries"] == 0
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("asked", ["\u00b2", "-5", "soon"])
def test_a_wait_that_is_none_is_the_clients_own(asked):
    counters, _ = failing(lambda b, n: (429, "", [("Retry-After", asked)]))
    assert counters["failures/status_429"] == 1 and counters["retries"] == 2


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_batch_at_once(monkeypatch, status):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with serving(lambda b, n: (status, "no such key: sk-secret")) as (url, seen):
        asker = client(url, threads=2, api_key_env="JUDGE_KEY")
        with pytest.raises(Refused) as error:
            asker.ask_all(PICTURES, [["?"] * 10] * 3)
    assert len(seen.bodies) <= 4 and error.value.fatal
    assert f"HTTP {status}" in error.value.got and "$JUDGE_KEY" in error.value.what
    assert "export JUDGE_KEY=" in error.value.way_out
    assert "sk-secret" not in str(error.value)


def test_pictures_of_another_kind_are_refused():
    with pytest.raises(UserError, match="can not be shown"):
        client("http://127.0.0.1:9").ask_all(PICTURES.astype(np.float32), [["?"]] * 3)
