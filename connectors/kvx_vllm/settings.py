"""What a user says in `kv_connector_extra_config`, and what vLLM has to be told beside it."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import kvx

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import VllmConfig

# Understood by vLLM's own offloading framework, which reads the same mapping.
_OF_VLLM = {"spec_name", "spec_module_path", "offload_prompt_only", "self_describing_kv_events"}
_NEEDED = "kv_load_failure_policy"
_EXAMPLE = '"kv_connector_extra_config": {"config": "kvx.yaml"}'


@dataclass(frozen=True, slots=True)
class Settings:
    """What the connector is told.

    Attributes:
        cache: The tiers, as `kvx.TieredCache.open` takes them.
        load_deadline_s: Seconds a load may take; what has not come then is computed.
        store_deadline_s: Seconds a store may take.
        lookup_deadline_s: Seconds a request waits at most to hear what S3, and what ranks in other
            processes, hold.
        pd_lease_s: Seconds that a prefill is kept for the engine that decodes.
        pd_wait_s: Seconds a request waits at most for the engine that computed its prompt.
        revision: Of the weights, where the model's own revision does not tell.
    """

    cache: kvx.CacheConfig
    load_deadline_s: float = 5.0
    store_deadline_s: float = 10.0
    lookup_deadline_s: float = 0.25
    pd_lease_s: float = 30.0
    pd_wait_s: float = 2.0
    revision: str = ""

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> Self:
        """Read `kv_connector_extra_config`.

        Raises:
            kvx.ConfigError: A key is unknown, missing or malformed; says what to write.
        """
        own = {one.name for one in dataclasses.fields(cls)} - {"cache"} | {"config"}
        unknown = sorted(set(extra) - own - _OF_VLLM)
        if unknown:
            raise kvx.ConfigError(
                f"kv_connector_extra_config has no {', '.join(unknown)}; kvx knows "
                f"{', '.join(sorted(own))}, vLLM {', '.join(sorted(_OF_VLLM))}"
            )
        if "config" not in extra:
            raise kvx.ConfigError(
                f"kv_connector_extra_config needs config, the path of kvx.yaml: {_EXAMPLE}"
            )
        given = {name: extra[name] for name in own - {"config"} if name in extra}
        for name, value in given.items():
            is_seconds = name.endswith("_s")
            if is_seconds and not (type(value) in (int, float) and 0 < value < math.inf):
                raise kvx.ConfigError(f"{name} is {value!r}; seconds above 0 are needed")
            if not is_seconds and not isinstance(value, str):
                raise kvx.ConfigError(f"{name} is {value!r}; a text is needed")
        return cls(kvx.CacheConfig.load(extra["config"]), **given)


def hash_seed(environment: Mapping[str, str] = os.environ) -> str:
    """Return the seed of vLLM's block hashes; empty for the usual one."""
    return environment.get("PYTHONHASHSEED", "")


def check_engine(config: VllmConfig) -> None:
    """Refuse an engine that would not survive, or would never hit.

    Raises:
        kvx.ConfigError: Says which option to change, and to what.
    """
    transfer = config.kv_transfer_config
    if transfer.kv_load_failure_policy != "recompute":
        raise kvx.ConfigError(
            f"{_NEEDED} is {transfer.kv_load_failure_policy!r}: a block that is not loaded would "
            f'fail its request; add "{_NEEDED}": "recompute" to --kv-transfer-config'
        )
    if transfer.kv_role != "kv_both":
        raise kvx.ConfigError(
            f"kv_role is {transfer.kv_role!r}; kvx stores and loads: "
            'write "kv_role": "kv_both" in --kv-transfer-config'
        )
    has_chunks = config.scheduler_config.enable_chunked_prefill
    if not (config.cache_config.enable_prefix_caching or has_chunks):
        raise kvx.ConfigError(
            "prefix caching and chunked prefill are both off. vLLM does so for what cannot go on "
            "from a prefix (attention that is not causal, MLA on CPUs without AMX): answers from "
            "stored KV would be wrong, so run this model without the connector. If it was you who "
            "turned them off, leave --enable-chunked-prefill on"
        )
    algorithm = config.cache_config.prefix_caching_hash_algo
    if algorithm.startswith("xxhash") and not hash_seed():
        raise kvx.ConfigError(
            f"--prefix-caching-hash-algo {algorithm} hashes differently in every process: nothing "
            "would be found after a restart; take sha256_cbor, or set PYTHONHASHSEED"
        )
    for name in ("block_size", "blocks_per_chunk"):
        value = transfer.kv_connector_extra_config.get(name)
        if value is not None:
            raise kvx.ConfigError(
                f"{name} is {value} in kv_connector_extra_config: kvx stores vLLM's own blocks; "
                "leave it out, and give vLLM a larger --block-size instead"
            )
