"""References given and taken between two real caches: without an engine, but for its hashes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kvx
from kvx_vllm.pd import producer as producers
from kvx_vllm.pd.handoff import Handoff
from kvx_vllm.pd.messages import Done
from kvx_vllm.pd.reference import FIELD, Outcome, Reference
from kvx_vllm.settings import Settings
from tests.waiting import eventually

BLOCK_BYTES = 4096
KEY = b"a key for the tests of references"
COUNT = 12


def hashes_of(count: int, prompt: int = 0) -> list[bytes]:
    return [bytes([prompt, number]) * 16 for number in range(count)]


def blocks_of(count: int, prompt: int = 0) -> Any:
    rows = np.random.default_rng(prompt).integers(0, 256, (count, BLOCK_BYTES), np.uint8)
    return np.ascontiguousarray(rows)


class End:
    """One engine: its cache, and its part in handing over."""

    def __init__(
        self, name: str, *, key: bytes = KEY, blocks: int = 256, model: str = "m", **settings: float
    ) -> None:
        self._agent = kvx.Agent(name, listen="tcp://127.0.0.1:0", key=key)
        config = {
            "tiers": [
                {"kind": "dram", "capacity": blocks * BLOCK_BYTES, "prefault": "never"},
                {"kind": "peer", "publish_s": 60.0},
            ]
        }
        self.cache = kvx.TieredCache.open(config, agent=self._agent)
        self.space = self.cache.namespace(model=model, dtype="f", block_bytes=BLOCK_BYTES)
        self.rank: Any = SimpleNamespace(
            cache=self.cache, groups=[SimpleNamespace(space=self.space)]
        )
        self.handoff = Handoff(self.rank, Settings(self.cache.config, **settings))
        self._numbers = iter(range(1000))

    def store(self, count: int, prompt: int = 0) -> None:
        self.space.offload(hashes_of(count, prompt), blocks_of(count, prompt)).wait()

    def prefill(self, count: int = COUNT, prompt: int = 0, *, stored: int | None = None) -> Any:
        """Compute a prompt for another engine; returns the reference."""
        name = f"p{next(self._numbers)}"
        assert self.handoff.begin(name, {"do_remote_decode": True})
        self.handoff.storing(name, hashes_of(count, prompt))
        self.store(count if stored is None else stored, prompt)
        self.handoff.stored(name, hashes_of(count, prompt))
        params = self.handoff.issue(name, [hashes_of(count, prompt)])
        self.handoff.finished(name)
        return params

    def take(
        self, params: Any, count: int = COUNT, prompt: int = 0
    ) -> tuple[Outcome, kvx.TransferResult | None]:
        """Do what a scheduler does with a reference; returns what came of it."""
        before = self.handoff.outcomes.copy()
        name, hashes = f"d{next(self._numbers)}", hashes_of(count, prompt)
        self.handoff.begin(name, params)
        result = None
        if self._wait_until_known(name, hashes):
            result = self._load(name, hashes, prompt)
        self.handoff.finished(name)
        (outcome,) = (self.handoff.outcomes - before).elements()
        return outcome, result

    def _wait_until_known(self, name: str, hashes: Sequence[bytes]) -> int:
        """Return how many blocks can be loaded."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            self.handoff.look(name, [hashes])
            tiers = self.space.locate(hashes).tiers
            missing = [place for place in range(len(hashes)) if not tiers[place]]
            is_open = self.handoff.is_pending(name) and (missing or kvx.TierKind.PEER in tiers)
            if not is_open and not any(self.handoff.expects(name, 0, one) for one in missing):
                return missing[0] if missing else len(hashes)
            time.sleep(0.001)
        raise AssertionError("the lookup does not end")

    def _load(self, name: str, hashes: Sequence[bytes], prompt: int) -> kvx.TransferResult:
        count = int((self.space.locate(hashes).tiers > 0).sum())
        target = np.zeros((count, BLOCK_BYTES), np.uint8)
        result = self.space.onboard(hashes[:count], target, deadline_s=2.0).wait()
        arrived = result.reasons == kvx.MissReason.HIT
        assert (target[arrived] == blocks_of(len(hashes), prompt)[:count][arrived]).all()
        if not arrived.all():
            self.handoff.failed(name, int((~arrived).sum()))
        from_peers = int((result.tiers == kvx.TierKind.PEER).sum())
        self.handoff.loaded(name, from_peers=from_peers)
        return result

    @property
    def pinned(self) -> int:
        return int(self.cache.stats()["dram"]["pinned"])  # type: ignore[call-overload]

    def close(self) -> None:
        self.handoff.close()
        self.cache.close()
        self._agent.close()


