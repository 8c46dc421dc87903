"""The messages of a chat endpoint: a picture and a question out, an answer back."""

import base64
import io
import json
from collections.abc import Mapping

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from ddrl_jax.errors import UserError
from ddrl_jax.rewards.endpoint import Endpoint
from ddrl_jax.text import parse_json

JPEG_QUALITY = 80  # as in DDPO
LARGEST_BODY = 1 << 20  # bytes of an answer; 64 tokens need far less
SHOWN = 300  # characters of a server's message in ours


class Failure(Exception):
    """Why a request has no answer.

    Args:
      kind: "timeout", "connection", "status_500", "not_json", "no_choices", "empty",
        "budget": the name it is counted under.
      detail: for the message.
      again: whether asking again can help.
      wait: seconds the server asked to wait before that.
    """

    def __init__(self, kind: str, detail: str, again: bool = False, wait: float = 0.0):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail, self.again, self.wait = kind, detail, again, wait


def checked_pictures(images: Shaped[np.ndarray, "*shape"]) -> np.ndarray:
    """Returns the pictures if they are uint8 [b h w 3].

    Raises:
      UserError: they are something else.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            "a vision-language model can not be shown these pictures",
            got=f"{images.dtype} {list(images.shape)}",
            wanted="uint8 [b h w 3], 0 to 255",
            way_out="round and convert the decoded pictures to uint8 first",
        )
    return images


def data_url(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """Returns a picture as a data URL, JPEG of quality 80."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def answer_of(body: bytes) -> str:
    """Returns the text of a chat completion.

    Raises:
      Failure: it is not JSON, has no choices with a content that can be a text, or
        the text is empty.
    """
    try:
        found = parse_json(body)
    except ValueError as e:
        raise Failure("not_json", repr(body[:SHOWN])) from e
    try:
        text = found["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as e:
        raise Failure("no_choices", repr(body[:SHOWN])) from e
    if isinstance(text, list):  # content in parts
        parts = [p.get("text") for p in text if isinstance(p, Mapping)]
        text = " ".join(p for p in parts if isinstance(p, str))
    if text is not None and not isinstance(text, str):
        raise Failure("no_choices", repr(body[:SHOWN]))
    if text is None or not text.strip():
        # a server that answers many at once may say something the next time
        raise Failure("empty", f"content {text!r}", again=True)
    return text.strip()


def request_body(endpoint: Endpoint, picture: str, text: str) -> bytes:
    """Returns the JSON of a request: one picture and one question, no sampling.

    A field of endpoint.body replaces ours, and None removes it.
    """
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": text},
    ]
    fields = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": endpoint.max_tokens,
        **dict(endpoint.body),
    }
    kept = {name: value for name, value in fields.items() if value is not None}
    return json.dumps(kept).encode()
