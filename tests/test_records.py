"""Mappings become records and come back; every error starts with the whole path of the key."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx import records
from kvx.errors import ConfigError


class Colour(StrEnum):
    RED = "red"
    GREEN = "green"


@dataclass(frozen=True, slots=True)
class Inner:
    size_bytes: int = field(metadata={"setting": records.Setting(minimum=4096)})
    ratio: float = field(default=0.5, metadata={"setting": records.Setting(minimum=0, maximum=1)})

    def __post_init__(self) -> None:
        records.validate(self)


def _inners(source: object) -> tuple[Inner, ...]:
    if not isinstance(source, list | tuple):
        raise records.rejected("", source, "a list")
    found = []
    for place, one in enumerate(source):
        try:
            found.append(records.decode(Inner, one))
        except ConfigError as error:
            raise records.prefixed(error, f"[{place}]") from None
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Outer:
    inner: Inner
    name: str = "a"
    colour: Colour = Colour.RED
    count: int = field(default=1, metadata={"setting": records.Setting(minimum=0, maximum=9)})
    quota_bytes: int | None = None
    path: Path = Path()
    is_on: bool = False
    password: str = field(default="", metadata={"setting": records.Setting(is_secret=True)})
    inners: tuple[Inner, ...] = field(
        default=(), metadata={"setting": records.Setting(decode=_inners)}
    )

    def __post_init__(self) -> None:
        records.validate(self)


INNERS = st.builds(
    Inner, size_bytes=st.integers(4096, 2**60), ratio=st.floats(0, 1, allow_nan=False)
)
OUTERS = st.builds(
    Outer,
    inner=INNERS,
    name=st.text(max_size=5),
    colour=st.sampled_from(Colour),
    count=st.integers(0, 9),
    quota_bytes=st.none() | st.integers(0, 2**60),
    path=st.sampled_from([Path("/a"), Path("b/c")]),
    is_on=st.booleans(),
    password=st.text(max_size=5),
    inners=st.lists(INNERS, max_size=3).map(tuple),
)


@given(OUTERS)
def test_records_survive_being_written(record: Outer) -> None:
    plain = records.encode(record, is_masked=False)
    assert records.decode(Outer, plain) == record
    assert records.without_records({"x": [record]}) == {"x": [plain]}
    assert records.decode(Outer, record) is record


@given(OUTERS)
def test_plain_values_are_plain_and_secrets_are_not_among_them(record: Outer) -> None:
    plain = records.encode(record)
    assert plain["password"] == (records.MASK if record.password else "")
    assert all(
        value is None or isinstance(value, str | int | float | bool | list | dict)
        for value in plain.values()
    )


@pytest.mark.parametrize(
    ("source", "key", "parts"),
    [
        ({}, "inner", ["missing"]),
        ({"inner": {}}, "inner.size", ["missing"]),
        ({"inner": 3}, "inner", ["3", "mapping"]),
        ({"inner": {"size": "12 apples"}}, "inner.size", ["'12 apples'", "GiB"]),
        ({"inner": {"size": 1.5}}, "inner.size", ["1.5", "GiB"]),
        ({"inner": {"size": "1KiB"}}, "inner.size", ["'1KiB'", "at least 4096"]),
        ({"inner": {"size": 4096, "size_bytes": 4096}}, "inner.size_bytes", ["twice"]),
        ({"inner": {"size": 4096, "ratio": 2}}, "inner.ratio", ["2", "at least 0 and at most 1"]),
        ({"inner": {"size": 4096, "ratio": "1MB"}}, "inner.ratio", ["'1MB'", "a number"]),
        ({"inner": {"size": 4096, "ratio": float("nan")}}, "inner.ratio", ["nan"]),
        ({"inner": {"size": 4096, "ratoi": 2}}, "inner.ratoi", ["did you mean 'ratio'?"]),
        ({"inner": {"size": 4096, "zzz": 2}}, "inner.zzz", ["known are ratio, size"]),
        ({"colour": "blue"}, "colour", ["'blue'", "red, green"]),
        ({"count": 1.0}, "count", ["1.0", "whole number"]),
        ({"count": "1k"}, "count", ["'1k'", "a number"]),
        ({"count": True}, "count", ["True", "a number"]),
        ({"is_on": 1}, "is_on", ["1", "bool"]),
        ({"is_on": "yes"}, "is_on", ["'yes'", "bool"]),
        ({"name": 1}, "name", ["1", "str"]),
        ({"name": True}, "name", ["True", "str"]),
        ({"path": ""}, "path", ["''", "Path"]),
        ({"password": 12345}, "password", ["***", "str"]),
        ({"inners": 5}, "inners", ["5", "a list"]),
        ({"inners": [{"size": 4096}, {"size": 1}]}, "inners[1].size", ["1", "4096"]),
        (5, "", ["5", "mapping"]),
    ],
)
def test_errors_name_key_value_and_what_is_accepted(
    source: object, key: str, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        records.decode(Outer, source)
    assert error.value.key == key
    message = str(error.value)
    assert message.startswith(key)
    assert all(part in message for part in parts), message
    assert "12345" not in message


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"count": 10}, "count"),
        ({"count": "3"}, "count"),
        ({"count": True}, "count"),
        ({"name": None}, "name"),
        ({"colour": "red"}, "colour"),
        ({"path": "x"}, "path"),
        ({"inner": {"size": 4096}}, "inner"),
        ({"inners": [Inner(4096)]}, "inners"),
        ({"inners": ({"size": 4096},)}, "inners"),
        ({"inners": ({"size": 1},)}, "inners[0].size"),
    ],
)
def test_records_built_in_code_are_checked_too(changes: dict[str, object], key: str) -> None:
    record = Outer(Inner(4096))
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(record, **changes)  # type: ignore[arg-type]
    assert error.value.key == key


def test_an_int_passes_for_a_float() -> None:
    assert Inner(4096, ratio=1).ratio == 1
    decoded = records.decode(Inner, {"size": 4096, "ratio": 1})
    assert isinstance(decoded.ratio, float)
