"""Objects hold what the manual says, and whatever was altered is never taken for a block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.cache.s3 import header as header_module
from kvx.cache.s3.format import (
    GroupShape,
    decode_frames,
    encode,
    read_footer,
    read_header,
)
from kvx.errors import CorruptBlock, IncompatibleError, UsageError
from kvx.transfer.codes import Code
from tests.cache.s3.groups import (
    NOW_S,
    SEALER,
    Group,
    addresses_of,
    decode,
    model_body,
    with_crc,
)

GROUPS = st.builds(
    Group,
    num_blocks=st.integers(1, 6),
    block_bytes=st.integers(4096, 4300),
    sealer=st.sampled_from([None, SEALER]),
    expiry_s=st.sampled_from([0, NOW_S + 60]),
    seed=st.integers(0, 1000),
)
BOTH = pytest.mark.parametrize("sealer", [None, SEALER], ids=["plain", "sealed"])


@settings(deadline=None)
@given(GROUPS)
def test_an_object_is_what_the_manual_says(group: Group) -> None:
    group.sealer = None
    assert group.encode().tobytes() == model_body(group)


@settings(deadline=None)
@given(GROUPS, st.data())
def test_any_run_of_frames_comes_back(group: Group, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, group.num_blocks - 1))
    count = data.draw(st.integers(1, group.num_blocks - first))
    found = decode(group, group.encode(), first=first, count=count, now_s=NOW_S)
    rows = slice(first, first + count)
    assert found.codes == [Code.OK] * count
    assert (found.checksums == group.checksums[rows]).all()
    assert (found.blocks == group.blocks[rows]).all()


@settings(deadline=None)
@given(GROUPS)
def test_header_and_footer_say_what_is_there(group: Group) -> None:
    body = group.encode()
    assert len(body) == group.shape.object_bytes
    header = read_header(body[:128])
    assert (header.shape, header.facts) == (group.shape, group.facts)
    assert header.last_key == group.keys[-1].tobytes()
    footer = read_footer(body)
    assert footer.fits(header)
    assert (footer.keys == group.keys).all()
    assert (group.sealer is None) == (footer.checksums == group.checksums).all()


@BOTH
@pytest.mark.parametrize("whole", [False, True])
def test_no_flipped_bit_passes(sealer: object, *, whole: bool) -> None:
    """Of a frame: head and the first and last bytes of the block; now and then any byte."""
    group = Group(num_blocks=2, sealer=sealer)  # type: ignore[arg-type]
    body, (start, size_bytes) = group.encode(), group.shape.span(1, 1)
    stored = 64 + group.shape.stored_bytes
    places = range(0, stored, 37) if whole else [*range(80), *range(stored - 20, stored)]
    for place in places:
        flipped = body.copy()
        flipped[start + place] ^= 1 << (place % 8)
        assert decode(group, flipped).codes == [Code.OK, Code.CORRUPT], place
    # What is behind the block is padding, and nobody's concern.
    assert size_bytes > stored or sealer is None
    if size_bytes > stored:
        body[start + stored :][: size_bytes - stored] = 1
        assert decode(group, body).codes == [Code.OK, Code.OK]


@BOTH
def test_frames_elsewhere_are_not_what_was_asked_for(sealer: object) -> None:
    group, other = Group(sealer=sealer), Group(sealer=sealer, seed=1)  # type: ignore[arg-type]
    body, shape = group.encode(), group.shape
    (one, size), (two, _) = shape.span(1, 1), shape.span(2, 1)
    swapped = body.copy()
    swapped[one : one + size], swapped[two : two + size] = body[two:][:size], body[one:][:size]
    corrupt = Code.CORRUPT
    assert decode(group, swapped).codes == [Code.OK, corrupt, corrupt, Code.OK]
    assert decode(group, other.encode()).codes == [corrupt] * 4
    keys = group.keys.copy()
    keys[3, 15] ^= 1
    assert decode(group, body, keys=keys).codes == [Code.OK] * 3 + [corrupt]


def test_the_right_key_over_the_wrong_bytes_is_corrupt() -> None:
    """A head that is right in itself does not vouch for the block behind it."""
    group = Group()
    body = group.encode()
    lying = Group()
    lying.blocks[2, 7] ^= 1
    start, size_bytes = group.shape.span(2, 1)
    body[start + 64 : start + size_bytes] = lying.encode()[start + 64 : start + size_bytes]
    assert decode(group, body).codes == [Code.OK, Code.OK, Code.CORRUPT, Code.OK]


@pytest.mark.parametrize("offset", [0, 16, 32, 48, 52])
def test_a_head_that_says_something_else_is_not_what_was_asked_for(offset: int) -> None:
    """Key, salt, checksum, place, bytes: the head's own checksum is right, and the block is."""
    group = Group()
    body = group.encode()
    start, _ = group.shape.span(1, 1)
    head = bytearray(body[start : start + 56].tobytes())
    head[offset] ^= 2
    body[start : start + 64] = np.frombuffer(with_crc(bytes(head)), np.uint8)
    assert decode(group, body).codes == [Code.OK, Code.CORRUPT, Code.OK, Code.OK]


