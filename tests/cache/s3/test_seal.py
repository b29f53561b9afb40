"""Sealed blocks open with their key, under their name, at their place, and not otherwise."""

from __future__ import annotations

import builtins
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kvx.cache.s3.format import read_header
from kvx.cache.s3.seal import ObjectSeal, Sealer
from kvx.errors import UnavailableError, UsageError
from kvx.transfer.codes import Code
from tests.cache.s3.groups import SEALER, Group, decode, with_crc

KEY = bytes(range(100, 132))


def test_a_sealed_frame_is_what_the_manual_says() -> None:
    """Opened here with nothing but the package and the manual."""
    group = Group(sealer=SEALER, block_bytes=4099)
    body = group.encode()
    salt = read_header(body).salt
    relative = group.name().removeprefix("kvx/").encode()
    cipher = AESGCM(HKDF(SHA256(), 32, salt, b"kvx seal object 1 " + relative).derive(KEY))
    masks = np.frombuffer(cipher.encrypt(b"\xff" * 12, bytes(32), None)[:32], "<u8")
    for place in range(4):
        start, _ = group.shape.span(place, 1)
        frame = body[start : start + 64 + 4099 + 16].tobytes()
        block = cipher.decrypt(place.to_bytes(12, "little"), frame[64:], frame[:56])
        assert block == group.blocks[place].tobytes()
        assert frame[16:32] == salt
        shown = int.from_bytes(frame[32:40], "little")
        assert shown ^ int(masks[place]) == int(group.checksums[place])


def test_nothing_of_the_blocks_shows() -> None:
    group = Group(sealer=SEALER)
    group.blocks[:] = 7
    body = group.encode().tobytes()
    assert bytes([7] * 8) not in body
    for checksum in group.checksums.tolist():
        assert checksum.to_bytes(8, "little") not in body
    assert group.encode().tobytes() != body, "the same salt twice"


def test_another_key_opens_nothing() -> None:
    group = Group(sealer=SEALER)
    other = Sealer(KEY[::-1])
    assert decode(group, group.encode(), sealer=other).codes == [Code.CORRUPT] * 4
    assert read_header(group.encode()).seal_id == SEALER.id != other.id


@pytest.mark.parametrize("change", [
    lambda group: group.name().replace("/4-", "/5-"),
    lambda group: group.name()[:-1] + ("0" if group.name()[-1] != "0" else "1"),
    lambda group: group.name().replace("/000102", "/000103"),
    lambda group: group.name().replace(SEALER.id.hex(), Sealer(KEY[::-1]).id.hex()),
    lambda _: "",
])  # fmt: skip
def test_another_name_opens_nothing(change: Callable[[Group], str]) -> None:
    group = Group(sealer=SEALER)
    name = change(group)
    assert decode(group, group.encode(), name=name).codes == [Code.CORRUPT] * 4


def test_a_bucket_may_be_copied_under_another_prefix() -> None:
    group = Group(sealer=SEALER)
    assert decode(group, group.encode(), name=group.name("a/b")).codes == [Code.OK] * 4
    assert decode(group, group.encode(), name=group.name("")).codes == [Code.OK] * 4


@pytest.mark.parametrize("offset", [0, 16, 32, 40, 48])
def test_a_head_that_was_changed_with_its_checksum(offset: int) -> None:
    """The head's own checksum keeps out accidents; who writes to the bucket meets the seal."""
    group = Group(sealer=SEALER)
    body = group.encode()
    start, _ = group.shape.span(1, 1)
    head = bytearray(body[start : start + 56].tobytes())
    head[offset] ^= 2
    body[start : start + 64] = np.frombuffer(with_crc(bytes(head)), np.uint8)
    assert decode(group, body).codes == [Code.OK, Code.CORRUPT, Code.OK, Code.OK]


def test_a_seal_does_not_replace_the_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer whose checksums are wrong is not believed because its seal is right."""
    group = Group(sealer=SEALER)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectSeal, "masks", lambda *_: np.zeros(4, np.uint64))
        body = group.encode()
    assert decode(group, body).codes == [Code.CORRUPT] * 4


def test_a_plain_object_in_the_place_of_a_sealed_one() -> None:
    plain, sealed = Group(), Group(sealer=SEALER)
    body = np.zeros(sealed.shape.object_bytes, np.uint8)
    body[: plain.shape.object_bytes] = plain.encode()
    assert decode(sealed, body).codes == [Code.CORRUPT] * 4


def test_a_sealer_keeps_its_secret() -> None:
    sealer = Sealer(KEY)
    shown = repr(sealer) + str(sealer)
    assert KEY.hex() not in shown
    assert repr(KEY)[2:-1] not in shown
    assert sealer.id.hex() in shown
    with pytest.raises(UsageError, match="secret"):
        pickle.dumps(sealer)


@pytest.mark.parametrize("size_bytes", [0, 16, 31, 33])
def test_keys_of_another_length(size_bytes: int) -> None:
    with pytest.raises(UsageError, match=f"32 bytes, not {size_bytes}"):
        Sealer(bytes(size_bytes))


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refusing(name: str, *rest: object) -> object:
        if name.startswith("cryptography"):
            raise ImportError(f"no {name}")
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(UnavailableError, match=r"pip install kvx\[s3\]"):
        Sealer(KEY)
