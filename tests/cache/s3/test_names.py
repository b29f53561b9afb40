"""Names are computed everywhere alike, and nobody else's name is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.cache.s3.names import (
    ObjectName,
    namespace_prefix,
    object_name,
    parse_name,
    relative_name,
    version_of,
)
from kvx.errors import UsageError

ID = bytes(range(16))
KEY = bytes(range(240, 256))
NAME = f"kvx/v1/{ID.hex()}/8/{KEY.hex()}"
SEAL_ID = bytes(range(100, 108))
SEALED = f"kvx/v1/{ID.hex()}/8-{SEAL_ID.hex()}/{KEY.hex()}"


def test_the_name_of_an_object() -> None:
    assert object_name("kvx", ID, 8, KEY) == NAME
    assert object_name("kvx", ID, 8, KEY, seal_id=SEAL_ID) == SEALED
    assert namespace_prefix("kvx", ID) == f"kvx/v1/{ID.hex()}/"
    assert relative_name(NAME) == relative_name("other/" + NAME) == NAME.removeprefix("kvx/")


@given(
    st.text(alphabet="a/b-", max_size=8), st.binary(min_size=16, max_size=16),
    st.integers(1, 4096), st.binary(min_size=16, max_size=16), st.sampled_from([b"", SEAL_ID]),
)  # fmt: skip
def test_names_are_read_again(
    prefix: str, public_id: bytes, count: int, key: bytes, seal_id: bytes
) -> None:
    name = object_name(prefix, public_id, count, key, seal_id=seal_id)
    assert parse_name(prefix, name) == ObjectName(public_id, count, key, seal_id)
    assert version_of(prefix, name) == 1
    assert name.startswith(namespace_prefix(prefix, public_id))
    assert not name.startswith("/")
    assert relative_name(name) == object_name("", public_id, count, key, seal_id=seal_id)


@pytest.mark.parametrize(
    "name",
    [
        "", "kvx", "kvx/", NAME[:-1], NAME + "0", NAME + "/", NAME + "\n", NAME.upper(), "x" + NAME,
        NAME.replace("kvx/", ""), NAME.replace("kvx/", "kvxx/"), NAME.replace("/8/", "/08/"),
        NAME.replace("/8/", "/0/"), NAME.replace("/8/", "/-8/"), NAME.replace("/8/", "//"),
        NAME.replace("v1", "v2"), SEALED[:-1], SEALED.replace("-", ""), SEALED.replace("-", "--"),
        SEALED.replace("-64", "-"), SEALED.replace("-64", "-G4"), NAME.replace("/8/", "/8-/"),
        NAME.replace("v1", "v0"), NAME.replace("v1", "1"), NAME.replace("/8/", "/٨/"),
        "kvx/notes.txt", "kvx/v1/notes.txt",
    ],
)  # fmt: skip
def test_names_of_others(name: str) -> None:
    assert parse_name("kvx", name) is None


@pytest.mark.parametrize(
    ("name", "version"),
    [("kvx/v2/anything", 2), ("kvx/v1/x", 1), ("kvx/v2", None), ("kvx/v2/", None),
     ("kvx/v02/x", None), ("kvx/vx/x", None), ("kvz/v2/x", None), ("v2/x", None)],
)  # fmt: skip
def test_the_version_that_a_name_claims(name: str, version: int | None) -> None:
    assert version_of("kvx", name) == version


def test_what_has_no_name() -> None:
    with pytest.raises(UsageError, match="15 bytes"):
        object_name("kvx", ID, 8, KEY[:15])
    with pytest.raises(UsageError, match="8 bytes, not 7"):
        object_name("kvx", ID, 8, KEY, seal_id=SEAL_ID[:7])
    with pytest.raises(UsageError, match="0 blocks"):
        object_name("kvx", ID, 0, KEY)
    with pytest.raises(UsageError, match="16 bytes, not 3"):
        namespace_prefix("kvx", b"abc")