def test_expired_frames_are_stale() -> None:
    group = Group(expiry_s=NOW_S)
    body = group.encode()
    assert decode(group, body, now_s=NOW_S - 1).codes == [Code.OK] * 4
    assert decode(group, body, now_s=NOW_S).codes == [Code.STALE] * 4
    assert decode(group, body).codes == [Code.OK] * 4


@BOTH
def test_a_buffer_that_ends_early_is_short(sealer: object) -> None:
    group = Group(sealer=sealer)  # type: ignore[arg-type]
    shape, body = group.shape, group.encode()
    for cut in (0, 1, 63, 64, 64 + shape.stored_bytes - 1, 64 + shape.stored_bytes):
        blocks = np.zeros_like(group.blocks)
        codes, _ = decode_frames(
            shape, body[128 : 128 + 2 * shape.frame_bytes + cut].data, first=0, keys=group.keys,
            addresses=addresses_of(blocks), sealer=group.sealer, name=group.name(),
        )  # fmt: skip
        third = Code.OK if cut == 64 + shape.stored_bytes else Code.SHORT
        assert codes.tolist() == [Code.OK, Code.OK, third, Code.SHORT]


def test_blocks_without_an_address_are_skipped() -> None:
    group = Group()
    blocks = np.zeros_like(group.blocks)
    addresses = addresses_of(blocks)
    addresses[1] = 0
    codes, checksums = decode_frames(
        group.shape, group.encode()[128:].data, first=0, keys=group.keys, addresses=addresses
    )
    assert codes.tolist() == [Code.OK, Code.SKIPPED, Code.OK, Code.OK]
    assert (blocks[[0, 2, 3]] == group.blocks[[0, 2, 3]]).all()
    assert not blocks[1].any()
    assert checksums[1] == 0


@BOTH
def test_a_block_that_is_not_right_in_memory_is_not_stored(sealer: object) -> None:
    group = Group(sealer=sealer)  # type: ignore[arg-type]
    checksums = group.checksums
    group.blocks[2, 4000] ^= 4
    with pytest.raises(CorruptBlock, match="block 2 of 4") as caught:
        encode(
            group.shape, group.facts, group.keys, checksums, addresses_of(group.blocks),
            sealer=group.sealer,
        )  # fmt: skip
    assert caught.value.offset == 2
    assert caught.value.key == group.keys[2].tobytes().hex()


@BOTH
def test_a_body_may_be_written_where_another_was(sealer: object) -> None:
    """No byte of the former one is left, in the padding neither."""
    group = Group(block_bytes=4100, sealer=sealer)  # type: ignore[arg-type]
    target = np.full(group.shape.object_bytes, 0xEE, np.uint8)
    body = encode(
        group.shape, group.facts, group.keys, group.checksums, addresses_of(group.blocks),
        sealer=group.sealer, target=target,
    )  # fmt: skip
    assert body is target
    padding = target[128 : group.shape.footer_span[0]].reshape(4, -1)
    assert not padding[:, 64 + group.shape.stored_bytes :].any()
    if sealer is None:
        assert body.tobytes() == model_body(group)


@pytest.mark.parametrize("size_bytes", [0, 1, 127])
def test_a_header_cut_short(size_bytes: int) -> None:
    with pytest.raises(CorruptBlock, match=f"object it is damaged: {size_bytes} of the 128 bytes"):
        read_header(Group().encode()[:size_bytes], "it")