@contextlib.contextmanager
def opened(*ends: End) -> Iterator[None]:
    try:
        yield
    finally:
        for end in ends:
            end.close()


@pytest.fixture
def pair() -> Iterator[tuple[End, End]]:
    prefill, decode = End("p", pd_lease_s=30.0), End("d", pd_wait_s=2.0)
    with opened(prefill, decode):
        yield prefill, decode


def resigned(params: Any, **changes: Any) -> Any:
    """Return a reference that somebody with the key made, with other facts."""
    reference = Reference.of_params(params)
    groups = changes.pop("groups", None) or reference.groups
    fields = {name: getattr(reference, name) for name in Reference.__struct_fields__}
    made = Reference(**{**fields, "groups": groups, **changes, "mac": b""})
    return made.signed(kvx.SharedKey(KEY)).to_params()


def test_blocks_are_handed_over_and_let_go(pair: tuple[End, End]) -> None:
    prefill, decode = pair
    params = prefill.prefill()
    assert prefill.pinned == COUNT
    outcome, result = decode.take(params)
    assert outcome is Outcome.USED
    assert result is not None
    assert result.num_blocks == COUNT
    assert (result.tiers == kvx.TierKind.PEER).all()
    # The producer is told at once, long before the lease ends.
    assert eventually(lambda: prefill.pinned == 0)


def test_stores_that_go_on_are_waited_for(pair: tuple[End, End]) -> None:
    prefill, decode = pair
    prefill.handoff.begin("p", {"do_remote_decode": True})
    prefill.handoff.storing("p", hashes_of(COUNT))
    params = prefill.handoff.issue("p", [hashes_of(COUNT)])
    prefill.handoff.finished("p")
    decode.handoff.begin("d", params)
    claimed = prefill.handoff._producer._issued  # type: ignore[union-attr]

    def is_claimed() -> bool:
        decode.handoff.look("d", [hashes_of(COUNT)])
        return all(one.claim is not None for one in claimed.values())

    assert eventually(is_claimed)
    assert decode.handoff.is_pending("d")
    assert decode.handoff.expects("d", 0, 0)
    prefill.store(COUNT)
    prefill.handoff.stored("p", hashes_of(COUNT))

    def is_known() -> bool:
        decode.handoff.look("d", [hashes_of(COUNT)])
        return not decode.handoff.is_pending("d")

    assert eventually(is_known)

    def is_found() -> bool:
        return bool((decode.space.locate(hashes_of(COUNT)).tiers > 0).all())

    assert eventually(is_found)


def test_what_was_not_stored_is_computed(pair: tuple[End, End]) -> None:
    prefill, decode = pair
    outcome, result = decode.take(prefill.prefill(stored=5))
    assert outcome is Outcome.USED
    assert result is not None
    assert result.num_blocks == 5


def test_a_reference_is_good_once(pair: tuple[End, End]) -> None:
    prefill, decode = pair
    params = prefill.prefill()
    assert decode.take(params)[0] is Outcome.USED
    assert decode.take(params)[0] is Outcome.CONSUMED
    other = End("e")
    with opened(other):
        assert other.take(params)[0] is Outcome.CONSUMED


