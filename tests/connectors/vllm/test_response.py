"""What a response says of its prompt: tokens by tier, why not more, what did not come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kvx_vllm.account import Account, PlannedBlock

import kvx
from kvx import MissReason, TierKind
from tests.connectors.vllm.engine import BLOCK_TOKENS, open_engine, settle

PROMPT = [10 + number * 7 % 500 for number in range(300)]
WHOLE = len(PROMPT) // BLOCK_TOKENS * BLOCK_TOKENS


def ask(llm: Any, prompt: list[int]) -> Any:
    from vllm import SamplingParams  # noqa: PLC0415

    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
    return output


def said(**tokens: int) -> dict[str, int]:
    return {"gpu": 0, "dram": 0, "nvme": 0} | tokens


@pytest.fixture(scope="module")
def llm(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("nvme")
    tiers = [
        {"kind": "dram", "capacity": "32MiB"},
        {"kind": "nvme", "path": str(path), "capacity": "64MiB"},
    ]
    with open_engine(tiny_llama, {"tiers": tiers}) as opened:
        yield opened


def cache_of(llm: Any) -> kvx.TieredCache:
    from kvx_vllm.rank_cache import _here  # noqa: PLC0415

    (rank,) = _here.values()
    return rank.cache


def test_a_first_prompt_was_never_stored_and_a_second_comes_from_dram(llm: Any) -> None:
    first = ask(llm, PROMPT).kv_transfer_params["kvx"]
    assert first == {
        "cached_tokens_details": said(),
        "miss_reason": "never_stored",
        "load_failures": {},
    }
    settle(llm)
    output = ask(llm, [*PROMPT[:200], *range(10, 110)])
    told = output.kv_transfer_params["kvx"]
    assert told["cached_tokens_details"] == said(dram=192)
    assert told["miss_reason"] == "never_stored"
    assert output.num_cached_tokens == 192
    again = ask(llm, PROMPT)
    assert again.kv_transfer_params["kvx"] == {
        "cached_tokens_details": said(gpu=192, dram=WHOLE - 192),
        "miss_reason": None,
        "load_failures": {},
    }
    assert again.num_cached_tokens == WHOLE
