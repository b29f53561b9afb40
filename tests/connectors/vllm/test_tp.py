"""Workers in processes of their own: their scheduler asks all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.vllm.engine import BLOCK_TOKENS, answer, open_engine, settle

PROMPT = [10 + number * 7 % 500 for number in range(300)]
WHOLE = len(PROMPT) // BLOCK_TOKENS * BLOCK_TOKENS


@pytest.fixture(scope="module")
def two_ranks(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    nvme = tmp_path_factory.mktemp("nvme")
    config = {
        "tiers": [
            {"kind": "dram", "capacity": "32MiB"},
            {"kind": "nvme", "path": str(nvme), "capacity": "128MiB", "durability": "none"},
        ]
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        with open_engine(tiny_llama, config, tensor_parallel_size=2) as llm:
            yield llm


def test_what_all_ranks_hold_is_loaded(two_ranks: Any) -> None:
    computed, num_cached = answer(two_ranks, PROMPT)
    assert num_cached == 0
    settle(two_ranks)
    assert answer(two_ranks, PROMPT) == (computed, WHOLE)
