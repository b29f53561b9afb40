"""Which vLLM the connector works with."""

from __future__ import annotations

import pytest
import vllm.version
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

import kvx
import kvx_vllm


def test_an_old_vllm_is_refused_in_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.version, "__version__", "0.30.2+cpu")
    with pytest.raises(kvx.IncompatibleError, match=r"0\.31 and 0\.32, and this is 0\.30\.2"):
        _ = kvx_vllm.KvxConnector


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1rc1", "1.0.0", "dev"])
def test_others_are_tried(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(vllm.version, "__version__", version)
    assert kvx_vllm.KvxConnector.__name__ == "KvxConnector"


def test_its_name_alone_is_enough() -> None:
    kvx_vllm.register()
    kvx_vllm.register()
    found = KVConnectorFactory.get_connector_class_by_name("KvxConnector")
    assert found is kvx_vllm.KvxConnector
