"""kvx for vLLM: tiers below the engine's KV cache that survive restarts and never serve wrong KV.

`--kv-transfer-config` names `KvxConnector` of this module; see docs/guides/vllm.md.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import kvx

if TYPE_CHECKING:
    from kvx_vllm.connector import KvxConnector
    from kvx_vllm.spec import KvxSpec

__all__ = ["KvxConnector", "KvxSpec", "register"]


_OLDEST = (0, 31)  # before it, blocks were laid out, and failures told, in other ways


def register() -> None:
    """Tell vLLM of the connector, so that its name alone is enough; an entry point calls this."""
    from vllm.distributed.kv_transfer.kv_connector.factory import (  # noqa: PLC0415 - vLLM loads slowly
        KVConnectorFactory,
    )

    if "KvxConnector" not in KVConnectorFactory._registry:  # noqa: SLF001 - asked twice, it raises
        KVConnectorFactory.register_connector("KvxConnector", "kvx_vllm", "KvxConnector")


def __getattr__(name: str) -> object:
    """Import what vLLM asks this module for by name.

    Raises:
        kvx.IncompatibleError: This vLLM is too old.
    """
    if name == "KvxConnector":
        _check_version()
        from kvx_vllm.connector import KvxConnector  # noqa: PLC0415

        return KvxConnector
    if name == "KvxSpec":
        _check_version()
        from kvx_vllm.spec import KvxSpec  # noqa: PLC0415

        return KvxSpec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _check_version() -> None:
    """Refuse a vLLM that is too old; what calls itself otherwise, such as a build, is tried."""
    from vllm.version import __version__  # noqa: PLC0415

    found = re.match(r"(\d+)\.(\d+)\.", __version__)
    if found and (int(found[1]), int(found[2])) < _OLDEST:
        raise kvx.IncompatibleError(
            f"KvxConnector works with vLLM 0.31 and 0.32, and this is {__version__}: "
            "pip install 'vllm>=0.31'",
            ours="0.31", theirs=__version__,
        )  # fmt: skip
