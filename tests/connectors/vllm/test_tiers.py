"""The same tokens come out whichever tier the KV comes from, and whoever asks beside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.vllm.below import (
    Below,
    OneEngine,
    answers,
    hashes_of,
    prompt_of,
    store,
    whole,
)
from tests.connectors.vllm.engine import BLOCK_TOKENS, answer, open_engine, settle
from tests.connectors.vllm.s3 import moto_process
from tests.s3.faulty.proxy import FaultProxy
from tests.s3.servers import open_bucket

DRAM = {"kind": "dram", "capacity": "1MiB"}  # 32 blocks


@pytest.fixture
def two_tiers(
    one_engine: OneEngine, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Below:
    """Return an engine over little DRAM and much NVMe."""

    def make() -> AbstractContextManager[Any]:
        path = tmp_path_factory.mktemp("nvme")
        nvme = {"kind": "nvme", "path": str(path), "capacity": "64MiB"}
        return open_engine(tiny_llama, {"tiers": [DRAM, nvme]})

    return one_engine.get("two tiers", make)


@pytest.mark.parametrize("tier", ["dram", "nvme"])
def test_what_was_stored_is_loaded(two_tiers: Below, tier: str) -> None:
    llm, prompt = two_tiers.llm, prompt_of(tier)
    computed = store(llm, prompt)
    if tier == "nvme":
        two_tiers.push_down()
    assert set(two_tiers.held(hashes_of(llm, prompt))) == {tier}
    assert answer(llm, prompt) == (computed, whole(prompt))
    two_tiers.check_nothing_leaked()


@pytest.mark.parametrize("length", [31, 32, 33, 64, 95, 128])
def test_tails_and_full_hits(two_tiers: Below, length: int) -> None:
    """At least the last token is computed, of a prompt that is all there too."""
    prompt = prompt_of(f"tails {length}", length)
    computed = store(two_tiers.llm, prompt)
    again, num_cached = answer(two_tiers.llm, prompt)
    assert again == computed
    assert num_cached in (whole(prompt), length - 1)
    settle(two_tiers.llm)


def test_requests_at_once_that_share_prefixes(two_tiers: Below) -> None:
    llm = two_tiers.llm
    prompts = [prompt_of("shared", 32 * n) + prompt_of(f"own {n}", 70) for n in (1, 2, 3, 4, 6, 8)]
    computed = [answer(llm, prompt)[0] for prompt in prompts]
    for _ in range(3):
        two_tiers.push_down()
        assert [tokens for tokens, _ in answers(llm, prompts * 2)] == computed * 2
        settle(llm)
    two_tiers.check_nothing_leaked()


def test_salts_never_share(two_tiers: Below) -> None:
    llm, prompt = two_tiers.llm, prompt_of("salted")
    (first,) = answers(llm, [prompt], salt="a")
    settle(llm)
    for other in (None, "b"):
        assert answers(llm, [prompt], salt=other) == [(first[0], 0)]
        settle(llm)
    for same in ("a", None, "b"):
        assert answers(llm, [prompt], salt=same) == [(first[0], whole(prompt))]
        settle(llm)


def test_adapters_never_share(two_tiers: Below) -> None:
    prompt = prompt_of("adapted")
    found = [hashes_of(two_tiers.llm, prompt, adapter=name) for name in ("", "a", "b")]
    assert len({one for hashes in found for one in hashes}) == 3 * len(found[0])


def test_blocks_that_go_between_lookup_and_load(
    two_tiers: Below, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, prompt = two_tiers.llm, prompt_of("stale")
    computed = store(llm, prompt)
    hashes = hashes_of(llm, prompt)
    prepare, lost = two_tiers.manager.prepare_load, hashes[2:4]

    def lose(*args: object) -> object:
        two_tiers.drop(lost)
        return prepare(*args)

    monkeypatch.setattr(two_tiers.manager, "prepare_load", lose)
    assert answer(llm, prompt)[0] == computed
    monkeypatch.undo()
    two_tiers.check_nothing_leaked()
    assert "none" not in two_tiers.held(hashes), "what was computed anew is stored anew"
    assert answer(llm, prompt) == (computed, whole(prompt))


def test_without_prefix_caching(one_engine: OneEngine, tiny_llama: Path) -> None:
    """The engine forgets everything at once; kvx does not."""
    one_engine.close()
    with open_engine(tiny_llama, {"tiers": [DRAM]}, enable_prefix_caching=False) as llm:
        prompts = [prompt_of("uncached"), prompt_of("uncached")[:200] + prompt_of("else", 100)]
        computed = [answer(llm, prompt)[0] for prompt in prompts]
        settle(llm)
        assert answer(llm, prompts[0]) == (computed[0], whole(prompts[0]))
        for _ in range(2):
            assert [tokens for tokens, _ in answers(llm, prompts * 2)] == computed * 2
        Below.of(llm).check_nothing_leaked()


def test_an_engine_with_hardly_any_blocks(one_engine: OneEngine, tiny_llama: Path) -> None:
    """It evicts and preempts all the time, and blocks of answers are kept, too."""
    one_engine.close()
    small = {"num_gpu_blocks_override": 13, "max_model_len": 320, "max_num_seqs": 3}
    config = {"tiers": [{"kind": "dram", "capacity": "16MiB"}]}
    extra = {"offload_prompt_only": False}
    with open_engine(tiny_llama, config, extra=extra, **small) as llm:
        below = Below.of(llm)
        prompts = [prompt_of(f"small {n}", 100 + n) for n in range(4)]
        computed = [answer(llm, prompt, 40) for prompt in prompts]
        settle(llm)
        longer = prompts[0] + computed[0][0]
        tokens, num_cached = answer(llm, longer)
        assert num_cached >= whole(longer[:-1]), "blocks of the answer were not kept"
        settle(llm)
        with counted(below.scheduler, "_preempt_request") as preempted:
            for _ in range(2):
                found = answers(llm, prompts, 40)
                assert [one for one, _ in found] == [one for one, _ in computed]
        assert preempted, "nothing was preempted: the test shows nothing"
        assert answer(llm, longer)[0] == tokens
        below.check_nothing_leaked()


def test_blocks_in_s3_and_a_service_that_freezes(
    one_engine: OneEngine, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_engine.close()
    with moto_process() as moto, FaultProxy(moto) as proxy, open_bucket(moto) as bucket:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anyone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        s3 = {
            "kind": "s3", "bucket": bucket.name, "endpoint": proxy.service.url,
            "blocks_per_object": 4, "deadline_s": 1.0, "absent_s": 0.5,
        }  # fmt: skip
        extra = {"load_deadline_s": 2.0}
        with open_engine(tiny_llama, {"tiers": [DRAM, s3]}, extra=extra) as llm:
            below, prompts = Below.of(llm), [prompt_of(f"s3 {n}") for n in range(3)]
            computed = [store(llm, prompt) for prompt in prompts]
            below.push_down()
            assert answer(llm, prompts[0]) == (computed[0], 2 * 4 * BLOCK_TOKENS)
            assert below.count("kvx_blocks_total", verb="onboard", tier="s3") == 8
            settle(llm)
            with proxy.frozen():
                assert answer(llm, prompts[1]) == (computed[1], 0)
            below.check_nothing_leaked()
            assert answer(llm, prompts[2])[0] == computed[2]


@contextmanager
def counted(owner: Any, name: str) -> Iterator[list[object]]:
    """Note every call of a method."""
    calls: list[object] = []
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield calls
    finally:
        delattr(owner, name)
