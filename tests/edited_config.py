"""The default configuration with some keys changed, for tests of what is refused."""

from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import base
from ddrl_jax.check_config import check_config, check_shapes
from ddrl_jax.errors import UserError


def configured(edits: dict[str, Any]) -> ConfigDict:
    """The defaults with some keys changed, whatever the type of the new value."""
    config = base.get_config()
    with config.ignore_type():
        for path, value in edits.items():
            section, _, key = path.rpartition(".")
            (config[section] if section else config)[key] = value
    return config


def refused(edits: dict[str, Any], device_count: int = 1) -> UserError:
    """The error that these edits bring."""
    with pytest.raises(UserError) as caught:
        check_config(configured(edits), device_count)
    return caught.value


def told_by_plan(edits: dict[str, Any]) -> str:
    """The error that --mode=plan has for these edits, or ""."""
    try:
        check_shapes(configured(edits), 1)
    except UserError as error:
        return str(error)
    return ""
