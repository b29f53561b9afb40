"""What an engine finds of the lives before its own: those of a killed one, and before a reset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.vllm.engine import BLOCK_TOKENS, answer, open_engine, settle
from tests.connectors.vllm.engine_process import answer_and_be_killed
from tests.s3.servers import Bucket

WIDTH = 4  # blocks of an object in S3
PROMPT = [10 + place * 7 % 500 for place in range(2 * WIDTH * BLOCK_TOKENS + 11)]
WHOLE = 2 * WIDTH * BLOCK_TOKENS


def tiers(nvme: Path, bucket: Bucket | None = None) -> dict[str, object]:
    """Return the configuration of a cache over a directory, and a bucket."""
    found: list[dict[str, object]] = [
        {"kind": "dram", "capacity": "8MiB"},
        {"kind": "nvme", "path": str(nvme), "capacity": "64MiB"},
    ]
    if bucket is not None:
        found.append({
            "kind": "s3", "bucket": bucket.name, "endpoint": bucket.service.url,
            "region": bucket.service.region, "blocks_per_object": WIDTH,
        })  # fmt: skip
    return {"tiers": found}


@pytest.fixture
def keys(s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the keys of the server where a client finds them; processes that are made inherit it."""
    found = s3_bucket.service.keys
    assert found is not None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", found.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", found.secret_key)


@pytest.mark.slow
@pytest.mark.usefixtures("keys")
def test_a_killed_engine_leaves_its_blocks(
    tiny_llama: Path, tmp_path: Path, s3_bucket: Bucket
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    tokens = answer_and_be_killed(tiny_llama, tiers(here, s3_bucket), PROMPT)
    # The next one on its disk.
    with open_engine(tiny_llama, tiers(here)) as llm:
        assert answer(llm, PROMPT) == (tokens, WHOLE)
    # Another machine: a disk of its own, the same bucket.
    extra = {"lookup_deadline_s": 10.0}
    with open_engine(tiny_llama, tiers(there, s3_bucket), extra=extra) as llm:
        assert answer(llm, PROMPT) == (tokens, WHOLE)


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_engine(tiny_llama, tiers(tmp_path_factory.mktemp("nvme"))) as llm:
        yield llm


def test_after_a_reset_nothing_older_is_found(engine: Any) -> None:
    tokens, _ = answer(engine, PROMPT)
    settle(engine)
    assert answer(engine, PROMPT) == (tokens, WHOLE)
    settle(engine)
    assert engine.reset_prefix_cache(reset_connector=True)
    assert answer(engine, PROMPT) == (tokens, 0)
    settle(engine)
    assert answer(engine, PROMPT) == (tokens, WHOLE)


@pytest.mark.parametrize("num_steps", [1, 3], ids=["not begun", "begun"])
def test_what_was_on_its_way_at_a_reset_is_not_found(engine: Any, num_steps: int) -> None:
    prompt = [num_steps, *PROMPT]
    begin(engine, prompt, num_steps)
    assert not engine.reset_prefix_cache(reset_connector=True)  # its blocks are in use
    engine.llm_engine.abort_request(["begun"])
    settle(engine)
    _, num_cached = answer(engine, prompt)
    assert num_cached == 0


def test_a_request_that_outlives_a_reset_stores_nothing(engine: Any) -> None:
    prompt = [8, *PROMPT]
    begin(engine, prompt, num_steps=3)
    assert not engine.reset_prefix_cache(reset_connector=True)
    while engine.llm_engine.has_unfinished_requests():
        engine.llm_engine.step()
    settle(engine)
    _, num_cached = answer(engine, prompt)
    assert num_cached == 0


def begin(engine: Any, prompt: list[int], num_steps: int) -> None:
    """Compute a prompt and some tokens; vLLM begins to store in the step after."""
    from vllm import SamplingParams  # noqa: PLC0415 - 6 seconds

    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    engine.llm_engine.add_request("begun", {"prompt_token_ids": prompt}, greedy)
    for _ in range(num_steps):
        engine.llm_engine.step()
    assert engine.llm_engine.has_unfinished_requests()


def test_an_engine_that_slept_computes_anew(engine: Any) -> None:
    tokens, _ = answer(engine, [9, *PROMPT])
    settle(engine)
    # On CPUs vLLM keeps its memory: what is left of sleep is the reset that comes with it.
    engine.sleep(level=1)
    engine.wake_up()
    assert answer(engine, [9, *PROMPT]) == (tokens, 0)
    settle(engine)
    assert answer(engine, [9, *PROMPT]) == (tokens, WHOLE)
