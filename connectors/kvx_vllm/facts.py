"""What two engines must agree on to share blocks: the namespace of each KV cache group."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvx_vllm.settings import hash_seed

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_offload.config import OffloadingConfig


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What one rank of an engine is, as far as its KV is concerned.

    Attributes:
        config: vLLM's.
        kv_cache: vLLM's: groups, specs, layout.
    """

    config: VllmConfig
    kv_cache: KVCacheConfig

    def namespace(
        self, offloading: OffloadingConfig, group: int, plane_sizes: tuple[int, ...], revision: str
    ) -> dict[str, Any]:
        """Return the facts of a `kvx.Namespace` for one group of this rank.

        Tokens, LoRA adapters, images and the salt of a request are in vLLM's block hashes already.

        Args:
            offloading: vLLM's settings of the connector.
            group: Place among its groups.
            plane_sizes: Bytes of a block in each of its runs.
            revision: What the user says the weights are.
        """
        model, parallel = self.config.model_config, offloading.parallel
        cache = self.config.cache_config
        return {
            "model": model.model,
            "revision": "|".join(
                str(one) for one in (model.revision or "", model.quantization or "", revision)
            ),
            "dtype": offloading.model.dtype,
            "block_bytes": sum(plane_sizes),
            "block_tokens": offloading.groups[group].tokens_per_block,
            "layout": self._layout(offloading, group, plane_sizes),
            "tp_rank": parallel.rank % parallel.tp_size,
            "tp_size": parallel.tp_size,
            "pp_rank": parallel.rank // parallel.tp_size % parallel.pp_size,
            "pp_size": parallel.pp_size,
            "hash_scheme": f"vllm/{cache.prefix_caching_hash_algo}"
            f"/{offloading.cache.tokens_per_hash}/{hash_seed()}",
        }

    def _layout(
        self, offloading: OffloadingConfig, group: int, plane_sizes: tuple[int, ...]
    ) -> str:
        """Return a digest of everything that decides what the bytes of a block mean."""
        parallel = offloading.parallel
        place = offloading.groups[group].group_id
        kv_group = self.kv_cache.kv_cache_groups[place]
        facts = (
            offloading.kv_cache_layout,
            self._backends(kv_group.layer_names),
            self.config.device_config.device_type,
            (place, len(offloading.groups), kv_group.layer_names),
            (str(self.config.model_config.dtype), _spelled_model(self.config.model_config)),
            _spelled(kv_group.kv_cache_spec),
            plane_sizes,
            (parallel.pcp_size, parallel.dcp_size, parallel.rank // parallel.tp_size),
        )
        return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()

    def _backends(self, layers: list[str]) -> list[str]:
        """Return the attention backends of layers: each lays KV out in its own way."""
        modules = self.config.compilation_config.static_forward_context
        found = {
            modules[name].get_attn_backend().get_name()
            for name in layers
            if hasattr(modules.get(name), "get_attn_backend")
        }
        return sorted(found)


def _spelled_model(model: ModelConfig) -> str:
    """Return the shape of a model and how it turns positions, with what a user overrode of it."""
    facts = {
        name: value
        for name, value in model.hf_config.to_dict().items()
        if not name.startswith("_") and name != "transformers_version"
    }
    return json.dumps(facts, sort_keys=True, default=lambda one: type(one).__name__)


def _spelled(spec: object) -> str:
    """Return what a KV cache spec says, the same in every process and for every field order."""
    if not dataclasses.is_dataclass(spec):
        return repr(spec)
    facts = {one.name: _spelled_value(getattr(spec, one.name)) for one in dataclasses.fields(spec)}
    return f"{type(spec).__name__}({sorted(facts.items())})"


def _spelled_value(value: object) -> str:
    if isinstance(value, dict):
        return repr(sorted((str(key), _spelled(one)) for key, one in value.items()))
    return _spelled(value)
