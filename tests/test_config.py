"""Configuration from files, mappings, code and the environment, and what its errors say."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kvx
from kvx.config import BreakerConfig, CacheConfig, IoBackend, TenantConfig
from kvx.errors import ConfigError, UsageError
from kvx.tier_config import (
    AdmissionConfig,
    DramTierConfig,
    Durability,
    Eviction,
    NvmeTierConfig,
    PeerTierConfig,
    Prefault,
    WriteMode,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

DRAM: Mapping[str, object] = {"kind": "dram", "capacity": "64MiB"}
HBM: Mapping[str, object] = {"kind": "hbm", "capacity": "8MiB"}
NVME: Mapping[str, object] = {"kind": "nvme", "path": "kvx-data", "capacity": "1GiB"}
S3: Mapping[str, object] = {"kind": "s3", "bucket": "b"}
PEER: Mapping[str, object] = {"kind": "peer", "peers": ["b"]}

YAML = """
tiers:
  - {kind: dram, capacity: 4GiB, eviction: s3fifo, prefault: eager, numa_node: 1, extent: 32MiB}
  - kind: nvme
    path: /data/kvx
    capacity: 1.5TiB
    eviction: lru
    write: back
    durability: each
    admission: {min_frequency: 2, bytes_per_day: 200GB}
    rewarm: false
    recreate: true
    deadline_s: 12
    extent: 1GiB
    queue_depth: 128
  - {kind: peer, peers: ["tcp://a:7000", b], serve: false, max_in_flight: 1GiB, key_file: /k}
tenants:
  - {name: a, salt: pepper, dram_quota: 1GiB, nvme_quota: 10GiB}
deadline_s: 2.5
copy_threads: 3
io_backend: posix
breaker: {failures: 5, reset_s: 0.5}
events_capacity: 100
"""

TOML = """
deadline_s = 2.5
copy_threads = 3
io_backend = "posix"
breaker = {failures = 5, reset_s = 0.5}
events_capacity = 100

[[tiers]]
kind = "dram"
capacity = "4GiB"
eviction = "s3fifo"
prefault = "eager"
numa_node = 1
extent = "32MiB"

[[tiers]]
kind = "nvme"
path = "/data/kvx"
capacity = "1.5TiB"
eviction = "lru"
write = "back"
durability = "each"
rewarm = false
recreate = true
deadline_s = 12
extent = "1GiB"
queue_depth = 128

[tiers.admission]
min_frequency = 2
bytes_per_day = "200GB"

[[tiers]]
kind = "peer"
peers = ["tcp://a:7000", "b"]
serve = false
max_in_flight = "1GiB"
key_file = "/k"

