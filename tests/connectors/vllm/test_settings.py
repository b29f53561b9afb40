"""Every wrong setting is refused at the start, with what to write instead."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.kv_offload.config import OffloadingConfig

import kvx
from kvx_vllm.settings import Settings, check_engine
from kvx_vllm.spec import KvxSpec
from tests.connectors.vllm.below import OneEngine
from tests.connectors.vllm.engine import open_engine

TIERS = {"tiers": [{"kind": "dram", "capacity": "1MiB"}]}


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({}, 'needs config, the path of kvx.yaml: "kv_connector_extra_config"'),
        ({"config": TIERS, "load_deadline": 3}, "has no load_deadline; kvx knows config, load_d"),
        ({"config": TIERS, "load_deadline_s": 0}, "load_deadline_s is 0; seconds above 0"),
        ({"config": TIERS, "store_deadline_s": "3"}, "store_deadline_s is '3'; seconds above 0"),
        ({"config": TIERS, "lookup_deadline_s": True}, "lookup_deadline_s is True; seconds"),
        ({"config": TIERS, "load_deadline_s": float("nan")}, "load_deadline_s is nan; seconds"),
        ({"config": TIERS, "load_deadline_s": float("inf")}, "load_deadline_s is inf; seconds"),
        ({"config": TIERS, "revision": 2}, "revision is 2; a text"),
        ({"config": {"tiers": [{"kind": "drum"}]}}, "drum"),
        ({"config": {"teers": []}}, "teers"),
        ({"config": 3}, "config"),
    ],
)
def test_what_the_connector_is_told(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(kvx.ConfigError) as caught:
        Settings.of(extra)
    assert said in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "kvx.yaml"
    with pytest.raises(kvx.ConfigError, match=r"kvx\.yaml"):
        Settings.of({"config": str(missing)})
    missing.write_text("tiers: [kind: dram")
    with pytest.raises(kvx.ConfigError, match=r"kvx\.yaml"):
        Settings.of({"config": str(missing)})
    missing.write_text("tiers:\n- {kind: dram, capacity: 1MiB}\n")
    assert Settings.of({"config": str(missing)}).cache.dram.capacity_bytes == 1 << 20


def engine(**changed: Any) -> Any:
    """Return the part of vLLM's settings that is looked at; all right but for what is changed."""
    transfer = {
        "kv_load_failure_policy": "recompute", "kv_role": "kv_both",
        "kv_connector_extra_config": {"config": TIERS},
    }  # fmt: skip
    algorithm = changed.pop("algorithm", "sha256")
    has_prefixes, has_chunks = changed.pop("has_prefixes", True), changed.pop("has_chunks", True)
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(**transfer | changed),
        cache_config=SimpleNamespace(
            prefix_caching_hash_algo=algorithm, enable_prefix_caching=has_prefixes
        ),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=has_chunks),
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kv_load_failure_policy": "fail"}, '"kv_load_failure_policy": "recompute"'),
        ({"kv_role": "kv_producer"}, 'write "kv_role": "kv_both"'),
        ({"has_prefixes": False, "has_chunks": False}, "run this model without the connector"),
        ({"algorithm": "xxhash"}, "take sha256_cbor, or set PYTHONHASHSEED"),
        ({"kv_connector_extra_config": {"block_size": 64}}, "give vLLM a larger --block-size"),
        ({"kv_connector_extra_config": {"blocks_per_chunk": 2}}, "give vLLM a larger --block-size"),
    ],
)
def test_what_vllm_is_told(
    changed: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    check_engine(engine())
    with pytest.raises(kvx.ConfigError) as caught:
        check_engine(engine(**changed))
    assert said in str(caught.value)


def test_either_of_prefix_caching_and_chunked_prefill_is_enough() -> None:
    check_engine(engine(has_prefixes=False))
    check_engine(engine(has_chunks=False))


def test_xxhash_with_a_seed_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    check_engine(engine(algorithm="xxhash_cbor"))


def test_the_spec_under_another_connector() -> None:
    config = SimpleNamespace(extra_config={"config": TIERS})
    with pytest.raises(kvx.ConfigError, match='write "kv_connector": "KvxConnector"'):
        KvxSpec(as_config(config))


def as_config(found: object) -> OffloadingConfig:
    """Let a part of vLLM's settings stand for all."""
    found.cache = SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=1)  # type: ignore[attr-defined]
    found.groups = ()  # type: ignore[attr-defined]
    found.enable_kv_cache_events = False  # type: ignore[attr-defined]
    return found  # type: ignore[return-value]


def test_what_vllm_shows(one_engine: OneEngine, tiny_llama: Path) -> None:
    """Of an engine that is asked for wrongly, vLLM raises kvx's own error."""
    one_engine.close()
    with (
        pytest.raises(kvx.ConfigError, match="has no load_deadline;"),
        open_engine(tiny_llama, TIERS, extra={"load_deadline": 3}),
    ):
        pass