def test_a_reference_nobody_gave_is_unknown(pair: tuple[End, End]) -> None:
    prefill, decode = pair
    params = resigned(prefill.prefill(), id=b"i" * 16)
    # What the peer holds is found by its keys all the same, and verified.
    assert decode.take(params)[0] is Outcome.UNKNOWN


@pytest.mark.parametrize("where", ["prompt", "stored"])
def test_more_blocks_than_there_are(pair: tuple[End, End], where: str) -> None:
    prefill, decode = pair
    params = prefill.prefill()
    (group,) = Reference.of_params(params).groups
    count = COUNT + 1
    # Of a longer prompt with the same beginning there are only so many.
    longer = type(group)(group.namespace, count, hashes_of(count)[-1])
    tokens = COUNT if where == "prompt" else count
    outcome, _ = decode.take(resigned(params, groups=[longer]), tokens)
    assert outcome is Outcome.OUT_OF_RANGE


def test_an_expired_lease(pair: tuple[End, End]) -> None:
    prefill, decode = pair
    past = int(time.time() * 1000) - 5000
    assert decode.take(resigned(prefill.prefill(), expires_at_ms=past))[0] is Outcome.EXPIRED
    # The producer's own clock counts, whatever the reference says.
    short = End("s", pd_lease_s=0.05)
    with opened(short):
        params = short.prefill(prompt=3)
        issued = next(iter(short.handoff._producer._issued.values()))  # type: ignore[union-attr]
        assert eventually(lambda: time.monotonic() > issued.end_s)
        later = resigned(params, expires_at_ms=past + 600_000)
        assert decode.take(later, prompt=3)[0] is Outcome.EXPIRED
        assert short.pinned == 0


@pytest.mark.parametrize("how", ["cleared", "dropped"])
def test_a_stale_reference(pair: tuple[End, End], how: str) -> None:
    prefill, decode = pair
    params = prefill.prefill()
    if how == "cleared":
        prefill.cache.clear()
    else:
        prefill.space.drop(hashes_of(COUNT)[3:5])
    for prompt in range(40, 60):
        prefill.store(COUNT, prompt)
    assert decode.take(params)[0] is Outcome.STALE


def test_blocks_are_kept_while_others_come() -> None:
    prefill, decode = End("p", blocks=64), End("d")
    with opened(prefill, decode):
        params = prefill.prefill()
        for prompt in range(40, 60):
            prefill.store(COUNT, prompt)
        assert decode.take(params)[0] is Outcome.USED


def test_no_more_is_held_than_half_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(producers, "REFERENCES_MAX", 4)
    prefill, decode = End("p", blocks=64), End("d")
    with opened(prefill, decode):
        given = [prefill.prefill(prompt=number) for number in range(4)]
        producer = prefill.handoff._producer
        assert producer is not None
        assert producer.held_bytes == prefill.pinned * BLOCK_BYTES == 24 * BLOCK_BYTES
        assert producer.counts["not_held"] == 24
        # One that is not held is good as long as nobody needs the room.
        assert decode.take(given[3], prompt=3)[0] is Outcome.USED
        prefill.prefill(prompt=4)
        prefill.prefill(prompt=5)
        assert len(producer._issued) <= 4
        assert decode.take(given[0])[0] is Outcome.EXPIRED


def test_a_reference_to_another_prompt(pair: tuple[End, End]) -> None:
    prefill, decode = pair
    params = prefill.prefill(prompt=1)
    assert decode.take(params, prompt=2)[0] is Outcome.OTHER_PROMPT


def test_a_reference_of_another_model() -> None:
    prefill, decode = End("p", model="other"), End("d")
    with opened(prefill, decode):
        assert decode.take(prefill.prefill())[0] is Outcome.OTHER_NAMESPACE


def test_forged_references_reach_nobody(pair: tuple[End, End]) -> None:
    prefill, decode = pair
    params = prefill.prefill()
    params[FIELD]["groups"][0]["num_blocks"] = 3
    assert decode.take(params)[0] is Outcome.FORGED
    assert decode.take({"do_remote_prefill": True, FIELD: "x"})[0] is Outcome.MALFORMED
    assert decode.cache.agent is not None
    assert not decode.cache.agent.peers


