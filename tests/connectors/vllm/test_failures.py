"""Whatever fails below the engine: the same tokens, no request that hangs, nothing left behind."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import kvx
from kvx_ext import _core
from tests.cache.faults import injected
from tests.connectors.vllm.below import (
    Below,
    OneEngine,
    answers,
    hashes_of,
    prompt_of,
    store,
    whole,
)
from tests.connectors.vllm.engine import answer, open_engine, settle

DEADLINE_S = 0.4
STEPS_MAX = 2000


@contextmanager
def failing_engine(model: Path, path: Path, failpoints: list[_core.Failpoints]) -> Iterator[Any]:
    """Open an engine over DRAM and NVMe with failpoints in its cache, which are appended."""
    points, faults = injected()
    failpoints.append(points)
    nvme = {"kind": "nvme", "path": str(path), "capacity": "64MiB"}
    config = {
        "tiers": [{"kind": "dram", "capacity": "1MiB"}, nvme],
        "breaker": {"failures": 100_000, "reset_s": 0.1},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvx.TieredCache, "open", partial(kvx.TieredCache.open, faults=faults))
        extra = {"load_deadline_s": DEADLINE_S, "store_deadline_s": 2.0}
        with open_engine(model, config, extra=extra) as llm:
            yield llm


@pytest.fixture(scope="module")
def all_failpoints() -> list[_core.Failpoints]:
    return []


@pytest.fixture
def below(
    one_engine: OneEngine,
    tiny_llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
    all_failpoints: list[_core.Failpoints],
) -> Iterator[Below]:
    """Return an engine whose cache fails as the test says; afterwards it must work as before."""

    def make() -> AbstractContextManager[Any]:
        return failing_engine(tiny_llama, tmp_path_factory.mktemp("nvme"), all_failpoints)

    found = one_engine.get("failing", make)
    yield found
    all_failpoints[-1].clear()
    found.check_nothing_leaked()
    prompt = prompt_of("afterwards", 100)
    computed, _ = answer(found.llm, prompt)
    settle(found.llm)
    assert answer(found.llm, prompt) == (computed, whole(prompt))
    found.check_nothing_leaked()
    found.rank.cache.clear()


@pytest.fixture
def failpoints(
    below: Below,  # noqa: ARG001 - whose they are
    all_failpoints: list[_core.Failpoints],
) -> _core.Failpoints:
    return all_failpoints[-1]


@pytest.mark.parametrize("place", [0, 4, 8])
def test_a_bit_that_flips_in_dram(below: Below, place: int) -> None:
    """NVMe has another copy."""
    llm, prompt = below.llm, prompt_of(f"dram bit {place}")
    computed, hashes = store(llm, prompt), hashes_of(below.llm, prompt)
    assert below.rank.cache.flush(10.0)
    assert below.flip(hashes[place : place + 1]) == 1
    assert answer(llm, prompt) == (computed, whole(prompt))
    assert below.count("kvx_corrupt_blocks_total", tier="dram") >= 1
    settle(llm)


@pytest.mark.parametrize("place", [0, 4, 8])
def test_damage_in_dram_and_on_nvme(
    below: Below,
    failpoints: _core.Failpoints,
    place: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm, prompt = below.llm, prompt_of(f"damage {place}")
    computed, hashes = store(llm, prompt), hashes_of(below.llm, prompt)
    assert below.rank.cache.flush(10.0)
    before = below.count("kvx_misses_total", verb="onboard", reason="corrupt")
    failpoints.set("read", "flip", seed=3)
    assert below.flip(hashes[place : place + 1]) == 1
    failed = note_failed(below, monkeypatch)
    with caplog.at_level(logging.WARNING, "kvx_vllm"):
        assert answer(llm, prompt)[0] == computed
    assert below.count("kvx_misses_total", verb="onboard", reason="corrupt") == before + 1
    assert "1 of 9 blocks" in caplog.text
    assert "corrupt" in caplog.text
    failpoints.clear()
    settle(llm)
    assert failed == [hashes[place]], "it was looked for again after it had failed"
    assert set(below.held(hashes)) == {"dram"}, "what was computed anew is stored anew"
    assert answer(llm, prompt) == (computed, whole(prompt))


@pytest.mark.parametrize(
    ("action", "reason"),
    [("eio", "tier_down"), ("short", "corrupt"), ("flip", "corrupt"), ("drop", "corrupt")],
)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_nvme_that_cannot_be_read(
    below: Below, failpoints: _core.Failpoints, action: str, reason: str, share: float
) -> None:
    llm = below.llm
    prompts = [prompt_of(f"{action} {share} {n}", 200 + n) for n in range(4)]
    computed = [store(llm, prompt) for prompt in prompts]
    below.push_down()
    before = below.count("kvx_misses_total", verb="onboard", reason=reason)
    failpoints.set("read", action, probability=share, seed=7)
    with bounded(llm):
        assert [tokens for tokens, _ in answers(llm, prompts * 2)] == computed * 2
    assert below.count("kvx_misses_total", verb="onboard", reason=reason) > before


def test_loads_that_are_late(
    below: Below, failpoints: _core.Failpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, prompts = below.llm, [prompt_of(f"late {n}") for n in range(2)]
    computed = [store(llm, prompt) for prompt in prompts]
    below.push_down()
    failpoints.set("read", "delay", delay_s=3 * DEADLINE_S)
    ended = note_quiesced(below, monkeypatch)
    assert [tokens for tokens, _ in answers(llm, prompts)] == computed
    assert ended, "nothing was loaded: the test shows nothing"
    assert all(ended), "reported as over while memory was being written"
    settle(llm)


def test_copies_that_go_wrong(below: Below, failpoints: _core.Failpoints) -> None:
    """Bytes that change on their way to the engine do not get there."""
    llm, prompt = below.llm, prompt_of("copies")
    computed = store(llm, prompt)
    failpoints.set("copy", "flip", count=2, seed=5)
    before = failpoints.hits().get("flip", 0)
    assert answer(llm, prompt)[0] == computed
    assert failpoints.hits()["flip"] == before + 2


def test_a_disk_that_is_full(below: Below, failpoints: _core.Failpoints) -> None:
    llm, prompt = below.llm, prompt_of("full")
    failpoints.set("write", "enospc")
    computed = store(llm, prompt)
    assert answer(llm, prompt) == (computed, whole(prompt)), "DRAM has it"
    settle(llm)
    below.push_down()
    assert answer(llm, prompt)[0] == computed


def test_stores_that_cannot_begin(below: Below, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompt_of("cannot begin")
    with monkeypatch.context() as patch:
        patch.setattr(kvx.CacheSpace, "offload", refuse)
        computed = store(below.llm, prompt)
    assert answer(below.llm, prompt) == (computed, 0)
    settle(below.llm)
    with monkeypatch.context() as patch:
        patch.setattr(kvx.CacheSpace, "onboard", refuse)
        assert answer(below.llm, prompt)[0] == computed


def test_all_tiers_gone_at_once(below: Below, failpoints: _core.Failpoints) -> None:
    """Every load fails, every store fails: the engine answers as one without a cache."""
    llm, prompts = below.llm, [prompt_of(f"gone {n}", 150 + 10 * n) for n in range(6)]
    computed = [store(llm, prompt) for prompt in prompts]
    below.push_down()
    for operation in ("read", "write", "copy"):
        failpoints.set(operation, "eio" if operation != "copy" else "flip")
    with bounded(llm):
        for _ in range(2):
            assert [tokens for tokens, _ in answers(llm, prompts)] == computed
            settle(llm)


@pytest.mark.parametrize("verb", ["load", "store"])
def test_requests_that_are_aborted_on_the_way(
    below: Below, failpoints: _core.Failpoints, verb: str
) -> None:
    llm, prompt = below.llm, prompt_of(f"aborted {verb}")
    computed = store(llm, prompt) if verb == "load" else None
    if verb == "load":
        below.push_down()
    failpoints.set("read" if verb == "load" else "copy", "delay", delay_s=0.1)
    jobs = below.worker._jobs
    request_id = begin(llm, prompt)
    for _ in range(STEPS_MAX):
        llm.llm_engine.step()
        if jobs:
            break
    assert [job.is_load for job in jobs.values()] == [verb == "load"]
    llm.llm_engine.abort_request([request_id], internal=False)
    below.check_nothing_leaked()
    failpoints.clear()
    found = answer(llm, prompt)
    assert found[0] == computed or computed is None
    settle(llm)
    assert answer(llm, prompt) == (found[0], whole(prompt))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_everything_goes_wrong_now_and_then(
    below: Below, failpoints: _core.Failpoints, seed: int
) -> None:
    llm = below.llm
    shared = prompt_of(f"chaos {seed}", 160)
    prompts = [shared + prompt_of(f"chaos {seed} {n}", 40 + 20 * n) for n in range(5)]
    computed = [answer(llm, prompt)[0] for prompt in prompts]
    for number, action in enumerate(("eio", "short", "flip", "drop", "delay")):
        failpoints.set("any", action, probability=0.1, seed=seed + number, delay_s=0.05)
    failpoints.set("copy", "flip", probability=0.1, seed=seed)
    for _ in range(6):
        with bounded(llm):
            assert [tokens for tokens, _ in answers(llm, prompts)] == computed
        settle(llm)
        below.push_down()


def refuse(*_: object, **__: object) -> None:
    """Stand in for a verb of the cache."""
    raise kvx.UnavailableError("the device is gone; the test took it")


def begin(llm: Any, prompt: list[int]) -> str:
    """Give the engine a request; `step` has to be called for it."""
    from vllm import SamplingParams  # noqa: PLC0415

    begin.count = getattr(begin, "count", 0) + 1
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, detokenize=False)
    request_id = f"begun-{begin.count}"
    llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
    return request_id


@contextmanager
def bounded(llm: Any) -> Iterator[None]:
    """Fail when the engine goes round and round."""
    engine, count = llm.llm_engine, 0
    step = engine.step

    def counted() -> Any:
        nonlocal count
        count += 1
        assert count < STEPS_MAX, "requests are tried for ever"
        return step()

    engine.step = counted
    try:
        yield
    finally:
        del engine.step


def note_failed(below: Below, patch: pytest.MonkeyPatch) -> list[bytes]:
    """Note every key that the manager is told of as failed."""
    failed: list[bytes] = []
    note = below.manager.note_failures

    def watched(failures: Any) -> None:
        failed.extend(one for failure in failures for one in failure.hashes)
        note(failures)

    patch.setattr(below.manager, "note_failures", watched)
    return failed


def note_quiesced(below: Below, patch: pytest.MonkeyPatch) -> list[bool]:
    """Note of every load, when it is reported as over, whether nothing moves any more."""
    ended: list[bool] = []
    finish = below.worker._finish

    def watched(job_id: int, job: Any) -> Any:
        if job.is_load:
            ended.append(all(one.wait_quiesced(0.0) for one in job.transfers))
        return finish(job_id, job)

    patch.setattr(below.worker, "_finish", watched)
    return ended
