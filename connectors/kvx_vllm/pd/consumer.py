"""The references that requests came with: validated, claimed at the producer, and accounted for.

Nothing here decides what is loaded: the cache finds blocks by keys that are made of this engine's
own prompt. A reference makes it look at the right peer, and wait for it, for a bounded time.
"""

from __future__ import annotations

import base64
import itertools
import logging
import threading
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

import kvx
from kvx_vllm.pd.messages import Claim, Done, Verdict, Word
from kvx_vllm.pd.reference import FIELD, Outcome, Reference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

_log = logging.getLogger(__name__)
# References remembered, so that the same one is not asked for twice.
_SEEN_MAX = 1 << 16
# Seconds after which blocks that a peer says it holds must have been noted here.
_VISIBLE_S = 0.25


@dataclass(slots=True)
class Taking:
    """What a request makes of its reference.

    Attributes:
        params: As they came.
        end_s: Until when the producer is waited for, of the monotonic clock; 0 before that begins.
        reference: Once it was found to be right.
        number: Of the claim; 0 before there is one.
        word: The answer to it.
        held: (n,) bool for each group, which blocks the producer holds; empty before it said so.
        failed: Blocks that did not come.
        outcome: How it ended.
    """

    params: Mapping[str, Any]
    end_s: float = 0.0
    reference: Reference | None = None
    number: int = 0
    word: Word | None = None
    held: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    failed: int = 0
    outcome: Outcome | None = None


