"""What vLLM's API server says of kvx: in responses, on /metrics."""

from __future__ import annotations

import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cache.faults import wait_until
from tests.connectors.vllm.below import prompt_of, whole
from tests.connectors.vllm.server import Server, give_tokenizer, open_server


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("server")
    shutil.copytree(tiny_llama, path / "model")
    give_tokenizer(path / "model")
    tiers = [
        {"kind": "dram", "capacity": "16MiB"},
        {"kind": "nvme", "path": str(path / "nvme"), "capacity": "64MiB"},
    ]
    with open_server(path / "model", {"tiers": tiers}, path / "log") as opened:
        yield opened


def reset(server: Server) -> None:
    """Empty the engine's own prefix cache, as soon as all its blocks are free."""

    def count() -> int:
        return server.log.read_text().count("Successfully reset prefix cache")

    def is_empty() -> bool:
        server.post("/reset_prefix_cache")
        return count() > before

    before = count()
    wait_until(is_empty, 20.0)


def test_a_completion_and_a_chat_say_what_was_loaded(server: Server) -> None:
    prompt = prompt_of("completion")
    first = server.complete(prompt)["kv_transfer_params"]["kvx"]
    assert first["miss_reason"] == "never_stored"
    reset(server)
    second = server.complete(prompt)
    assert second["kv_transfer_params"]["kvx"] == {
        "cached_tokens_details": {"gpu": 0, "dram": whole(prompt), "nvme": 0},
        "miss_reason": None,
        "load_failures": {},
    }
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == whole(prompt)
    messages = [{"role": "user", "content": "a word " * 40}]
    chat = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 4})
    assert chat["kv_transfer_params"]["kvx"]["miss_reason"] == "never_stored"


def test_a_stream_does_not_say_it(server: Server) -> None:
    """Chunks of vLLM have no place for it: /metrics is all there is."""
    body = b'{"prompt": [11, 12, 13], "max_tokens": 3, "stream": true}'
    request = urllib.request.Request(  # noqa: S310 - our own server
        server.url + "/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        text = response.read()
    assert b"[DONE]" in text
    assert b"kv_transfer_params" not in text


def test_metrics_are_on_the_page(server: Server) -> None:
    prompt = prompt_of("page")
    before = read(server)
    server.complete(prompt)
    reset(server)
    server.complete(prompt)
    after = read(server)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["vllm:kvx_hit_tokens_total", 'tier="dram"'] == whole(prompt)
    assert grown["vllm:kvx_misses_total", 'reason="never_stored"'] == 1
    assert grown["vllm:kvx_bytes_total", 'direction="load"'] > 0
    assert after["vllm:kvx_tier_capacity_bytes", 'tier="dram"'] == 16 << 20


_READ: tuple[tuple[str, str], ...] = (
    ("vllm:kvx_hit_tokens_total", 'tier="dram"'),
    ("vllm:kvx_misses_total", 'reason="never_stored"'),
    ("vllm:kvx_bytes_total", 'direction="load"'),
    ("vllm:kvx_tier_capacity_bytes", 'tier="dram"'),
)


def read(server: Server) -> dict[Any, float]:
    return {key: server.metric(*key) for key in _READ}
