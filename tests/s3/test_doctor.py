"""What `kvx doctor` finds out about a bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvx.cli.s3 import s3_findings
from kvx.config import CacheConfig

if TYPE_CHECKING:
    from pathlib import Path

    from kvx.cli.finding import Finding
    from tests.s3.servers import Bucket


@pytest.fixture
def bucket(s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Return a bucket whose keys are in the environment."""
    keys = s3_bucket.service.keys
    assert keys is not None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_key)
    return s3_bucket


def findings(place: Bucket, **settings: object) -> list[Finding]:
    """Return what is said of the keys of a tier, and of its bucket."""
    tier = {"kind": "s3", "bucket": place.name, "endpoint": place.service.url, **settings}
    config = CacheConfig.load({"tiers": [{"kind": "dram", "capacity": "1MiB"}, tier]})
    return list(s3_findings(config))


def look(place: Bucket, **settings: object) -> tuple[bool, str]:
    """Return whether all is good with a bucket, and what is said."""
    _, finding = findings(place, **settings)
    return finding.is_good, finding.found


def test_a_bucket_that_works(bucket: Bucket) -> None:
    is_good, found = look(bucket)
    assert is_good, found
    assert "storing and deleting work" in found
    assert bucket.names() == [], "the probe is gone"


def test_a_bucket_that_is_read_only(bucket: Bucket) -> None:
    assert look(bucket, is_read_only=True)[0]
    assert bucket.names() == []


def test_a_bucket_that_is_not_there(bucket: Bucket) -> None:
    is_good, found = look(bucket, bucket="kvx-nobody-made-this")
    assert not is_good
    assert "kvx-nobody-made-this" in found


def test_nobody_who_answers(bucket: Bucket) -> None:
    is_good, found = look(bucket, endpoint="http://127.0.0.1:9", deadline_s=2.0)
    assert not is_good
    assert "127.0.0.1" in found


def test_keys_are_read(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEAL", "01" * 32)
    keys = {"a": {"env": "SEAL"}, "b": {"file": str(tmp_path / "none")}}
    sealing, answer = findings(bucket, seal_keys=keys)
    assert not sealing.is_good
    assert "seal_keys.b.file" in sealing.found
    assert answer.is_good
    sealing, _ = findings(bucket, seal_keys={"a": {"env": "SEAL"}})
    assert (sealing.is_good, sealing.found[:18]) == (True, "1 tenants have key")


def test_without_a_tier() -> None:
    (finding,) = s3_findings(None)
    assert finding.is_good
    assert finding.found == "not configured"
