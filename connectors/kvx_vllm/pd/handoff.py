"""What the connector sees of prefill and decode on different engines: both ends, on one agent."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import kvx
from kvx_vllm.pd import messages
from kvx_vllm.pd.consumer import Consumer
from kvx_vllm.pd.messages import TOPIC, Claim, Done, Word
from kvx_vllm.pd.producer import Producer
from kvx_vllm.pd.reference import Outcome, has_reference, wants_prefill

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvx_vllm.rank_cache import RankCache
    from kvx_vllm.settings import Settings

_log = logging.getLogger(__name__)
# Of DRAM: the rest stays for what is served from it.
_HELD_SHARE = 2


class Handoff:
    """References given and taken over the agent of a cache; where that cannot be, none is."""

    def __init__(self, rank: RankCache | None, settings: Settings) -> None:
        """Begin to listen.

        Args:
            rank: The cache of the only rank, in this process; None when there are several.
            settings: The connector's.
        """
        self._agent = None if rank is None else rank.cache.agent
        self._objection = _objection(rank, self._agent)
        self._producer: Producer | None = None
        self._consumer: Consumer | None = None
        self._num_refused = 0
        self._told: Counter[Outcome] = Counter()
        agent = self._agent
        if rank is None or agent is None or agent.key is None:
            return

        def spaces() -> list[kvx.CacheSpace]:
            return [group.space for group in rank.groups]

        self._producer = Producer(
            spaces, agent, agent.key, lease_s=settings.pd_lease_s,
            held_bytes_max=rank.cache.config.dram.capacity_bytes // _HELD_SHARE,
        )  # fmt: skip
        self._consumer = Consumer(spaces, agent, agent.key, wait_s=settings.pd_wait_s)
        self._producer.say = self._consumer.say = self._say
        agent.hear(TOPIC, self._heard)

    def begin(self, req_id: str, params: Mapping[str, Any] | None) -> bool:
        """Take a request; returns whether all its blocks have to be stored."""
        if self._objection and (has_reference(params) or wants_prefill(params)):
            self._num_refused += has_reference(params)
            _log.warning(
                "request %s is part of disaggregated serving, which needs %s: it is served without",
                req_id, self._objection,
            )  # fmt: skip
        if self._consumer is not None and params is not None and has_reference(params):
            self._consumer.begin(req_id, params)
        if self._producer is None or not wants_prefill(params):
            return False
        self._producer.begin(req_id)
        return True

    def look(self, req_id: str, chains: Sequence[Sequence[bytes]]) -> None:
        """Go one step on with the reference that a request came with, if it did."""
        if self._consumer is not None:
            self._consumer.look(req_id, chains)

    def is_pending(self, req_id: str) -> bool:
        """Return whether the producer has not said yet what it holds."""
        return self._consumer is not None and self._consumer.is_pending(req_id)

    def expects(self, req_id: str, group: int, place: int) -> bool:
        """Return whether a block that is not found yet may be in a moment."""
        return self._consumer is not None and self._consumer.expects(req_id, group, place)

    def failed(self, req_id: str, num_blocks: int) -> None:
        """Note blocks that did not come."""
        if self._consumer is not None:
            self._consumer.failed(req_id, num_blocks)

    def loaded(self, req_id: str, *, from_peers: int) -> None:
        """Note that a load is over, with so many blocks of peers in it."""
        if self._consumer is not None:
            self._consumer.loaded(req_id, from_peers=from_peers)

    def storing(self, req_id: str, keys: Iterable[bytes]) -> None:
        """Note blocks that are on their way into the cache."""
        if self._producer is not None:
            self._producer.storing(req_id, keys)

    def stored(self, req_id: str, keys: Iterable[bytes]) -> None:
        """Note that stores have ended."""
        if self._producer is not None:
            self._producer.stored(req_id, keys)

    def issue(self, req_id: str, chains: Sequence[Sequence[bytes]]) -> dict[str, Any]:
        """Return what the response of a prefill carries; empty when it was no prefill."""
        return {} if self._producer is None else self._producer.issue(req_id, chains)

    def finished(self, req_id: str) -> None:
        """Let go of a request; its stores may still be on their way."""
        if self._producer is not None and self._consumer is not None:
            self._producer.finished(req_id)
            self._consumer.finished(req_id)

    @property
    def outcomes(self) -> Counter[Outcome]:
        """How many references that requests came with ended how."""
        if self._consumer is not None:
            return self._consumer.outcomes
        return Counter({Outcome.UNAVAILABLE: self._num_refused})

    def take_outcomes(self) -> Counter[Outcome]:
        """Return those of them since the last call."""
        fresh = self.outcomes - self._told
        self._told += fresh
        return fresh

    def reset(self) -> None:
        """Let what was given out go: it is not to be found any more."""
        if self._producer is not None:
            self._producer.reset()

    def close(self) -> None:
        """Let everything go."""
        if self._agent is not None and self._producer is not None:
            self._agent.hear(TOPIC, None)
            self._producer.reset()

    def _say(self, peer: str, message: messages.Message) -> bool:
        assert self._agent is not None, "who has none says nothing"
        try:
            self._agent.say(peer, TOPIC, messages.encode(message))
        except kvx.KvxError as error:
            _log.debug("%s was not told of a reference: %s", peer, error)
            return False
        return True

    def _heard(self, peer: str, payload: bytes) -> None:
        """Take a message, on the agent's thread."""
        try:
            message = messages.decode(payload)
        except kvx.UsageError as error:
            _log.warning("%s: %s", peer, error)
            return
        if self._producer is None or self._consumer is None:
            return
        match message:
            case Claim():
                self._producer.claimed(peer, message)
            case Word():
                self._consumer.answered(peer, message)
            case Done():
                self._producer.done(peer, message)


def _objection(rank: RankCache | None, agent: kvx.Agent | None) -> str:
    """Return what is missing to give and take references; empty when nothing is."""
    if rank is None:
        return "an engine whose only rank runs in the process of its scheduler"
    if agent is None:
        return "a tier of kind peer in the cache's configuration"
    if agent.key is None:
        return "a key that all agents share: KVX_PEER_KEY, or key_file in the tier of kind peer"
    return ""