def test_a_producer_that_is_gone_is_waited_for_in_vain() -> None:
    prefill, decode = End("p"), End("d", pd_wait_s=0.3)
    params = prefill.prefill()
    prefill.close()
    with opened(decode):
        began_s = time.monotonic()
        assert decode.take(params)[0] is Outcome.UNREACHABLE
        assert time.monotonic() - began_s < 5


def test_a_producer_that_says_nothing_is_waited_for_in_vain() -> None:
    prefill, decode = End("p"), End("d", pd_wait_s=0.3)
    with opened(prefill, decode):
        params = prefill.prefill()
        prefill.handoff.close()
        assert decode.take(params)[0] is Outcome.TIMED_OUT


def test_a_producer_that_was_restarted() -> None:
    prefill, decode = End("p"), End("d")
    params = prefill.prefill()
    prefill.close()
    again = End("p")
    with opened(decode, again):
        assert decode.cache.agent is not None
        assert again.cache.agent is not None
        decode.cache.agent.connect(again.cache.agent.export())
        assert decode.take(params)[0] is Outcome.STALE


def test_another_agent_gets_nothing_of_what_one_has_claimed(pair: tuple[End, End]) -> None:
    prefill, decode = pair
    params = prefill.prefill()
    decode.handoff.begin("d", params)

    def is_known() -> bool:
        decode.handoff.look("d", [hashes_of(COUNT)])
        return not decode.handoff.is_pending("d")

    assert eventually(is_known)
    other = End("e")
    with opened(other):
        assert other.take(params)[0] is Outcome.CONSUMED
    producer = prefill.handoff._producer
    assert producer is not None
    done = Done(Reference.of_params(params).id)
    producer.done("e", done)
    assert prefill.pinned == COUNT
    producer.done("d", done)
    assert prefill.pinned == 0


def test_a_reset_while_a_prefill_is_stored(pair: tuple[End, End]) -> None:
    prefill, decode = pair
    prefill.handoff.begin("p", {"do_remote_decode": True})
    prefill.handoff.storing("p", hashes_of(COUNT))
    params = prefill.handoff.issue("p", [hashes_of(COUNT)])
    prefill.handoff.reset()
    prefill.handoff.finished("p")
    assert decode.take(params)[0] is Outcome.STALE
    producer = prefill.handoff._producer
    assert producer is not None
    assert not producer._storing


def test_an_aborted_prefill_leaves_nothing(pair: tuple[End, End]) -> None:
    prefill, _ = pair
    prefill.handoff.begin("p", {"do_remote_decode": True})
    prefill.handoff.storing("p", hashes_of(COUNT))
    prefill.handoff.finished("p")
    prefill.store(COUNT)
    prefill.handoff.stored("p", hashes_of(COUNT))
    producer = prefill.handoff._producer
    assert producer is not None
    assert not producer._storing
    assert prefill.pinned == 0


def test_without_a_key_requests_are_served_without() -> None:
    config = {"tiers": [{"kind": "dram", "capacity": "1MiB"}, {"kind": "peer", "name": "p"}]}
    with kvx.TieredCache.open(config) as cache:
        rank: Any = SimpleNamespace(cache=cache, groups=[])
        handoff = Handoff(rank, Settings(cache.config))
        assert not handoff.begin("a", {"do_remote_decode": True})
        assert not handoff.issue("a", [hashes_of(3)])
        assert not handoff.begin("b", {"do_remote_prefill": True})
        assert not handoff.is_pending("b")
        handoff.finished("b")
        assert handoff.outcomes == {Outcome.UNAVAILABLE: 1}
        assert handoff.take_outcomes() == {Outcome.UNAVAILABLE: 1}
        assert not handoff.take_outcomes()
        handoff.close()
