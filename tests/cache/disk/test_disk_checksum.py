"""The vectorised checksum is CRC-64/NVME."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.cache.disk.checksum import crc64, crc64_rows


def test_published_check_value() -> None:
    assert crc64(b"123456789") == 0xAE8B14860A799888


@given(st.integers(1, 200), st.integers(0, 3), st.integers(0, 2**32))
def test_rows_agree_with_the_loop(row_bytes: int, num_rows: int, seed: int) -> None:
    rows = np.random.default_rng(seed).integers(0, 256, (num_rows, row_bytes), dtype=np.uint8)
    assert [int(value) for value in crc64_rows(rows)] == [crc64(row.tobytes()) for row in rows]


@pytest.mark.parametrize("num_rows", [511, 512, 513])
def test_rows_across_steps_and_strided(num_rows: int) -> None:
    rows = np.random.default_rng(1).integers(0, 256, (num_rows, 128), dtype=np.uint8)[:, :120]
    checksums = crc64_rows(rows)
    for row in (0, num_rows // 2, num_rows - 1):
        assert int(checksums[row]) == crc64(rows[row].tobytes())


def test_a_million_records_take_less_than_two_seconds() -> None:
    rows = np.random.default_rng(1).integers(0, 256, (1_000_000, 120), dtype=np.uint8)
    start_s = time.process_time()
    crc64_rows(rows)
    assert time.process_time() - start_s < 2.0