def test_every_flipped_bit_of_header_and_footer_is_found() -> None:
    group = Group(num_blocks=2)
    body = group.encode()
    for bit in range(128 * 8):
        flipped = body[:128].copy()
        flipped[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(CorruptBlock, match="damaged"):
            read_header(flipped)
    footer = body[group.shape.footer_span[0] :]
    for bit in range(len(footer) * 8):
        flipped = footer.copy()
        flipped[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(CorruptBlock, match="damaged"):
            read_footer(flipped)


def test_another_version_is_no_damage() -> None:
    group = Group()
    body = group.encode().tobytes()
    later = with_crc(body[:8] + (2).to_bytes(4, "little") + body[12:120])
    with pytest.raises(IncompatibleError, match=r"version 2.*--other-versions") as caught:
        read_header(later)
    assert (caught.value.ours, caught.value.theirs) == (1, 2)
    footer = body[group.shape.footer_span[0] :]
    at = len(footer) - 24
    with pytest.raises(IncompatibleError, match="version 3"):
        read_footer(with_crc(footer[:at] + (3).to_bytes(4, "little") + footer[at + 4 : -8]))


@pytest.mark.parametrize(
    ("offset", "value"),
    [(12, 1), (12, 2), (12, 1 << 31), (16, 0), (16, 4097), (20, 4095), (20, 1 << 30), (24, 1),
     (80, 1), (96, 1), (104, 1), (112, 1)],
)  # fmt: skip
def test_a_header_that_contradicts_itself(offset: int, value: int) -> None:
    data = bytearray(Group().encode()[:128].tobytes())
    data[offset : offset + 4] = value.to_bytes(4, "little")
    with pytest.raises(CorruptBlock, match="senseless"):
        read_header(with_crc(bytes(data[:120])))


def test_a_footer_of_another_object_does_not_fit() -> None:
    group = Group()
    header, footer = read_header(group.encode()), read_footer(group.encode())
    assert footer.fits(header)
    assert not read_footer(Group(num_blocks=3).encode()).fits(header)
    assert not read_footer(Group(seed=1).encode()).fits(header)
    assert not read_footer(Group(block_bytes=8192).encode()).fits(header)
    assert not replace(footer, offsets=footer.offsets + np.uint64(1)).fits(header)


@pytest.mark.parametrize(
    ("num_blocks", "footer_bytes"), [(0, 32), (3, 192), (5, 192), (4, 191), (4, 1 << 40), (4, 31)]
)
def test_a_footer_that_contradicts_itself(num_blocks: int, footer_bytes: int) -> None:
    data = bytearray(read_tail())
    data[-20:-8] = num_blocks.to_bytes(4, "little") + footer_bytes.to_bytes(8, "little")
    body = data[:-8]
    body += header_module.crc64(bytes(body[-footer_bytes + 8 :])).to_bytes(8, "little")
    with pytest.raises(CorruptBlock, match="damaged"):
        read_footer(bytes(body))


def read_tail() -> bytes:
    return Group().encode()[-192:].tobytes()


@pytest.mark.parametrize(
    ("num_blocks", "block_bytes", "part"),
    [(0, 4096, "1 to 4096"), (4097, 4096, "1 to 4096"), (1, 4095, "4096 to"),
     (1, (64 << 20) + 1, "67108864 fit"), (80, 64 << 20, "fewer blocks")],
)  # fmt: skip
def test_shapes_that_no_object_has(num_blocks: int, block_bytes: int, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        GroupShape(num_blocks, block_bytes)


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 0), (0, 5), (4, 1), (3, 2)])
def test_spans_beyond_an_object(first: int, count: int) -> None:
    with pytest.raises(UsageError, match="not within an object of 4"):
        GroupShape(4, 4096).span(first, count)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(4096, 1 << 20), st.booleans(), st.data())
def test_spans_lie_one_behind_the_other(
    num_blocks: int, block_bytes: int, is_sealed: bool, data: st.DataObject
) -> None:
    shape = GroupShape(num_blocks, block_bytes, is_sealed)
    first = data.draw(st.integers(0, num_blocks - 1))
    start, size_bytes = shape.span(0, num_blocks)
    assert start == 128
    assert shape.footer_span == (start + size_bytes, 40 * num_blocks + 32)
    assert sum(shape.footer_span) == shape.object_bytes
    place, frame_bytes = shape.span(first, 1)
    assert place == 128 + first * frame_bytes
    assert place % 64 == frame_bytes % 64 == 0
    assert 0 <= frame_bytes - 64 - shape.stored_bytes < 64


def test_arrays_that_do_not_fit_are_refused() -> None:
    group = Group()
    addresses = addresses_of(group.blocks)
    good = {"keys": group.keys, "checksums": group.checksums, "addresses": addresses}
    for wrong in ({"keys": group.keys[:3]}, {"checksums": group.checksums[:3]},
                  {"addresses": addresses[:3]}, {"sealer": SEALER},
                  {"target": np.zeros(7, np.uint8)}):  # fmt: skip
        with pytest.raises(UsageError):
            encode(group.shape, group.facts, **{**good, **wrong})
    with pytest.raises(UsageError, match="aligned"):
        encode(group.shape, replace(group.facts, first_block=2), **good)
    with pytest.raises(UsageError, match="need a sealer"):
        encode(replace(group.shape, is_sealed=True), group.facts, **good)
