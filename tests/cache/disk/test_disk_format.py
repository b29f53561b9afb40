"""Headers and records: golden bytes, every flipped bit, the arithmetic of sizes."""

import uuid
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.cache.disk import format as disk_format
from kvx.cache.disk.checksum import crc64
from kvx.cache.disk.format import ExtentHeader, ExtentState, Superblock
from kvx.cache.disk.record import (
    RECORD_DTYPE,
    BlockRecords,
    RecordKind,
    classify_records,
    kill_records,
    pack_records,
    unpack_records,
)
from kvx.errors import IncompatibleError, StorageError, UsageError
from tests.cache.disk.disk_samples import make_records

UUID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff").bytes
SUPERBLOCK = Superblock(
    uuid=UUID, created_s=1_700_000_000, capacity_bytes=100 << 30, extent_bytes=2 << 30
)
HEADER = ExtentHeader(
    uuid=UUID, number=7, ordinal=3, slot_bytes=2 << 20, num_slots=1023, created_s=1_700_000_001
)

# The bytes on disk. If one of these changes, FORMAT_VERSION must change with it.
GOLDEN_SUPERBLOCK = (
    "4b565853544f52450100000000000000"
    "00112233445566778899aabbccddeeff"
    "00f15365000000000000000019000000"
    "00000080000000000000000000000000"
)
GOLDEN_HEADER = (
    "4b56584558544e540100000001000000"
    "00112233445566778899aabbccddeeff"
    "07000000030000000000200000000000"
    "ff030000000000000010000000000000"
    "001002000000000001f1536500000000"
)
GOLDEN_RECORD = (
    "4b565242010000000001020304050607"
    "08090a0b0c0d0e0fa4a3a2a1ffff1f00"
    "8877665544332211f0f1f2f3f4f5f6f7"
    "f8f9fafbfcfdfeffc100000005000000"
    "00f153650000000002f1536500000000"
    "10ff536500000000d8d7d6d5d4d3d2d1"
    "0700000000000000b8b7b6b5b4b3b2b1"
    "0000000000000000ee2699cc659d5907"
)


def test_golden_superblock() -> None:
    data = disk_format.pack_superblock(SUPERBLOCK)
    assert data[:64].hex() == GOLDEN_SUPERBLOCK
    assert data[504:512].hex() == "7ee35bee8711eb24"
    assert not any(data[64:504])
    assert not any(data[512:])
    assert disk_format.unpack_superblock(data, "kvx.store") == SUPERBLOCK


def test_golden_header() -> None:
    data = disk_format.pack_header(HEADER)
    assert data[:80].hex() == GOLDEN_HEADER
    assert data[504:512].hex() == "ba62621f2c3a74f4"
    assert not any(data[80:504])
    assert not any(data[512:])
    assert disk_format.unpack_header(data, "extent-000007.kvx") == HEADER


def golden_block() -> BlockRecords:
    def row(text: str) -> np.ndarray:
        return np.frombuffer(bytes.fromhex(text), dtype=np.uint8).reshape(1, 16)

    return BlockRecords(
        keys=row("000102030405060708090a0b0c0d0e0f"),
        payload_bytes=np.array([0x1FFFFF], dtype=np.uint32),
        checksums=np.array([0x1122334455667788], dtype=np.uint64),
        generations=np.array([0xA1A2A3A4], dtype=np.uint32),
        namespaces=row("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"),
        tenants=np.array([0xB1B2B3B4B5B6B7B8], dtype=np.uint64),
        heat=np.array([0xC1], dtype=np.uint8),
        stored_at_s=np.array([1_700_000_000], dtype=np.uint64),
        last_used_s=np.array([1_700_000_002], dtype=np.uint64),
        expiry_s=np.array([1_700_003_600], dtype=np.uint64),
    )


def pack_one(block: BlockRecords, *, index: int = 5, extent: int = 7) -> np.ndarray:
    return pack_records(
        block,
        np.array([index], dtype=np.int64),
        extent_number=extent,
        sequences=np.array([0xD1D2D3D4D5D6D7D8], dtype=np.uint64),
    )


def kind_of(packed: np.ndarray, *, index: int = 5, extent: int = 7) -> RecordKind:
    return RecordKind(int(classify_records(packed, first_index=index, extent_number=extent)[0]))


def test_golden_record() -> None:
    packed = pack_one(golden_block())
    assert packed.tobytes().hex() == GOLDEN_RECORD
    assert kind_of(packed) == RecordKind.LIVE


def test_record_round_trip() -> None:
    records = make_records(100)
    indices = np.arange(40, 140)
    sequences = np.arange(7, 107, dtype=np.uint64)
    packed = pack_records(records, indices, extent_number=9, sequences=sequences)
    assert (classify_records(packed, first_index=40, extent_number=9) == RecordKind.LIVE).all()
    assert (packed["sequence"] == sequences).all()
    found = unpack_records(packed)
    for field in BlockRecords.__dataclass_fields__:
        assert (getattr(found, field) == getattr(records, field)).all(), field
    kill_records(packed)
    assert (classify_records(packed, first_index=40, extent_number=9) == RecordKind.DEAD).all()