[[tenants]]
name = "a"
salt = "pepper"
dram_quota = "1GiB"
nvme_quota = "10GiB"
"""

EVERYTHING = CacheConfig(
    tiers=(
        DramTierConfig(
            capacity_bytes=4 << 30,
            eviction=Eviction.S3FIFO,
            prefault=Prefault.EAGER,
            numa_node=1,
            extent_bytes=32 << 20,
        ),
        NvmeTierConfig(
            path=Path("/data/kvx"),
            capacity_bytes=3 << 39,
            eviction=Eviction.LRU,
            write=WriteMode.BACK,
            durability=Durability.EACH,
            admission=AdmissionConfig(min_frequency=2, bytes_per_day=200 * 10**9),
            rewarm=False,
            recreate=True,
            deadline_s=12.0,
            extent_bytes=1 << 30,
            queue_depth=128,
        ),
        PeerTierConfig(
            peers=("tcp://a:7000", "b"),
            serve=False,
            max_in_flight_bytes=1 << 30,
            key_file=Path("/k"),
        ),
    ),
    tenants=(TenantConfig("a", "pepper", 1 << 30, 10 << 30),),
    deadline_s=2.5,
    copy_threads=3,
    io_backend=IoBackend.POSIX,
    breaker=BreakerConfig(failures=5, reset_s=0.5),
    events_capacity=100,
)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [one for one in os.environ if one.startswith("KVX_")]:
        monkeypatch.delenv(name)


def nvme_of(config: CacheConfig) -> NvmeTierConfig:
    tier = config.tier(NvmeTierConfig)
    assert tier is not None
    return tier


@pytest.mark.parametrize(("name", "text"), [("c.yaml", YAML), ("c.yml", YAML), ("c.toml", TOML)])
def test_files_say_the_same_as_objects(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert CacheConfig.load(path) == EVERYTHING
    assert CacheConfig.load(str(path)) == EVERYTHING


def test_objects_and_plain_values_load_unchanged() -> None:
    assert CacheConfig.load(EVERYTHING) == EVERYTHING
    plain = EVERYTHING.to_dict()
    plain["tenants"] = [
        {"name": "a", "salt": "pepper", "dram_quota": "1GiB", "nvme_quota": 10 << 30}
    ]
    assert CacheConfig.load(plain) == EVERYTHING


def test_defaults() -> None:
    config = CacheConfig.load({"tiers": [DRAM, NVME]})
    assert config.dram == DramTierConfig(64 << 20)
    assert nvme_of(config) == NvmeTierConfig(Path("kvx-data"), 1 << 30)
    assert config == CacheConfig(config.tiers)
    assert CacheConfig.load({"tiers": [DRAM]}).tier(NvmeTierConfig) is None


@pytest.mark.parametrize(
    ("changes", "key", "parts"),
    [
        ({"tiers": []}, "tiers", ["[]", "a list of tiers", "dram"]),
        ({"tiers": "dram"}, "tiers", ["'dram'", "a list of tiers"]),
        ({"tiers": None}, "tiers", ["None", "a list of tiers"]),
        ({"tiers": [NVME]}, "tiers", ["['nvme']", "with dram"]),
        ({"tiers": [NVME, DRAM]}, "tiers", ["['nvme', 'dram']", "in this order"]),
        ({"tiers": [DRAM, DRAM]}, "tiers", ["['dram', 'dram']", "at most once"]),
        ({"tiers": [DRAM, NVME, NVME]}, "tiers", ["at most once"]),
        ({"tiers": [{"capacity": 1 << 20}]}, "tiers[0].kind", ["None", "nvme, s3 or peer"]),
        ({"tiers": [{"kind": "ram"}]}, "tiers[0].kind", ["'ram'", "nvme, s3 or peer"]),
        ({"tiers": [DRAM, {"kind": "s3"}]}, "tiers[1].bucket", ["missing"]),
        (
            {"tiers": [DRAM, {**S3, "eviction": "lfu"}]},
            "tiers[1].eviction",
            ["'lfu'", "lru or fifo"],
        ),
        (
            {"tiers": [DRAM, {**S3, "seal_key_file": "a", "seal_key_env": "B"}]},
            "tiers[1].seal_key_env",
            ["one of them"],
        ),
        ({"tiers": [PEER, DRAM]}, "tiers", ["['peer', 'dram']", "in this order"]),
        ({"tiers": [DRAM, {**PEER, "peer": []}]}, "tiers[1].peer", ["'peers'"]),
        ({"tiers": [DRAM, {**PEER, "peers": [7]}]}, "tiers[1].peers[0]", ["7", "an address"]),
        ({"tiers": [DRAM, {**PEER, "serve": 1}]}, "tiers[1].serve", ["1", "bool"]),
        ({"tiers": [DRAM, {**PEER, "key": 99887}]}, "tiers[1].key", ["***", "str"]),
        ({"tiers": [DRAM, {**PEER, "key": "k", "key_file": "f"}]}, "tiers[1].key_file", ["given"]),
        ({"tiers": [7]}, "tiers[0].kind", ["None", "nvme, s3 or peer"]),
        ({"tiers": [{"kind": "dram"}]}, "tiers[0].capacity", ["missing"]),
        ({"tiers": [DRAM, {**NVME, "path": ""}]}, "tiers[1].path", ["''", "Path"]),
        ({"tiers": [DRAM, {**NVME, "capcity": 1}]}, "tiers[1].capcity", ["'capacity'"]),
        ({"tiers": [DRAM, HBM]}, "tiers", ["['dram', 'hbm']", "in this order"]),
        ({"tiers": [{**HBM, "emulation": "yes"}, DRAM]}, "tiers[0].emulation", ["auto, always"]),
        ({"gpu": {"sm": "none"}}, "gpu.sm", ["'none'", "auto, never"]),
        ({"gpu": {"ctas": 0}}, "gpu.ctas", ["0", "at least 1"]),
        ({"tiers": [{**DRAM, "eviction": "lur"}]}, "tiers[0].eviction", ["'lur'", "lru, lfu"]),
        ({"tiers": [{**DRAM, "capacity": "8G"}]}, "tiers[0].capacity", ["'8G'", '"8GiB"']),
        (
            {"tiers": [{**DRAM, "capacity": 65535}]},
            "tiers[0].capacity",
            ["65535", "at least 65536"],
        ),
        ({"tiers": [{**DRAM, "numa_node": -2}]}, "tiers[0].numa_node", ["-2", "-1 and at most 63"]),
        ({"tiers": [DRAM, {**NVME, "durability": True}]}, "tiers[1].durability", ["none, batch"]),
        ({"tiers": [DRAM, {**NVME, "rewarm": "no"}]}, "tiers[1].rewarm", ["'no'", "bool"]),
        ({"tiers": [DRAM, {**NVME, "queue_depth": 0}]}, "tiers[1].queue_depth", ["at most 4096"]),
        (
            {"tiers": [DRAM, {**NVME, "admission": {"min_frequency": 16}}]},
            "tiers[1].admission.min_frequency",
            ["16", "at most 15"],
        ),
        ({"deadline_s": 0}, "deadline_s", ["0", "at least 0.001"]),
        ({"deadline_s": "5MB"}, "deadline_s", ["'5MB'", "a number"]),
        ({"deadline_s": float("inf")}, "deadline_s", ["inf"]),
        ({"deadline": 1}, "deadline", ["did you mean 'deadline_s'?"]),
        ({"copy_threads": 1.5}, "copy_threads", ["1.5", "whole number"]),
        ({"io_backend": "uring"}, "io_backend", ["'uring'", "auto, io_uring, posix"]),
        ({"breaker": {"failures": 0}}, "breaker.failures", ["0", "at least 1"]),
        ({"tenants": "a"}, "tenants", ["'a'", "a list of tenants"]),
        ({"tenants": [{"name": "a"}, {}]}, "tenants[1].name", ["missing"]),
        ({"tenants": [{"name": "a"}, {"name": "a"}]}, "tenants", ["['a', 'a']", "once"]),
        ({"tenants": [{"name": "a", "slat": 1}]}, "tenants[0].slat", ["did you mean 'salt'?"]),
        ({"tenants": [{"name": "a", "salt": 99887}]}, "tenants[0].salt", ["***", "str"]),
    ],
)
def test_errors_name_key_value_and_what_is_accepted(
    changes: dict[str, object], key: str, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        CacheConfig.load({"tiers": [DRAM], **changes})
    message = str(error.value)
    assert error.value.key == key, message
    assert message.startswith(key)
    assert all(part in message for part in parts), message
    assert "99887" not in message


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: CacheConfig(()), "tiers"),
        (lambda: CacheConfig((NvmeTierConfig(Path("x"), 1 << 20),)), "tiers"),
        (lambda: DramTierConfig(1), "capacity_bytes"),
        (lambda: DramTierConfig(1 << 20, eviction="lru"), "eviction"),  # type: ignore[arg-type]
        (lambda: NvmeTierConfig("x", 1 << 20), "path"),  # type: ignore[arg-type]
        (lambda: AdmissionConfig(min_frequency=0), "min_frequency"),
        (lambda: BreakerConfig(reset_s=-1), "reset_s"),
        (lambda: TenantConfig("a", dram_quota_bytes=-1), "dram_quota_bytes"),
        (lambda: CacheConfig((DramTierConfig(1 << 20),), deadline_s=float("nan")), "deadline_s"),
    ],
)
def test_objects_are_checked_when_they_are_made(make: object, key: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.key == key


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("c.json", "{}", "ends in .yaml, .yml or .toml"),
        ("c.yaml", "tiers: [", "c.yaml"),
        ("c.toml", "tiers = ", "c.toml"),
        ("c.yaml", "", "mapping"),
        ("c.yaml", "- dram", "mapping"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, name: str, text: str, part: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        CacheConfig.load(path)
    assert part in str(error.value)


def test_a_missing_file_and_another_type() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        CacheConfig.load("nowhere.yaml")
    with pytest.raises(ConfigError, match="mapping or the path of a file, not 5"):
        CacheConfig.load(5)


def test_the_environment_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "KVX_IO_BACKEND": "auto",
        "KVX_COPY_THREADS": "7",
        "KVX_DEADLINE_S": "0.25",
        "KVX_DRAM_CAPACITY": "128MiB",
        "KVX_NVME_CAPACITY": "2GiB",
        "KVX_NVME_PATH": "/elsewhere",
        "KVX_TENANT_SALT_A": "from outside",
    }.items():
        monkeypatch.setenv(name, value)
    config = CacheConfig.load(EVERYTHING)
    assert config.io_backend is IoBackend.AUTO
    assert (config.copy_threads, config.deadline_s) == (7, 0.25)
    assert config.dram == dataclasses.replace(EVERYTHING.dram, capacity_bytes=128 << 20)
    assert nvme_of(config) == dataclasses.replace(
        nvme_of(EVERYTHING), capacity_bytes=2 << 30, path=Path("/elsewhere")
    )
    assert config.tenants == (TenantConfig("a", "from outside", 1 << 30, 10 << 30),)
    assert config.breaker == EVERYTHING.breaker


def test_a_tenant_name_becomes_part_of_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVX_TENANT_SALT_TEAM_7_EU", "x")
    config = CacheConfig.load({"tiers": [DRAM], "tenants": [{"name": "team-7.eu"}, {"name": "b"}]})
    assert [tenant.salt for tenant in config.tenants] == ["x", ""]


@pytest.mark.parametrize(
    ("variable", "value", "key"),
    [
        ("KVX_IO_BACKEND", "uring", "io_backend"),
        ("KVX_COPY_THREADS", "many", "copy_threads"),
        ("KVX_DEADLINE_S", "1s", "deadline_s"),
        ("KVX_DRAM_CAPACITY", "lots", "tiers[0].capacity"),
        ("KVX_NVME_PATH", "", "tiers[1].path"),
    ],
)
def test_a_bad_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, key: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as error:
        CacheConfig.load({"tiers": [DRAM, NVME]})
    assert error.value.key == key
    assert variable in str(error.value)
    assert repr(value) in str(error.value)


def test_secrets_are_never_shown() -> None:
    plain = EVERYTHING.to_dict()
    quotas = {"dram_quota": "1GiB", "nvme_quota": "10GiB", "hbm_quota": None}
    assert plain["tenants"] == [{"name": "a", "salt": "***", **quotas}]
    for text in (repr(EVERYTHING), str(plain), repr(EVERYTHING.tenants[0])):
        assert "pepper" not in text
    namespace = EVERYTHING.namespace(
        {"model": "m", "dtype": "f", "block_bytes": 4096, "tenant": "a"}
    )
    assert namespace.salt == "pepper"
    assert "pepper" not in repr(namespace)


def test_namespaces_get_their_tenants_salt() -> None:
    facts = {"model": "m", "dtype": "f", "block_bytes": 4096}
    assert EVERYTHING.namespace(facts).salt == ""
    assert EVERYTHING.namespace({**facts, "tenant": "other"}).salt == ""
    assert EVERYTHING.namespace({**facts, "tenant": "a", "salt": "own"}).salt == "own"
    with pytest.raises(UsageError, match="needs block_bytes, dtype"):
        EVERYTHING.namespace({"model": "m"})
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        EVERYTHING.namespace({**facts, "modle": "m"})


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EVERYTHING.deadline_s = 1.0  # type: ignore[misc]
    assert kvx.CacheConfig is CacheConfig
