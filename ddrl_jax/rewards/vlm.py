"""Asks a vision-language model about pictures, over any OpenAI-compatible endpoint.

Requests run on a bounded number of threads. One that fails is asked again where that
can help (429, 5xx, a broken connection, no answer in time, an empty one), with
exponential backoff and jitter; after that the answer is None and the failure is counted
by its kind. No answer is ever made up.
"""

import http.client
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from ddrl_jax.errors import UserError
from ddrl_jax.rewards.chat import (
    LARGEST_BODY,
    SHOWN,
    Failure,
    answer_of,
    checked_pictures,
    data_url,
    request_body,
)
from ddrl_jax.rewards.endpoint import Endpoint, api_key, chat_url, checked_endpoint
from ddrl_jax.rewards.timed_http import asked_wait, timed_opener
from ddrl_jax.text import parse_json

BLANK = 224  # pixels a side of the picture of the start-up check
LONGEST_WAIT = 30.0  # seconds between two tries, unless the server asks for more
REFUSED = (401, 403)


class Refused(UserError):
    """The endpoint does not accept the key: no later request can succeed either.

    Attributes:
      fatal: ends the run even where failed samples are left out.
    """

    fatal = True


class _Job(NamedTuple):
    """One question about one picture, and where its answer belongs."""

    image: int
    question: int
    picture: str
    text: str


