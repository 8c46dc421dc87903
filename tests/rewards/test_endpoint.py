"""Settings of an endpoint: what can not work is said before a request is made."""

import ml_collections
import pytest

from ddrl_jax.errors import UserError
from ddrl_jax.rewards.endpoint import (
    Endpoint,
    api_key,
    chat_url,
    checked_endpoint,
    endpoint_of,
)

GOOD = Endpoint("http://localhost:8000/v1", "llava")


def section(**changes):
    keys = {
        "base_url": "http://localhost:8000/v1",
        "model": "llava",
        "api_key_env": "",
        "timeout": 60.0,
        "retries": 5,
        "backoff": 1.0,
        "threads": 8,
        "max_tokens": 64,
        "body": "",
    }
    return ml_collections.ConfigDict({**keys, **changes})


def test_the_configuration_becomes_an_endpoint():
    found = endpoint_of(section(body='{"top_p": null, "seed": 3}'), 100.0)
    assert found == GOOD._replace(budget=90.0, body={"top_p": None, "seed": 3})


@pytest.mark.parametrize("body", ["{", "[1]", "3"])
def test_extra_fields_must_be_a_json_object(body):
    with pytest.raises(UserError, match="extra fields"):
        endpoint_of(section(body=body), 1.0)


@pytest.mark.parametrize(
    "url", ["https://xn--bcher-kva.example./v1", "http://[::1]:80/%C3%BC/v1"]
)
def test_an_address_that_looks_odd_and_works(url):
    assert checked_endpoint(GOOD._replace(base_url=url)).base_url == url


@pytest.mark.parametrize(
    "url", ["http://h/v1", "http://h/v1/", "http://h/v1/chat/completions"]
)
def test_the_address_of_requests(url):
    assert chat_url(url) == "http://h/v1/chat/completions"


@pytest.mark.parametrize(
    "changes",
    [
        {"base_url": ""},
        {"base_url": "localhost:8000"},
        {"base_url": "file:///etc/passwd"},
        {"base_url": "http://user:secret@host/v1"},
        {"base_url": "http:///v1"},
        {"base_url": "http://a..b:80/v1"},
        {"base_url": f"http://{'a' * 64}/v1"},
        {"base_url": "http://[::1/v1"},
        {"base_url": "http://127.0.0.1:9/\u00fc/v1"},
        {"base_url": "http://h:99999/v1"},
        {"base_url": "http://h:port/v1"},
        {"base_url": "http://h/a b/v1"},
        {"base_url": "http://h/v1\n"},
        {"base_url": "http://@h/v1"},
        {"base_url": "http://h/v1?api-version=1"},
        {"base_url": "http://h/v1?"},
        {"base_url": "http://h/v1#top"},
        {"model": ""},
        {"timeout": 0.0},
        {"threads": 0},
        {"retries": -1},
        {"backoff": -0.5},
        {"max_tokens": 0},
        {"budget": 0.0},
    ],
)
def test_settings_that_can_not_work(changes):
    with pytest.raises(UserError) as error:
        checked_endpoint(GOOD._replace(**changes))
    assert "--config.rewards" in error.value.way_out
    assert checked_endpoint(GOOD) is GOOD


def test_the_key_comes_from_the_named_variable(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", " sk-1 ")
    assert api_key(GOOD._replace(api_key_env="JUDGE_KEY")) == "sk-1"
    assert api_key(GOOD) == ""


@pytest.mark.parametrize("value", [None, "", " ", "two\nlines", "schlüssel"])
def test_a_key_that_is_missing_or_can_not_be_sent(monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(UserError, match="JUDGE_KEY holds no key") as error:
        api_key(GOOD._replace(api_key_env="JUDGE_KEY"))
    assert "schl" not in str(error.value) and "lines" not in str(error.value)
