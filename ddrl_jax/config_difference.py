"""In which keys two configurations differ so that a run can not go on."""

import json
from collections.abc import Mapping
from typing import Any

# Keys that a later start may change: what they change is not the numbers of the run,
# or (mesh, microbatch) only the order in which floats are added.
_FREE = ("log.", "checkpoint.", "sample.", "mesh.", "export.", "evaluate.pictures")
_FREE += ("rewards.on_failure", "rewards.threads", "rewards.timeout")
_FREE += ("rewards.vlm.base_url", "rewards.vlm.api_key_env", "rewards.vlm.timeout")
_FREE += ("rewards.vlm.retries", "rewards.vlm.backoff", "rewards.vlm.threads")
_FREE += ("policy.ratio_tolerance", "train.microbatch")
_ABSENT = "(no such key)"
_TABLE = "rewards.weights."  # whose keys are set, all at once, in any version
# Keys that a run of an earlier version does not have, and what it did.
_MEANT = {"optimizer.name": "adamw", "model.matmul_precision": "default"}
_MEANT |= {"sampler.window": []}


def differing_keys(
    stored: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Returns the keys in which two configs differ so that a run can not go on.

    Left out are keys that do not change the numbers (log.*, checkpoint.*, sample.*,
    mesh.*, export.*, rewards.on_failure (of epochs without a failure),
    rewards.threads, rewards.timeout, evaluate.pictures, data.cache,
    policy.ratio_tolerance, and of rewards.vlm.* base_url, api_key_env, timeout,
    retries, backoff and threads) and train.microbatch; and a larger train.epochs,
    unless the schedule of the learning rate is made for it.

    Args:
      stored: flat dotted keys of the run in the folder, as JSON gives them.
      wanted: those of this start.

    Returns:
      {key: (stored, wanted)}, sorted.
    """
    stored = {k: v for k, v in _MEANT.items() if k in wanted} | dict(stored)
    keys = sorted(stored.keys() | wanted.keys())
    pairs = {key: (stored.get(key, _ABSENT), wanted.get(key, _ABSENT)) for key in keys}
    longer = wanted.get("train.epochs", 0) >= stored.get("train.epochs", 0)
    may_grow = wanted.get("optimizer.schedule") != "cosine" and longer
    return {
        key: pair
        for key, pair in pairs.items()
        if pair[0] != pair[1]
        and not _is_free(key)
        and not (key == "train.epochs" and may_grow)
    }


def _is_free(key: str) -> bool:
    # data.cache is a place; other keys that begin so say what is cached
    return key == "data.cache" or key.startswith(_FREE)


def listed(found: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """One line for each key of `differing_keys`, with its value there and here."""
    return [f"{key}: {old!r} there, {new!r} here" for key, (old, new) in found.items()]


def way_back(found: Mapping[str, tuple[Any, Any]]) -> str:
    """What helps where keys differ: a key that one version lacks can not be set."""
    lacking = [
        _ABSENT in pair and not key.startswith(_TABLE) for key, pair in found.items()
    ]
    if not any(lacking):
        return "use another --workdir, or set these keys as stored"
    if all(lacking):
        return "use another --workdir, or go on with the version of the stored run"
    return (
        "use another --workdir, or set these keys as stored; one that is not there: "
        "go on with the version of the stored run"
    )


def flattened(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys, and values as JSON gives them back, to compare with a file."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) or hasattr(value, "to_dict"):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.loads(json.dumps(value))
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that `flattened` has made dotted keys of."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return tree
