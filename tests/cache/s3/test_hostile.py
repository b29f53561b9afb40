"""Bytes that anybody may have written: no block but the right one, and no byte out of place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.cache.s3.format import GroupShape, decode_frames, read_footer, read_header
from kvx.cache.s3.seal import Sealer
from kvx.errors import CorruptBlock, IncompatibleError
from kvx.transfer.codes import Code
from tests.cache.s3.groups import NOW_S, SEALER, Group

BLOCKS = 3
GUARD = 256
GROUPS = {sealer: Group(num_blocks=BLOCKS, sealer=sealer) for sealer in (None, SEALER)}
BODIES = {sealer: group.encode().tobytes() for sealer, group in GROUPS.items()}
SEALERS = st.sampled_from([None, SEALER])


def alter(data: st.DataObject, body: bytes) -> bytes:
    """Return a body as somebody careless or malicious leaves it."""
    for _ in range(data.draw(st.integers(1, 4))):
        size = len(body)
        start, other = (data.draw(st.integers(0, size)) for _ in range(2))
        length = data.draw(st.sampled_from([1, 8, 16, 64, 4096, 4160, size]))
        match data.draw(st.sampled_from(["write", "cut", "repeat", "drop"])):
            case "write":
                patch = data.draw(st.binary(max_size=16))
                body = body[:start] + patch + body[start + len(patch) :]
            case "cut":
                body = body[:start]
            case "repeat":
                body = body[:start] + body[other : other + length] + body[start:]
            case "drop":
                body = body[:start] + body[start + length :]
    return body


@settings(deadline=None, max_examples=300)
@given(SEALERS, st.data())
def test_an_altered_object_gives_right_blocks_or_none(
    sealer: Sealer | None, data: st.DataObject
) -> None:
    group, shape = GROUPS[sealer], GROUPS[sealer].shape
    body = alter(data, BODIES[sealer])
    first = data.draw(st.integers(0, BLOCKS - 1))
    count = BLOCKS - first
    memory = np.full((count, group.block_bytes + 2 * GUARD), 0xEE, np.uint8)
    addresses = memory.ctypes.data + GUARD + np.arange(count, dtype=np.int64) * memory.strides[0]
    codes, checksums = decode_frames(
        shape, body[shape.span(first, count)[0] :], first=first, keys=group.keys[first:],
        addresses=addresses, sealer=sealer, name=group.name(), now_s=NOW_S,
    )  # fmt: skip
    blocks = memory[:, GUARD:-GUARD]
    for row, code in enumerate(codes.tolist()):
        assert code in {Code.OK, Code.CORRUPT, Code.SHORT, Code.STALE}
        if code == Code.OK:
            assert (blocks[row] == group.blocks[first + row]).all()
            assert checksums[row] == group.checksums[first + row]
        else:
            assert checksums[row] == 0
    assert (memory[:, :GUARD] == 0xEE).all()
    assert (memory[:, -GUARD:] == 0xEE).all()


@settings(deadline=None, max_examples=300)
@given(SEALERS, st.data())
def test_headers_and_footers_are_right_or_refused(
    sealer: Sealer | None, data: st.DataObject
) -> None:
    whole = BODIES[sealer]
    body = alter(data, whole)
    for read, part in ((read_header, body[:128]), (read_footer, body[-200:])):
        try:
            found = read(part)
        except (CorruptBlock, IncompatibleError):
            continue
        assert repr(found) == repr(read(whole))


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    for read in (read_header, read_footer):
        with pytest.raises(CorruptBlock):
            read(noise)


@given(
    st.integers(1, 4096), st.integers(4096, 64 << 20), st.booleans(), st.binary(max_size=200)
)  # fmt: skip
def test_shapes_from_elsewhere_over_little_memory(
    num_blocks: int, block_bytes: int, is_sealed: bool, noise: bytes
) -> None:
    """A shape that is larger than the buffer never makes it read beyond."""
    if num_blocks * block_bytes > 4 << 30:
        return
    shape = GroupShape(num_blocks, block_bytes, is_sealed)
    room = np.zeros(1, np.int64)
    codes, _ = decode_frames(
        shape, noise, first=0, keys=np.zeros((1, 16), np.uint8), addresses=room + room.ctypes.data,
        sealer=SEALER if is_sealed else None,
    )  # fmt: skip
    assert codes.tolist() == [Code.SHORT]