class VlmClient:
    """A vision-language model behind an endpoint; safe to call from several threads.

    Args:
      endpoint: where it is and how patient to be.

    Raises:
      UserError: the endpoint can not be used like this, or the environment variable
        of its key is not set.
    """

    def __init__(self, endpoint: Endpoint):
        self.endpoint = checked_endpoint(endpoint)
        self._key = api_key(endpoint)
        self._opener = timed_opener()
        self._slots = threading.BoundedSemaphore(endpoint.threads)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._last = ""

    def counters(self) -> dict[str, int]:
        """Returns counts so far: requests, retries, failures and failures/KIND."""
        with self._lock:
            return {"requests": 0, "retries": 0, "failures": 0, **self._counts}

    def last_failure(self) -> str:
        """Describes the last answer that never came, "" if all did."""
        return self._last

    def why_missing(self) -> UserError | None:
        """Returns the last failure as a message of its own, None if there was none."""
        if not self._last:
            return None
        keys = "--config.rewards"
        return UserError(
            f"the endpoint {self.endpoint.base_url} gave no answer",
            got=self._last,
            wanted=f"an answer of {self.endpoint.model!r} to every question",
            way_out="see to the endpoint and start again; a slow one needs a larger"
            f" {keys}.vlm.timeout and {keys}.timeout, one that often fails a larger"
            f" {keys}.vlm.retries; {keys}.on_failure=mask leaves such samples out",
        )

    def ask_all(
        self,
        images: Shaped[np.ndarray, "*shape"],
        questions: Sequence[Sequence[str]],
    ) -> list[list[str | None]]:
        """Asks each picture its own questions.

        Args:
          images: uint8 [b h w 3].
          questions: those of each picture.

        Returns:
          The answers in the same order; None where there is none.

        Raises:
          UserError: the pictures are not uint8 [b h w 3], or the endpoint refuses the
            key; no further question is asked then.
        """
        answers: list[list[str | None]] = [[None] * len(q) for q in questions]
        jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        for i, (picture, texts) in enumerate(
            zip(map(data_url, checked_pictures(images)), questions, strict=True)
        ):
            for j, text in enumerate(texts):
                jobs.put(_Job(i, j, picture, text))
        deadline = time.monotonic() + self.endpoint.budget
        stop, fatal = threading.Event(), []

        def work() -> None:
            while not stop.is_set():
                try:
                    job = jobs.get_nowait()
                    answer = self._ask(job.picture, job.text, deadline, stop)
                except queue.Empty:
                    return
                except BaseException as e:  # must reach the caller, not die here
                    fatal.append(e)
                    return stop.set()
                answers[job.image][job.question] = answer

        # daemon: a server that never answers must not keep the program from exiting
        count = min(self.endpoint.threads, jobs.qsize())
        crew = [threading.Thread(target=work, daemon=True) for _ in range(count)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        if fatal:
            raise fatal[0]
        return answers

    def check_endpoint(self) -> None:
        """Asks one question about a blank picture, before anything is trained.

        An empty answer passes: some models say nothing about nothing.

        Raises:
          UserError: the endpoint is unreachable, refuses the key, does not know the
            model, or does not answer like an OpenAI-compatible server.
        """
        blank = data_url(np.full((BLANK, BLANK, 3), 255, np.uint8))
        deadline = time.monotonic() + self.endpoint.budget
        try:
            stop = threading.Event()
            self._persist(blank, "What is this?", deadline, stop, silence=True)
        except Failure as failure:
            if failure.kind != "empty":
                raise self._unusable(failure) from failure

    def _ask(
        self, picture: str, text: str, deadline: float, stop: threading.Event
    ) -> str | None:
        try:
            return self._persist(picture, text, deadline, stop)
        except Failure as failure:
            with self._lock:
                self._counts["failures"] += 1
                self._counts[f"failures/{failure.kind}"] += 1
                self._last = str(failure)
            return None

    def _persist(
        self,
        picture: str,
        text: str,
        deadline: float,
        stop: threading.Event,
        silence: bool = False,
    ) -> str:
        """Asks until there is an answer, the tries are used up or the time is.

        With `silence` an empty answer is one too, and not asked for again.
        """
        body = request_body(self.endpoint, picture, text)
        for attempt in range(self.endpoint.retries + 1):
            try:
                return answer_of(self._post(body, deadline))
            except Failure as failure:
                wait = max(failure.wait, self._pause(attempt))
                late = time.monotonic() + wait >= deadline
                heard = silence and failure.kind == "empty"
                last = attempt == self.endpoint.retries or late
                if not failure.again or heard or last:
                    raise
            self._count("retries")
            if stop.wait(wait):
                raise Failure("stopped", "another request ended the batch")
        raise AssertionError("the last try either returns or raises")

    def _pause(self, attempt: int) -> float:
        """Seconds before the next try: doubled each time, half of it by chance."""
        full = min(self.endpoint.backoff * 2.0**attempt, LONGEST_WAIT)
        return full * random.uniform(0.5, 1.0)

    def _post(self, body: bytes, deadline: float) -> bytes:
        left = deadline - time.monotonic()
        if left <= 0 or not self._slots.acquire(timeout=left):
            raise Failure("budget", f"no turn within {self.endpoint.budget:g} s")
        try:
            self._count("requests")
            request = self._request(chat_url(self.endpoint.base_url), body)
            patience = min(self.endpoint.timeout, deadline - time.monotonic())
            return self._fetch(request, max(patience, 1e-3))
        finally:
            self._slots.release()

    def _request(self, url: str, body: bytes | None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return urllib.request.Request(url, data=body, headers=headers)

    def _fetch(self, request: urllib.request.Request, timeout: float) -> bytes:
        try:
            with self._opener.open(request, timeout=timeout) as response:
                return b"".join(_parts(response))
        except urllib.error.HTTPError as e:
            raise self._from_status(e) from e
        except TimeoutError as e:
            raise Failure("timeout", f"none in {timeout:.3g} s", again=True) from e
        except (OSError, http.client.HTTPException) as e:
            reason = getattr(e, "reason", e)  # urllib wraps what happened
            kind = "timeout" if isinstance(reason, TimeoutError) else "connection"
            detail = f"{type(reason).__name__}: {reason}"
            raise Failure(kind, detail, again=True) from e

    def _from_status(self, e: urllib.error.HTTPError) -> Failure | Refused:
        came = []
        try:
            with e:
                came.extend(_parts(e))
        except (OSError, http.client.HTTPException, Failure):
            pass  # the status is what counts; of the reason there is what came
        text = b"".join(came).decode("utf-8", "replace")
        detail = self._without_key(f"HTTP {e.code}: {' '.join(text.split())[:SHOWN]}")
        if e.code in REFUSED:
            return self._refused(detail)
        again = e.code == 429 or e.code >= 500
        wait = asked_wait(e.headers.get("Retry-After", ""))
        return Failure(f"status_{e.code}", detail, again, wait)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _refused(self, detail: str) -> Refused:
        name = self.endpoint.api_key_env
        key = f"the key in ${name}" if name else "no key"
        return Refused(
            f"the endpoint {self.endpoint.base_url} refuses {key}",
            got=detail,
            wanted=f"a key that may use the model {self.endpoint.model!r}",
            way_out=f"export {name or 'OPENAI_API_KEY'}=..., and name that variable in"
            " --config.rewards.vlm.api_key_env",
        )

    def _unusable(self, failure: Failure) -> UserError:
        """Says what the start-up check found, in words for the user."""
        url, model = self.endpoint.base_url, self.endpoint.model
        if failure.kind in ("status_400", "status_404", "status_422"):
            known = self._models()
            listed = f"one of {', '.join(known)}" if known else "a model it serves"
            return UserError(
                f"the endpoint {url} does not answer for the model {model!r}",
                got=failure.detail,
                wanted=f"{listed}, that reads pictures",
                way_out="correct --config.rewards.vlm.model, or .base_url (it ends"
                " before /chat/completions, often in /v1)",
            )
        reached = failure.kind not in ("connection", "timeout", "budget")
        return UserError(
            f"the endpoint {url} "
            + ("gives no usable answer" if reached else "can not be reached"),
            got=f"{failure} (after {self.endpoint.retries + 1} tries at most)",
            wanted="an OpenAI-compatible server that answers POST /chat/completions",
            way_out="start it, or correct --config.rewards.vlm.base_url; a slow one"
            " needs a larger --config.rewards.vlm.timeout",
        )

    def _models(self) -> list[str]:
        """The models the endpoint lists, [] if it does not."""
        url = chat_url(self.endpoint.base_url).removesuffix("chat/completions")
        try:
            request = self._request(url + "models", None)
            rows = parse_json(self._fetch(request, self.endpoint.timeout))["data"]
            return [str(row["id"]) for row in rows][:10]
        except (Failure, UserError, ValueError, KeyError, TypeError):
            return []

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


def _parts(response: Any) -> Iterator[bytes]:
    """A body as it arrives; of too large a one no more than is too large.

    Raises ConnectionError where less came than Content-Length had announced: read1
    takes that for an end (a cut chunked body is an IncompleteRead of its own).
    """
    size = 0
    while part := response.read1(65536):
        size += len(part)
        if size > LARGEST_BODY:
            raise Failure("not_json", f"more than {LARGEST_BODY} bytes")
        yield part
    if response.length:
        raise ConnectionError(f"cut after {size} of {size + response.length} bytes")