class Consumer:
    """Takes references. Its methods run on the scheduler's thread, `answered` on the agent's.

    Attributes:
        outcomes: How many references ended how.
        say: Sends a message to a peer; False when it cannot.
    """

    def __init__(
        self,
        spaces: Callable[[], list[kvx.CacheSpace]],
        agent: kvx.Agent,
        key: kvx.SharedKey,
        *,
        wait_s: float,
    ) -> None:
        """Have taken none.

        Args:
            spaces: Returns the present space of each KV cache group.
            agent: What the cache is connected through.
            key: Its key.
            wait_s: Seconds that a request waits at most for the producer's word.
        """
        self._spaces = spaces
        self._agent = agent
        self._key = key
        self._wait_s = wait_s
        self._takings: dict[str, Taking] = {}
        self._claims: dict[int, Taking] = {}
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self.outcomes: Counter[Outcome] = Counter()
        self.say: Callable[[str, Claim | Done], bool] = lambda *_: False

    def begin(self, req_id: str, params: Mapping[str, Any]) -> None:
        """Take a request that came with a reference."""
        self._takings[req_id] = Taking(params)

    def look(self, req_id: str, chains: Sequence[Sequence[bytes]]) -> None:
        """Go one step on with a reference; never waits.

        Args:
            req_id: Of the request.
            chains: The hashes of its own prompt, for each group.
        """
        taking = self._takings.get(req_id)
        if taking is None or taking.outcome is not None or taking.held:
            return
        now_s = time.monotonic()
        if taking.reference is None:
            taking.end_s = now_s + self._wait_s
            if not self._accept(taking, chains):
                return
        reference = taking.reference
        assert reference is not None
        peer = self._agent.peers.get(reference.agent)
        standing = "not connected" if peer is None else peer.state.value
        if peer is not None and f"{peer.incarnation:x}" != reference.incarnation:
            if peer.state is kvx.PeerState.UP:
                self._refuse(taking, Outcome.STALE, "its engine was restarted since")
                return
            peer = None  # its former life
        if taking.word is not None:
            self._take_word(taking, reference, chains, now_s)
        elif now_s >= taking.end_s:
            outcome = Outcome.TIMED_OUT if taking.number else Outcome.UNREACHABLE
            self._refuse(taking, outcome, f"no word within {self._wait_s} s; it is {standing}")
        elif not taking.number and peer is not None and peer.state is kvx.PeerState.UP:
            self._claim(taking, reference)

    def is_pending(self, req_id: str) -> bool:
        """Return whether the producer has not said yet what it holds."""
        taking = self._takings.get(req_id)
        return taking is not None and taking.outcome is None and not taking.held

    def expects(self, req_id: str, group: int, place: int) -> bool:
        """Return whether a block that is not found yet may be in a moment."""
        taking = self._takings.get(req_id)
        if taking is None or taking.outcome is not None:
            return False
        if not taking.held:
            return True
        held = taking.held[group]
        return place < len(held) and bool(held[place]) and time.monotonic() < taking.end_s

    def failed(self, req_id: str, num_blocks: int) -> None:
        """Note blocks that did not come; they are computed."""
        taking = self._takings.get(req_id)
        if taking is not None:
            taking.failed += num_blocks

    def loaded(self, req_id: str, *, from_peers: int) -> None:
        """Note that a load is over, with so many blocks of peers in it."""
        taking = self._takings.get(req_id)
        if taking is None or taking.outcome is not None:
            return
        if taking.failed:
            why = f"{taking.failed} of its blocks did not come"
            self._refuse(taking, Outcome.LOAD_FAILED, why)
        else:
            self._end(taking, Outcome.USED if from_peers else Outcome.UNNEEDED)

    def finished(self, req_id: str) -> None:
        """Let go of a request."""
        taking = self._takings.pop(req_id, None)
        if taking is not None and taking.outcome is None:
            verdict = Verdict.READY if taking.word is None else taking.word.verdict
            is_refused = verdict is not Verdict.READY
            self._end(taking, Outcome(verdict) if is_refused else Outcome.UNNEEDED)

    def answered(self, peer: str, word: Word) -> None:
        """Take the word of a producer."""
        with self._lock:
            taking = self._claims.get(word.number)
        reference = None if taking is None else taking.reference
        if taking is not None and reference is not None and reference.agent == peer:
            taking.word = word

    def _accept(self, taking: Taking, chains: Sequence[Sequence[bytes]]) -> bool:
        """Validate a reference, and be connected with whom it names; False when it is refused."""
        try:
            reference = Reference.of_params(taking.params)
        except kvx.UsageError as error:
            return self._refuse(taking, Outcome.MALFORMED, str(error))
        taking.reference = reference
        if not reference.is_signed(self._key):
            taking.reference = None  # nothing in it means anything
            return self._refuse(taking, Outcome.FORGED, "it is not signed with the agents' key")
        wrong = self._wrong_with(reference, chains)
        if wrong is not None:
            return self._refuse(taking, *wrong)
        self._seen[reference.id] = None
        if len(self._seen) > _SEEN_MAX:
            self._seen.popitem(last=False)
        if reference.agent == self._agent.name:
            self._end(taking, Outcome.UNNEEDED)  # this engine computed it
            return False
        try:
            self._agent.import_peer(reference.card)
        except kvx.KvxError as error:
            # Mostly a later one is known; whether it is the same life shows once it is up.
            _log.debug("the card of %s is not taken: %s", reference.agent, error)
        self._agent.seek(reference.agent)
        return True

    def _wrong_with(
        self, reference: Reference, chains: Sequence[Sequence[bytes]]
    ) -> tuple[Outcome, str] | None:
        """Return what speaks against a reference that somebody with the key made."""
        late_s = time.time() - reference.expires_at_ms / 1000
        if reference.id in self._seen:
            return Outcome.CONSUMED, "another request came with it"
        if late_s > 0:
            return Outcome.EXPIRED, f"it expired {late_s:.1f} s ago"
        spaces = self._spaces()
        if [one.namespace for one in reference.groups] != [
            space.namespace.public_id for space in spaces
        ]:
            return Outcome.OTHER_NAMESPACE, "its engine's model, layout, ranks or hashes differ"
        for group, chain in zip(reference.groups, chains, strict=True):
            if group.num_blocks > len(chain):
                counts = f"{group.num_blocks} blocks, the prompt has {len(chain)}"
                return Outcome.OUT_OF_RANGE, f"it is of {counts}"
            if group.num_blocks and chain[group.num_blocks - 1] != group.last_hash:
                return Outcome.OTHER_PROMPT, "it is of another prompt"
        return None

    def _claim(self, taking: Taking, reference: Reference) -> None:
        number = next(self._numbers)
        with self._lock:
            self._claims[number] = taking
        wanted = [group.num_blocks for group in reference.groups]
        if self.say(reference.agent, Claim(number, reference.id, wanted)):
            taking.number = number
        else:
            with self._lock:
                del self._claims[number]

    def _take_word(
        self, taking: Taking, reference: Reference, chains: Sequence[Sequence[bytes]], now_s: float
    ) -> None:
        """Do what the producer said: look for blocks there, or compute them."""
        word = taking.word
        assert word is not None
        if word.verdict is not Verdict.READY:
            self._refuse(taking, Outcome(word.verdict), "its engine says so")
            return
        counts = [group.num_blocks for group in reference.groups]
        if [len(bits) for bits in word.held] != [(count + 7) // 8 for count in counts]:
            self._refuse(taking, Outcome.OUT_OF_RANGE, "its engine holds another number of blocks")
            return
        taking.held = [
            np.unpackbits(np.frombuffer(bits, np.uint8))[:count].astype(np.bool_)
            for bits, count in zip(word.held, counts, strict=True)
        ]
        taking.end_s = now_s + _VISIBLE_S
        for space, chain, held in zip(self._spaces(), chains, taking.held, strict=True):
            hashes = [chain[place] for place in np.flatnonzero(held).tolist()]
            if hashes:
                space.expect_at(reference.agent, hashes)

    def _refuse(self, taking: Taking, outcome: Outcome, why: str) -> bool:
        """End a reference that cannot be used; returns False."""
        _log.warning(
            "reference %s is not used (%s): %s; what is missing is computed",
            _label(taking), outcome, why,
        )  # fmt: skip
        self._end(taking, outcome)
        return False

    def _end(self, taking: Taking, outcome: Outcome) -> None:
        """Account for a reference, and tell its producer that nothing is waited for any more."""
        taking.outcome = outcome
        self.outcomes[outcome] += 1
        if taking.number:
            with self._lock:
                self._claims.pop(taking.number, None)
            assert taking.reference is not None
            self.say(taking.reference.agent, Done(taking.reference.id))


def _label(taking: Taking) -> str:
    """Return what a reference is called in a log; it may be anything."""
    if taking.reference is not None:
        return taking.reference.id.hex()[:8]
    fields = taking.params.get(FIELD)
    found = fields.get("id") if isinstance(fields, dict) else None
    try:
        return base64.b64decode(found, validate=True).hex()[:8] if found else "without id"
    except (TypeError, ValueError):
        return "without id"
