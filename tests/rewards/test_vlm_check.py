"""The start-up check of an endpoint: what it refuses before anything is trained."""

import socket

import pytest
from vlm_server import after, picture_of, said, serving

from ddrl_jax.errors import UserError
from ddrl_jax.rewards.endpoint import Endpoint
from ddrl_jax.rewards.vlm import VlmClient

HTML = "<html><body>502 Bad Gateway</body></html>"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def client(url, **settings):
    patience = {"timeout": 5.0, "backoff": 0.01, "retries": 2}
    return VlmClient(Endpoint(url, "judge", **{**patience, **settings}))


def test_a_good_endpoint_passes_the_check():
    with serving(lambda b, n: said("white")) as (url, seen):
        client(url).check_endpoint()
    pixels, _ = picture_of(seen.bodies[0])
    assert pixels.shape == (224, 224, 3) and pixels.min() == 255


def test_a_model_that_says_nothing_of_a_blank_picture_passes():
    with serving(lambda b, n: said("")) as (url, seen):
        client(url).check_endpoint()
    assert len(seen.bodies) == 1


def checked(reply, **settings):
    served = serving(reply, ("llava-13b", "qwen-vl"))
    with served as (url, _), pytest.raises(UserError) as error:
        client(url, **settings).check_endpoint()
    return error.value


def test_an_unknown_model_lists_the_known_ones():
    error = checked(lambda b, n: (404, '{"error": "no model judge"}'))
    assert "'judge'" in error.what and "no model judge" in error.got
    assert "llava-13b, qwen-vl" in error.wanted
    assert "--config.rewards.vlm.model" in error.way_out


def test_a_wrong_key_is_found_before_training():
    error = checked(lambda b, n: (401, "who are you"))
    assert "refuses no key" in error.what and "api_key_env" in error.way_out


@pytest.mark.parametrize(
    "reply", [(200, HTML), (200, {"choices": []}), (500, "x"), said(5)]
)
def test_a_server_of_another_kind_is_found(reply):
    assert "no usable answer" in checked(lambda b, n: reply).what


def test_an_endpoint_out_of_reach_is_found():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UserError, match="can not be reached") as error:
        client(f"http://127.0.0.1:{port}/v1").check_endpoint()
    assert "refused" in error.value.got and "base_url" in error.value.way_out


def test_a_slow_endpoint_is_found():
    error = checked(after(1.0), timeout=0.1, retries=0)
    assert "can not be reached" in error.what and ".timeout" in error.way_out
