"""Where a vision-language model is served, and how patient a client is with it."""

import os
import urllib.parse
from collections.abc import Mapping
from typing import Any, NamedTuple

from ddrl_jax.errors import UserError
from ddrl_jax.text import parse_json

PATH = "/chat/completions"


class Endpoint(NamedTuple):
    """An OpenAI-compatible server and the limits of a client.

    Attributes:
      base_url: up to and without /chat/completions, often ending in /v1.
      model: as the server calls it.
      api_key_env: environment variable that holds the key; "" sends none.
      timeout: seconds a request may take.
      budget: seconds all requests of a batch may take together; what has no answer
        then has failed.
      retries: tries after the first.
      backoff: seconds before the second try; doubled for each further one.
      threads: requests at once.
      max_tokens: of an answer.
      body: fields of the request that replace or extend ours; None removes a field
        (a server may want max_completion_tokens instead of max_tokens).
    """

    base_url: str
    model: str
    api_key_env: str = ""
    timeout: float = 60.0
    budget: float = 110.0
    retries: int = 5
    backoff: float = 1.0
    threads: int = 8
    max_tokens: int = 64
    body: Mapping[str, Any] = {}


def endpoint_of(config: Any, seconds: float) -> Endpoint:
    """Reads the section config.rewards.vlm.

    Args:
      config: base_url, model, api_key_env, timeout, retries, backoff, threads,
        max_tokens, body (JSON of an object, or "").
      seconds: the pool's limit for a batch; a tenth is kept for scoring the answers.

    Raises:
      UserError: body is not the JSON of an object.
    """
    return Endpoint(
        config.base_url,
        config.model,
        config.api_key_env,
        config.timeout,
        0.9 * seconds,
        config.retries,
        config.backoff,
        config.threads,
        config.max_tokens,
        _extra_fields(config.body),
    )


def _extra_fields(text: str) -> dict[str, Any]:
    try:
        found = parse_json(text or "{}")
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    raise UserError(
        "the extra fields of the requests can not be read",
        got=f"rewards.vlm.body={text!r}",
        wanted="a JSON object; null removes a field of ours",
        way_out="for instance --config.rewards.vlm.body="
        """'{"max_tokens": null, "max_completion_tokens": 64}'""",
    )


def checked_endpoint(endpoint: Endpoint) -> Endpoint:
    """Returns the endpoint if its settings make sense.

    Raises:
      UserError: no http(s) address, no model, or a limit out of range.
    """
    keys = "--config.rewards.vlm"
    if fault := _fault_of(endpoint.base_url):
        raise UserError(
            "the address of the vision-language model can not be used",
            got=f"rewards.vlm.base_url={endpoint.base_url!r} ({fault})",
            wanted="an http or https address without a password, ?query or #fragment,"
            " such as http://localhost:8000/v1, in ASCII (xn--... for a host, %... in a"
            " path)",
            way_out=f"set {keys}.base_url; a key goes in the environment variable that"
            f" {keys}.api_key_env names",
        )
    if not endpoint.model:
        raise UserError(
            "no vision-language model is named",
            got="rewards.vlm.model=''",
            wanted="the model's name as the server calls it",
            way_out=f"set {keys}.model",
        )
    e = endpoint
    positive = min(e.timeout, e.budget, e.threads, e.max_tokens) > 0
    if not positive or e.retries < 0 or e.backoff < 0:
        raise UserError(
            "the limits of the vision-language model make no sense",
            got=f"timeout={e.timeout}, threads={e.threads}, retries={e.retries},"
            f" backoff={e.backoff}, max_tokens={e.max_tokens}, budget={e.budget}",
            wanted="timeout, threads, max_tokens and budget above 0, retries and"
            " backoff at least 0",
            way_out=f"change them in {keys} (the budget follows"
            " --config.rewards.timeout)",
        )
    return endpoint


def _fault_of(url: str) -> str:
    """Says why no request can be sent to an address, "" if one can."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname or "", parts.port  # looked at for what they raise
        host.encode("idna")  # as the socket does: no label is empty or too long
    except ValueError as e:  # UnicodeError is one
        return str(e)
    if parts.scheme not in ("http", "https") or not host:
        return "no http or https, or no host"
    if parts.username is not None:
        return "a user or password in it"
    if not url.isascii() or not url.isprintable() or " " in url:
        return "characters that no request can carry"
    if "?" in url or "#" in url:  # even an empty one
        return f"a query or fragment, behind which {PATH} would come"
    return ""


def chat_url(base_url: str) -> str:
    """Returns the address that requests go to; a trailing slash plays no part."""
    return base_url.rstrip("/").removesuffix(PATH) + PATH


def api_key(endpoint: Endpoint) -> str:
    """Returns the key from the environment, "" where none is configured.

    Raises:
      UserError: the variable is not set, or holds what no header can carry.
    """
    name = endpoint.api_key_env
    if not name:
        return ""
    key = os.environ.get(name, "").strip()
    if key and key.isascii() and key.isprintable():
        return key
    raise UserError(
        f"the environment variable {name} holds no key",
        got="characters that no key has" if key else "nothing",
        wanted=f"the key of {endpoint.base_url}",
        way_out=f"export {name}=..., or --config.rewards.vlm.api_key_env='' for a"
        " server that wants none",
    )
