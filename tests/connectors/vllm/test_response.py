"""What a response says of its prompt: tokens by tier, why not more, what did not come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvx import MissReason, TierKind
from kvx.block import as_hash_array
from tests.connectors.vllm.below import Below, hashes_of, prompt_of, store, whole
from tests.connectors.vllm.engine import BLOCK_TOKENS, open_engine, settle


@pytest.fixture(scope="module")
def below(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Below]:
    tiers = [
        {"kind": "dram", "capacity": "8MiB"},
        {"kind": "nvme", "path": str(tmp_path_factory.mktemp("nvme")), "capacity": "64MiB"},
    ]
    with open_engine(tiny_llama, {"tiers": tiers}) as llm:
        yield Below.of(llm)


def ask(llm: Any, prompts: list[list[int]]) -> list[Any]:
    """Return vLLM's outputs."""
    from vllm import SamplingParams  # noqa: PLC0415

    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs: list[Any] = llm.generate(asked, greedy, use_tqdm=False)
    return outputs


def told(output: Any, reason: str | None, **tokens: int) -> None:
    """Require what a response says, and that vLLM counted the same tokens if all came."""
    said = output.kv_transfer_params["kvx"]
    assert said["cached_tokens_details"] == {"gpu": 0, "dram": 0, "nvme": 0} | tokens
    assert said["miss_reason"] == reason
    if not said["load_failures"]:  # those vLLM counts as cached all the same
        assert output.num_cached_tokens == sum(tokens.values())


def test_tokens_are_told_by_tier(below: Below) -> None:
    prompt = prompt_of("tiers")
    (first,) = ask(below.llm, [prompt])
    told(first, "never_stored")
    settle(below.llm)
    (longer,) = ask(below.llm, [[*prompt[:200], *prompt_of("another end", 100)]])
    told(longer, "never_stored", dram=192)
    (again,) = ask(below.llm, [prompt])
    told(again, None, gpu=192, dram=whole(prompt) - 192)
    settle(below.llm)
    below.push_down()
    (cold,) = ask(below.llm, [prompt])
    told(cold, None, nvme=whole(prompt))
    assert cold.kv_transfer_params["kvx"]["load_failures"] == {}


def test_prompts_below_a_block_have_nothing_to_miss(below: Below) -> None:
    (output,) = ask(below.llm, [prompt_of("short", BLOCK_TOKENS - 1)])
    told(output, None)


def test_a_prompt_of_whole_blocks_is_told_as_vllm_counts_it(below: Below) -> None:
    prompt = prompt_of("whole blocks", 4 * BLOCK_TOKENS)
    store(below.llm, prompt)
    (output,) = ask(below.llm, [prompt])
    told(output, None, dram=len(prompt))


def lose(below: Below, hashes: list[bytes]) -> None:
    """Damage the copies in DRAM, and leave none below."""
    assert below.flip(hashes) == len(hashes)
    shared: Any = below.rank.cache._shared
    keys = below.rank.groups[0].space.namespace.keys(as_hash_array(hashes))
    pool = shared.nvme.pool_if_any(below.rank.groups[0].space.block_bytes)
    assert shared.remove(pool, TierKind.NVME, keys, MissReason.DROPPED) == len(hashes)


def test_a_block_counts_for_the_tier_that_it_came_from_in_the_end(below: Below) -> None:
    prompt = prompt_of("damaged above")
    store(below.llm, prompt)
    assert below.rank.cache.flush(10.0)
    below.flip(hashes_of(below.llm, prompt)[3:5])
    (output,) = ask(below.llm, [prompt])
    told(output, None, dram=whole(prompt) - 64, nvme=64)


def test_a_damaged_block_is_taken_off_with_all_behind_it(below: Below) -> None:
    prompt = prompt_of("damaged")
    store(below.llm, prompt)
    assert below.rank.cache.flush(10.0)
    lose(below, hashes_of(below.llm, prompt)[3:5])
    (output,) = ask(below.llm, [prompt])
    told(output, "corrupt", dram=3 * BLOCK_TOKENS)
    assert output.kv_transfer_params["kvx"]["load_failures"] == {"corrupt": 2}


def test_a_damaged_first_block_leaves_nothing(below: Below) -> None:
    prompt = prompt_of("damaged at once")
    store(below.llm, prompt)
    assert below.rank.cache.flush(10.0)
    lose(below, hashes_of(below.llm, prompt)[:1])
    (output,) = ask(below.llm, [prompt])
    told(output, "corrupt")
    assert output.kv_transfer_params["kvx"]["load_failures"] == {"corrupt": 1}


def test_a_dropped_block_says_so(below: Below) -> None:
    prompt = prompt_of("dropped")
    store(below.llm, prompt)
    below.drop(hashes_of(below.llm, prompt)[5:6])
    (output,) = ask(below.llm, [prompt])
    told(output, "dropped", dram=5 * BLOCK_TOKENS)


def test_requests_of_one_batch_are_told_apart(below: Below) -> None:
    held, missed = prompt_of("batch, held"), prompt_of("batch, missed")
    store(below.llm, held)
    of_held, of_missed = ask(below.llm, [held, missed])
    told(of_held, None, dram=whole(held))
    told(of_missed, "never_stored")
