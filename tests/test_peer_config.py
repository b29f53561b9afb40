"""The settings of the peer tier that are not in the file: its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvx.config import CacheConfig
from kvx.errors import ConfigError
from kvx.key_source import read_key
from kvx.tier_config import PeerTierConfig

DRAM = {"kind": "dram", "capacity": "64MiB"}
PEER = {"kind": "peer", "peers": ["b"]}


def test_the_key_of_peers_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVX_PEER_KEY", "a secret of the house")
    config = CacheConfig.load({"tiers": [DRAM, {**PEER, "key_file": "/nowhere"}]})
    tier = config.tier(PeerTierConfig)
    assert tier is not None
    assert (tier.key, tier.key_file) == ("a secret of the house", None)
    assert "secret of" not in repr(config) + repr(config.to_dict())
    # Other tiers have no key: the variable is none of their business.
    nvme = {"kind": "nvme", "path": "kvx-data", "capacity": "1GiB"}
    assert CacheConfig.load({"tiers": [DRAM, nvme]}).tiers[0] == config.dram


def test_a_key_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b" 0123456789abcdef\n")
    path.chmod(0o600)
    assert read_key(path) == b"0123456789abcdef"
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="others may read"):
        read_key(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(tmp_path / "none")
    path.chmod(0o600)
    path.write_bytes(b"k" * 5000)
    with pytest.raises(ConfigError, match="no key"):
        read_key(path)
