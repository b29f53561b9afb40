"""The tree of exceptions, their facts, and which of them are worth a retry."""

from __future__ import annotations

import inspect
import re

import pytest

import kvx
from kvx import errors

PARENTS: dict[str, tuple[type[BaseException], ...]] = {
    "KvxError": (Exception,),
    "UsageError": (errors.KvxError, ValueError),
    "ConfigError": (errors.UsageError,),
    "CapacityError": (errors.KvxError,),
    "UnavailableError": (errors.KvxError,),
    "IncompatibleError": (errors.KvxError,),
    "StaleReference": (errors.KvxError,),
    "TransferError": (errors.KvxError,),
    "TransferTimeout": (errors.TransferError, TimeoutError),
    "TransferCancelled": (errors.TransferError,),
    "PeerLost": (errors.TransferError,),
    "StorageError": (errors.KvxError, OSError),
    "CorruptBlock": (errors.StorageError,),
}
RETRYABLE = {
    "CapacityError", "TransferError", "TransferTimeout", "TransferCancelled", "PeerLost",
    "StorageError",
}  # fmt: skip
FACTS: dict[str, dict[str, object]] = {
    "ConfigError": {"key": "tiers[0]"},
    "CapacityError": {"needed_bytes": 10, "available_bytes": 5},
    "IncompatibleError": {"ours": 1, "theirs": 2},
    "TransferTimeout": {"bytes_done": 7, "peer": "p"},
    "TransferError": {"bytes_done": 7, "peer": "p"},
    "StorageError": {"errno": 28, "key": "extent", "offset": 4096},
    "CorruptBlock": {"errno": None, "key": "extent", "offset": -1},
}


def classes() -> dict[str, type[errors.KvxError]]:
    return {
        name: one
        for name, one in inspect.getmembers(errors, inspect.isclass)
        if issubclass(one, errors.KvxError)
    }


def test_the_tree_is_the_one_drawn() -> None:
    assert {name: one.__bases__ for name, one in classes().items()} == PARENTS
    drawn = re.findall(r"[|`\-\s]*\b([A-Z]\w+)(?:\(\w+\))?\s", inspect.getdoc(errors) or "")
    assert set(PARENTS) <= set(drawn)


def test_everything_is_public() -> None:
    assert {name for name in PARENTS if getattr(kvx, name, None) is not classes()[name]} == set()


@pytest.mark.parametrize("name", sorted(PARENTS))
def test_retryable(name: str) -> None:
    assert classes()[name]("m").retryable is (name in RETRYABLE)


@pytest.mark.parametrize("name", sorted(FACTS))
def test_facts_stand_beside_the_message(name: str) -> None:
    error = classes()[name]("what happened", **FACTS[name])
    assert str(error) == "what happened"
    assert {fact: getattr(error, fact) for fact in FACTS[name]} == FACTS[name]
    assert error.args == ("what happened",)


def test_facts_are_optional() -> None:
    error = errors.StorageError("m")
    assert (error.errno, error.key, error.offset) == (None, "", -1)
    timeout = errors.TransferTimeout("m")
    assert (timeout.bytes_done, timeout.peer) == (0, "")


def test_the_standard_kinds_catch_them() -> None:
    for kind, error in (
        (ValueError, errors.ConfigError("m")),
        (TimeoutError, errors.TransferTimeout("m")),
        (OSError, errors.CorruptBlock("m", errno=5)),
    ):
        with pytest.raises(kind, match="m"):
            raise error