def test_every_flipped_bit_of_a_record_is_detected() -> None:
    whole = np.frombuffer(pack_one(golden_block()).tobytes(), dtype=np.uint8)
    for bit in range(1024):
        flipped = whole.copy()
        flipped[bit // 8] ^= 1 << (bit % 8)
        kind = kind_of(flipped.view(RECORD_DTYPE))
        assert kind == (RecordKind.FOREIGN if bit < 32 else RecordKind.TORN), bit


def test_every_flipped_bit_of_a_header_is_detected() -> None:
    first_sector = range(512 * 8)
    # One bit of each byte of the zeros behind it; all eight take 15 s and go the same way.
    behind = [byte * 8 + byte % 8 for byte in range(512, 4096)]
    for data, unpack, bits in (
        (disk_format.pack_header(HEADER), disk_format.unpack_header, [*first_sector, *behind]),
        (disk_format.pack_superblock(SUPERBLOCK), disk_format.unpack_superblock, first_sector),
    ):
        for bit in bits:
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << (bit % 8)
            with pytest.raises(StorageError, match=r"file is damaged: .*recreate=True"):
                unpack(bytes(flipped), "file")


def test_record_kinds() -> None:
    packed = pack_one(golden_block())
    assert kind_of(packed, index=6) == RecordKind.MISPLACED
    assert kind_of(packed, extent=8) == RecordKind.MISPLACED
    assert kind_of(np.zeros(1, dtype=RECORD_DTYPE)) == RecordKind.EMPTY
    assert kind_of(np.full(128, 0xFF, dtype=np.uint8).view(RECORD_DTYPE)) == RecordKind.FOREIGN
    noise = packed.copy()
    noise["sequence"] += 1
    assert kind_of(noise) == RecordKind.TORN


def test_record_never_crosses_a_sector() -> None:
    assert disk_format.SECTOR_BYTES % disk_format.RECORD_BYTES == 0
    assert HEADER.records_offset % disk_format.SECTOR_BYTES == 0


def reseal(data: bytes) -> bytes:
    crc = crc64(data[:504] + data[512:])
    return data[:504] + crc.to_bytes(8, "little") + data[512:]


def test_other_version_is_incompatible_and_damage_is_not() -> None:
    data = disk_format.pack_superblock(SUPERBLOCK)
    other = data[:8] + (2).to_bytes(4, "little") + data[12:]
    with pytest.raises(IncompatibleError) as caught:
        disk_format.unpack_superblock(reseal(other), "kvx.store")
    assert (caught.value.ours, caught.value.theirs) == (1, 2)
    with pytest.raises(StorageError, match="checksum"):
        disk_format.unpack_superblock(other, "kvx.store")


@pytest.mark.parametrize(
    ("offset", "value"), [(12, 9), (40, 4097), (48, 0), (56, 8192), (64, 4096)]
)
def test_sealed_but_senseless_header(offset: int, value: int) -> None:
    data = bytearray(disk_format.pack_header(HEADER))
    width = 4 if offset == 12 else 8
    data[offset : offset + width] = value.to_bytes(width, "little")
    with pytest.raises(StorageError, match="damaged"):
        disk_format.unpack_header(reseal(bytes(data)), "extent-000007.kvx")


def test_retired_header_differs_in_the_first_sector_only() -> None:
    live = disk_format.pack_header(HEADER)
    retired = disk_format.pack_header(replace(HEADER, state=ExtentState.RETIRED))
    assert live[:512] != retired[:512]
    assert live[512:] == retired[512:]


@given(st.integers(1, 16384), st.integers(0, 1 << 34))
def test_slots_that_fit_is_the_largest(pages: int, file_bytes: int) -> None:
    slot_bytes = pages * 4096
    fit = disk_format.slots_that_fit(slot_bytes, file_bytes)
    assert fit == 0 or disk_format.extent_file_bytes(slot_bytes, fit) <= file_bytes
    assert disk_format.extent_file_bytes(slot_bytes, fit + 1) > file_bytes


def test_default_extent_bytes() -> None:
    assert disk_format.default_extent_bytes(1 << 30) == 64 << 20
    assert disk_format.default_extent_bytes(1 << 38) == 1 << 32
    assert disk_format.default_extent_bytes(1 << 50) == 16 << 30


@pytest.mark.parametrize("slot_bytes", [0, 4095, 4097, 6144, (64 << 20) + 4096, -4096])
def test_slot_bytes_limits(slot_bytes: int) -> None:
    with pytest.raises(UsageError, match="multiple of 4096"):
        disk_format.check_slot_bytes(slot_bytes)


def test_check_names_the_array_that_does_not_fit() -> None:
    records = make_records(3)
    with pytest.raises(UsageError, match=r"heat.*int64"):
        replace(records, heat=np.zeros(3, dtype=np.int64)).check(3, 4096)
    with pytest.raises(UsageError, match=r"keys.*\(4, 16\)"):
        records.check(4, 4096)
    for wrong in (0, 4097):
        with pytest.raises(UsageError, match="1 to 4096"):
            replace(records, payload_bytes=np.full(3, wrong, dtype=np.uint32)).check(3, 4096)
