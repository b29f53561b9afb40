"""Which engines share blocks: every fact that changes what bytes mean changes the namespace."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)

import kvx
from kvx_vllm import facts
from kvx_vllm.facts import EngineFacts

_SIZES = (4096, 4096)


@dataclasses.dataclass
class Engine:
    """What the facts of an engine are taken from, in the shape of vLLM's own."""

    model: Any
    cache: Any
    device: Any
    layers: dict[str, Any]
    groups: list[Any]
    offloading: OffloadingConfig
    sizes: tuple[int, ...] = _SIZES
    revision: str = ""
    group: int = 0

    @property
    def fingerprint(self) -> str:
        """Return that of the namespace of one group."""
        config = SimpleNamespace(
            model_config=self.model,
            cache_config=self.cache,
            device_config=self.device,
            compilation_config=SimpleNamespace(static_forward_context=self.layers),
        )
        found = EngineFacts(config, SimpleNamespace(kv_cache_groups=self.groups))  # type: ignore[arg-type]
        named = found.namespace(self.offloading, self.group, self.sizes, self.revision)
        return kvx.Namespace(**named).fingerprint.hex()


def layer(backend: str) -> Any:
    """Return what vLLM keeps of an attention layer."""
    kind = SimpleNamespace(get_name=lambda: backend)
    return SimpleNamespace(get_attn_backend=lambda: kind)


def plain() -> Engine:
    """Return an engine with two groups on one rank of four."""
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    groups = [SimpleNamespace(layer_names=[f"l{n}"], kv_cache_spec=spec) for n in range(2)]
    return Engine(
        model=SimpleNamespace(
            model="org/model", revision="main", quantization=None, dtype=torch.bfloat16,
            hf_config=transformers.LlamaConfig(hidden_size=64),
        ),
        cache=SimpleNamespace(prefix_caching_hash_algo="sha256"),
        device=SimpleNamespace(device_type="cpu"),
        layers={"l0": layer("FLASH_ATTN"), "l1": layer("FLASH_ATTN")},
        groups=groups,
        offloading=OffloadingConfig(
            groups=tuple(
                OffloadingGroupConfig(tokens_per_block=16, layer_names=(f"l{n}",), group_id=n)
                for n in range(2)
            ),
            worker_kv_bytes_per_block=sum(_SIZES),
            enable_kv_cache_events=False,
            extra_config={},
            engine_id="e",
            model=OffloadingModelConfig(name="org/model", dtype="bfloat16"),
            cache=OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1),
            parallel=OffloadingParallelConfig(
                rank=1, world_size=4, tp_size=2, pp_size=2, pcp_size=1, dcp_size=1,
                data_parallel_index=0, data_parallel_size=1, data_parallel_rank_local=None,
                is_parallelism_agnostic=False,
            ),
            kv_cache_layout="LBHNC",
        ),
    )  # fmt: skip


def offloading(part: str, **changed: object) -> Callable[[Engine], None]:
    """Return what changes a part of vLLM's settings of the connector."""

    def change(engine: Engine) -> None:
        found = getattr(engine.offloading, part)
        replaced = dataclasses.replace(found, **changed)
        engine.offloading = dataclasses.replace(engine.offloading, **{part: replaced})

    return change


def change_block_size(engine: Engine) -> None:
    first = dataclasses.replace(engine.offloading.groups[0], tokens_per_block=32)
    groups = (first, *engine.offloading.groups[1:])
    engine.offloading = dataclasses.replace(engine.offloading, groups=groups)


def change_spec(engine: Engine, **changed: object) -> None:
    spec = dataclasses.replace(engine.groups[0].kv_cache_spec, **changed)
    engine.groups[0] = SimpleNamespace(layer_names=["l0"], kv_cache_spec=spec)


def change_window(engine: Engine) -> None:
    spec = SlidingWindowSpec(
        block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=64
    )
    engine.groups[0] = SimpleNamespace(layer_names=["l0"], kv_cache_spec=spec)


_CHANGES: dict[str, Callable[[Engine], object]] = {
    "model": lambda one: setattr(one.model, "model", "org/other"),
    "model's revision": lambda one: setattr(one.model, "revision", "v2"),
    "user's revision": lambda one: setattr(one, "revision", "tuned"),
    "quantization": lambda one: setattr(one.model, "quantization", "fp8"),
    "overridden shape": lambda one: setattr(one.model.hf_config, "hidden_size", 128),
    "dtype": lambda one: setattr(one.model, "dtype", torch.float16),
    "dtype of the KV": offloading("model", dtype="fp8_e4m3"),
    "attention backend": lambda one: one.layers.update(l0=layer("FLASHINFER")),
    "device": lambda one: setattr(one.device, "device_type", "cuda"),
    "layout": lambda one: setattr(
        one, "offloading", dataclasses.replace(one.offloading, kv_cache_layout="BLHNC")
    ),
    "TP rank": offloading("parallel", rank=0),
    "TP size": offloading("parallel", tp_size=4, pp_size=1),
    "PP rank": offloading("parallel", rank=3),
    "PP size": offloading("parallel", pp_size=4, world_size=8),
    "DCP size": offloading("parallel", dcp_size=2),
    "PCP size": offloading("parallel", pcp_size=2),
    "KV group": lambda one: setattr(one, "group", 1),
    "layers": lambda one: setattr(one.groups[0], "layer_names", ["l0", "l7"]),
    "KV heads": lambda one: change_spec(one, num_kv_heads=4),
    "window": change_window,
    "hash algorithm": lambda one: setattr(one.cache, "prefix_caching_hash_algo", "sha256_cbor"),
    "tokens of a hash": offloading("cache", tokens_per_hash=8),
    "block size": change_block_size,
    "bytes of a block": lambda one: setattr(one, "sizes", (4096, 8192)),
    "planes": lambda one: setattr(one, "sizes", (8192,)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(_CHANGES))
def test_a_fact_keeps_engines_apart(name: str) -> None:
    engine = plain()
    _CHANGES[name](engine)
    assert engine.fingerprint != plain().fingerprint


def test_all_facts_differ_from_each_other() -> None:
    found = {plain().fingerprint}
    for change in _CHANGES.values():
        change(engine := plain())
        found.add(engine.fingerprint)
    assert len(found) == 1 + len(_CHANGES)


def test_the_seed_of_hashes_keeps_engines_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = plain().fingerprint
    monkeypatch.setattr(facts, "hash_seed", lambda: "7")
    assert plain().fingerprint != usual


def test_where_the_weights_lie_twice_does_not_matter() -> None:
    engine = plain()
    engine.model.hf_config._name_or_path = "/somewhere/else"
    engine.layers["another"] = layer("FLASHINFER")
    assert engine.fingerprint == plain().fingerprint


def test_equal_engines_of_two_processes_share() -> None:
    script = "from tests.connectors.vllm.test_facts import plain; print(plain().fingerprint)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == plain().fingerprint
