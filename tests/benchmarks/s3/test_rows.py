"""The rows of `kvx bench s3`, with little of everything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvx_bench.case import Options
from kvx_bench.cases import s3
from kvx_bench.cases.s3 import S3Case
from kvx_bench.row import Row
from kvx_bench.s3 import outage
from kvx_bench.s3.rgw import Rgw
from kvx_bench.s3.service import Service
from tests.s3.servers import open_bucket

CALLS = 2


@pytest.fixture(scope="module")
def rows(needs_rgw: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Row]]:
    with pytest.MonkeyPatch.context() as patch, open_bucket(needs_rgw) as bucket:
        assert needs_rgw.keys is not None
        for name, text in needs_rgw.keys.as_environment().items():
            patch.setenv(name, text)
        patch.setattr(s3, "_BLOCK_BYTES", 64 << 10)
        patch.setattr(s3, "_BLOCKS_QUICK", 8)
        patch.setattr(s3, "_LONG_PROMPT_QUICK", 16)
        patch.setattr(s3, "_ROUNDS_QUICK", 1)
        patch.setattr(outage, "_SERVE_S", 0.2)
        patch.setattr(outage, "_CALLS_A_ROUND", CALLS)
        options = Options(
            is_quick=True, path=tmp_path_factory.mktemp("bench"), threads=1,
            endpoint=needs_rgw.url, bucket=bucket.name, concurrency=4,
        )  # fmt: skip
        assert S3Case().why_not(options) == ""
        yield {row.key: row for row in S3Case().run(options)}
        assert bucket.names() == []


@pytest.mark.parametrize("verb", ["get", "put"])
def test_kvx_is_beside_the_best_of_the_others(rows: dict[str, Row], verb: str) -> None:
    row = rows[f"s3.{verb}.64KiB"]
    others = {
        key.split(".")[2]: one for key, one in rows.items()
        if key.startswith("s3.baseline.") and f".{verb}." in key
    }  # fmt: skip
    assert {"obstore", "boto3"} <= set(others)
    best = max(others, key=lambda name: others[name].gb_per_s or 0)
    assert row.limit_name == best
    assert row.limit == others[best].gb_per_s
    assert set(row.ratios) == set(others) - {best}
    leanest = min(others, key=lambda name: others[name].cpu_s_per_gb or 0)
    assert f"that of the leanest, {leanest}" in row.note


@pytest.mark.parametrize("verb", ["get", "put"])
def test_lines_are_beside_shorter_ones(rows: dict[str, Row], verb: str) -> None:
    assert rows[f"s3.{verb}.64KiB.line-0ms"].limit_name == "direct"
    longer = rows[f"s3.{verb}.64KiB.line-50ms"]
    assert longer.limit_name == "line-0ms"
    assert set(longer.ratios) == {"direct"}
    # 8 blocks are one object: half a megabyte in at least 50 ms.
    assert (longer.gb_per_s or 0) < 8 * (64 << 10) / 0.05 / 1e9


def test_first_blocks_are_told_in_single_gets(rows: dict[str, Row]) -> None:
    for name in ("direct", "line-50ms"):
        row = rows[f"s3.first-block.16.{name}"]
        assert 0 < (row.p50_us or 0) <= (row.p99_us or 0)
        assert "single gets of one block" in row.note
    assert (rows["s3.first-block.16.line-50ms"].p50_us or 0) > 50_000


def test_a_frozen_server_is_felt_by_nobody_who_has_his_blocks(rows: dict[str, Row]) -> None:
    assert rows["s3.frozen.serve.dram"].limit_name == "awake"
    call = rows["s3.frozen.call"]
    assert 400_000 < (call.p50_us or 0) < 5_000_000
    assert f"of {CALLS} ended later" in call.note


def test_without_a_server_it_says_how_to_have_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(Rgw, "why_not", lambda: "radosgw not installed; apt-get install radosgw")
    options = Options(is_quick=True, path=tmp_path, threads=1)
    assert "no --endpoint is named" in S3Case().why_not(options)
    assert "apt-get install radosgw" in S3Case().why_not(options)
