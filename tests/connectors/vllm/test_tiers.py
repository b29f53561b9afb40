"""The same tokens come out whichever tier the KV comes from."""

from __future__ import annotations

from pathlib import Path

from tests.connectors.vllm.engine import BLOCK_TOKENS, answer, open_engine, settle

PROMPT = [10 + number * 7 % 500 for number in range(300)]
WHOLE = len(PROMPT) // BLOCK_TOKENS * BLOCK_TOKENS


def test_what_was_stored_is_loaded(tiny_llama: Path) -> None:
    config = {"tiers": [{"kind": "dram", "capacity": "32MiB"}]}
    with open_engine(tiny_llama, config) as llm:
        computed, num_cached = answer(llm, PROMPT)
        assert num_cached == 0
        settle(llm)
        assert answer(llm, PROMPT) == (computed, WHOLE)
