"""What `kvx doctor` says of the peers of a configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import kvx
from kvx.cli.main import main
from tests.cache.conftest import make_blocks, make_hashes, open_space

KEY = "a key for the doctor"


@pytest.fixture(autouse=True)
def _runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield
    assert not list((tmp_path / "kvx").glob("*.sock"))


def told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *tiers: dict[str, object]
) -> dict[str, dict[str, object]]:
    path = tmp_path / "cache.yaml"
    path.write_text(yaml.safe_dump({"tiers": [{"kind": "dram", "capacity": "1MiB"}, *tiers]}))
    assert main(["doctor", "--json", "--path", str(tmp_path), "--config", str(path)]) == 0
    return {one["subject"]: one for one in json.loads(capsys.readouterr().out)}


def test_peers_that_serve_and_that_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiers = [{"kind": "dram", "capacity": "1MiB"}, {"kind": "peer"}]
    with (
        kvx.Agent("a", key=KEY, listen="tcp://127.0.0.1:0") as one,
        kvx.Agent("c", key=KEY, listen=f"unix:{tmp_path / 'c.sock'}") as other,
        kvx.TieredCache.open({"tiers": tiers}, agent=one) as cache,
    ):
        open_space(cache).offload(make_hashes(5), make_blocks(5)).wait()
        tcp = next(address for address in one.addresses if address.startswith("tcp:"))
        unix = f"unix:{tmp_path / 'c.sock'}"
        tier = {"kind": "peer", "peers": [tcp, unix, "tcp://127.0.0.1:9"], "key": KEY}
        found = told(tmp_path, capsys, {**tier, "listen": "tcp://0.0.0.0:7000"})
        assert other.peers
    assert found[f"peer {tcp}"]["is_good"]
    assert "a is up over tcp and serves 5 blocks" in str(found[f"peer {tcp}"]["found"])
    assert not found[f"peer {unix}"]["is_good"]
    assert "no cache serves there" in str(found[f"peer {unix}"]["found"])
    assert not found["peer tcp://127.0.0.1:9"]["is_good"]
    assert found["peers on other hosts"]["is_good"]
    assert KEY not in json.dumps(found)


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(tmp_path, capsys, {"kind": "peer"})
    assert found["peers on this host"]["is_good"]
    assert "listen and a key" in str(found["peers on other hosts"]["remedy"])
    assert told(tmp_path, capsys)["peer tier"]["found"] == "not configured"


def test_a_key_that_is_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(tmp_path, capsys, {"kind": "peer", "key": "short"})
    assert "at least 16" in str(found["peers"]["found"])
