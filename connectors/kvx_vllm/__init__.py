"""kvx for vLLM: tiers below the engine's KV cache that survive restarts and never serve wrong KV.

`--kv-transfer-config` names `KvxConnector` of this module; see docs/guides/vllm.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvx_vllm.connector import KvxConnector
    from kvx_vllm.spec import KvxSpec

__all__ = ["KvxConnector", "KvxSpec", "register"]


def register() -> None:
    """Tell vLLM of the connector, so that its name alone is enough; an entry point calls this."""
    from vllm.distributed.kv_transfer.kv_connector.factory import (  # noqa: PLC0415 - vLLM loads slowly
        KVConnectorFactory,
    )

    if "KvxConnector" not in KVConnectorFactory._registry:  # noqa: SLF001 - asked twice, it raises
        KVConnectorFactory.register_connector("KvxConnector", "kvx_vllm.connector", "KvxConnector")


def __getattr__(name: str) -> object:
    """Import what vLLM asks this module for by name."""
    if name == "KvxConnector":
        from kvx_vllm.connector import KvxConnector  # noqa: PLC0415

        return KvxConnector
    if name == "KvxSpec":
        from kvx_vllm.spec import KvxSpec  # noqa: PLC0415

        return KvxSpec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
