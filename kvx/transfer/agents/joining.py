"""Connecting with a peer, for a caller that waits."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvx.errors import IncompatibleError, TransferCancelled, TransferTimeout, UsageError
from kvx.transfer.agents.address import is_address, parse_address
from kvx.transfer.agents.handshake import Why
from kvx.transfer.agents.metadata import PeerInfo, decode_card
from kvx.transfer.agents.peer_state import PeerState

if TYPE_CHECKING:
    from kvx.transfer.agents.dialler import Wish
    from kvx.transfer.agents.parts import AgentParts
    from kvx.transfer.agents.roster import PeerRecord


def import_card(parts: AgentParts, data: bytes) -> PeerInfo:
    """Take the card of another agent; see `Agent.import_peer`."""
    card = decode_card(bytes(data), parts.key)
    if card.name == parts.identity.name:
        raise UsageError(f"the card is of {card.name}, which is the name of this agent")
    with parts.roster.changed:
        known = parts.book.get(card.name)
        is_taken = parts.discovery.take(card, bytes(data))
        if not is_taken and known is not None and known != card:
            raise UsageError(
                f"the card of {card.name} is an old one: {known.identity.incarnation:x}, edition "
                f"{known.sequence}, is known and the card says {card.identity.incarnation:x}, "
                f"edition {card.sequence}"
            )
    return PeerInfo(
        card.name, card.identity.incarnation, card.addresses,
        card.host.is_same_host(parts.issuer.card.host), tuple(card.backends),
    )  # fmt: skip


def join(parts: AgentParts, target: str | bytes, timeout_s: float) -> PeerRecord:
    """Be connected with a peer; see `Agent.connect`."""
    name = import_card(parts, target).name if isinstance(target, bytes) else target
    end = time.monotonic() + timeout_s
    with parts.roster.changed:
        parts.discovery.look()
        if is_address(name):
            wish = parts.dialler.wish(str(parse_address(name)))
        else:
            record = parts.roster.current(name)
            if record is not None and record.state is PeerState.UP:
                return record
            wish = parts.dialler.wish(name, name)
        parts.core.wake()
        while True:
            found = _reached(parts, wish)
            if found is not None:
                return found
            _raise_refusal(parts, wish)
            remaining = end - time.monotonic()
            if remaining <= 0:
                raise TransferTimeout(
                    f"{wish.target} could not be reached within {timeout_s} s: "
                    f"{wish.error or _standing(parts, wish)}; is it running, and listening there?",
                    peer=wish.name or wish.target,
                )
            # Attempts change the wish without a notice of their own.
            parts.roster.changed.wait(min(remaining, 0.05))


def seek(parts: AgentParts, target: str) -> None:
    """Want to be connected with a peer, without waiting; see `Agent.seek`."""
    with parts.roster.changed:
        if is_address(target):
            parts.dialler.wish(str(parse_address(target)))
        else:
            parts.dialler.wish(target, target)
        parts.core.wake()


def _reached(parts: AgentParts, wish: Wish) -> PeerRecord | None:
    record = None if wish.name is None else parts.roster.current(wish.name)
    return record if record is not None and record.state is PeerState.UP else None


def _raise_refusal(parts: AgentParts, wish: Wish) -> None:
    if not parts.is_open:
        raise TransferCancelled("the agent was closed while it was connecting")
    refusal = wish.refusal
    if refusal is None or refusal.why in (Why.DUPLICATE, Why.CAPACITY):
        return
    parts.dialler.unwish(wish.target)
    if refusal.why is Why.SELF:
        raise UsageError(f"{wish.target} is this agent itself")
    who = "it says" if refusal.is_theirs else "refused here"
    raise IncompatibleError(
        f"{wish.target} cannot be connected with, {who}: {refusal.text}", ours=None, theirs=None
    )


def _standing(parts: AgentParts, wish: Wish) -> str:
    record = None if wish.name is None else parts.roster.current(wish.name)
    return "nobody answers" if record is None else f"it is {record.state.value}"
