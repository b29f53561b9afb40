"""The fingerprint covers every field, and keys are the digest that docs/formats/keys.md defines."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.errors import UsageError
from kvx.namespace import Namespace

PLAIN = Namespace("llama-3-8b", "bfloat16", 1 << 20)
FULL = Namespace(
    model="llama-3-8b",
    dtype="bfloat16",
    block_bytes=1 << 20,
    block_tokens=16,
    revision="r1",
    layout="abcd",
    tp_rank=1,
    tp_size=4,
    pp_rank=2,
    pp_size=3,
    hash_scheme="sha256",
    tenant="a",
    salt="pepper",
)
CHANGES: dict[str, object] = {
    "model": "llama-3-8B",
    "dtype": "float16",
    "block_bytes": 1 << 21,
    "block_tokens": 32,
    "revision": "r2",
    "layout": "abce",
    "tp_rank": 0,
    "tp_size": 5,
    "pp_rank": 1,
    "pp_size": 4,
    "hash_scheme": "sha1",
    "tenant": "b",
    "salt": "salt",
}


def fingerprint_by_definition(namespace: Namespace) -> bytes:
    message = b""
    for one in fields(Namespace):
        encoded = str(getattr(namespace, one.name)).encode()
        message += len(encoded).to_bytes(8, "little") + encoded
    return hashlib.blake2b(message, digest_size=16, person=b"kvx namespace 1").digest()


def test_golden_fingerprints() -> None:
    """They are on disks: a change makes every stored block unfindable."""
    assert PLAIN.fingerprint.hex() == "737eb3679b73a85d3cec5607005660b1"
    assert FULL.fingerprint.hex() == "3a09fb513509570428d4ecd522bbfc66"
    assert f"{FULL.tenant_digest:016x}" == "fa9cf6c659655a12"


@pytest.mark.parametrize("namespace", [PLAIN, FULL])
def test_the_fingerprint_follows_its_definition(namespace: Namespace) -> None:
    assert namespace.fingerprint == fingerprint_by_definition(namespace)


@pytest.mark.parametrize("name", [one.name for one in fields(Namespace)])
def test_each_field_changes_the_fingerprint(name: str) -> None:
    changed = replace(FULL, **{name: CHANGES[name]})  # type: ignore[arg-type]
    assert changed.fingerprint != FULL.fingerprint
    assert changed != FULL


def test_neighbouring_fields_do_not_run_together() -> None:
    one = replace(PLAIN, model="ab", dtype="c")
    other = replace(PLAIN, model="a", dtype="bc")
    assert one.fingerprint != other.fingerprint


def test_without_salt_only_the_salt_is_gone() -> None:
    bare = FULL.without_salt()
    assert bare == replace(FULL, salt="")
    assert replace(FULL, salt="other").without_salt() == bare
    assert "pepper" not in repr(FULL)


@given(st.integers(1, 128), st.integers(1, 5), st.integers(0, 2**32))
def test_keys_are_keyed_blake2b(hash_bytes: int, count: int, seed: int) -> None:
    hashes = np.random.default_rng(seed).integers(0, 256, (count, hash_bytes), np.uint8)
    keys = FULL.keys(hashes)
    assert keys.dtype == np.uint8
    assert keys.shape == (count, 16)
    for row, key in zip(hashes, keys, strict=True):
        wanted = hashlib.blake2b(row.tobytes(), key=FULL.fingerprint, digest_size=16).digest()
        assert key.tobytes() == wanted


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model": ""}, "model and a dtype"),
        ({"dtype": ""}, "model and a dtype"),
        ({"block_bytes": 4095}, "4095; 4096 to 67108864"),
        ({"block_bytes": (64 << 20) + 1}, "67108865; 4096"),
        ({"block_bytes": 4096.0}, "block_bytes must be int, not 4096.0"),
        ({"block_bytes": True}, "block_bytes must be int, not True"),
        ({"block_bytes": np.int64(4096)}, "block_bytes must be int"),
        ({"model": b"m"}, "model must be str, not b'm'"),
        ({"tenant": None}, "tenant must be str, not None"),
        ({"tp_rank": 1}, "rank 1 is not among 1 ranks"),
        ({"tp_rank": -1}, "rank -1 is not among 1 ranks"),
        ({"pp_rank": 2, "pp_size": 2}, "rank 2 is not among 2 ranks"),
        ({"tp_size": 0}, "rank 0 is not among 0 ranks"),
    ],
)
def test_fields_that_could_never_be_right(changes: dict[str, object], part: str) -> None:
    with pytest.raises(UsageError) as error:
        replace(PLAIN, **changes)  # type: ignore[arg-type]
    assert part in str(error.value)


@pytest.mark.parametrize("salt", [b"pepper", 123456])
def test_a_malformed_salt_is_not_shown(salt: object) -> None:
    with pytest.raises(UsageError, match="salt must be str") as error:
        replace(PLAIN, salt=salt)  # type: ignore[arg-type]
    assert "pepper" not in str(error.value)
    assert "123456" not in str(error.value)


@pytest.mark.parametrize("block_tokens", [-1])
def test_a_negative_number_of_tokens(block_tokens: int) -> None:
    with pytest.raises(UsageError, match="block_tokens"):
        replace(PLAIN, block_tokens=block_tokens)
