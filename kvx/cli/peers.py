"""What `kvx doctor` says of peers: whether they are reached, how, and what they serve."""

from __future__ import annotations

import dataclasses
import secrets
import threading
from typing import TYPE_CHECKING

from kvx.cache.peer import messages
from kvx.cache.peer.messages import KEY_BYTES, TOPIC, SnapshotPart, Subscribe
from kvx.cache.peer.opening import open_agent
from kvx.cli.finding import Finding
from kvx.errors import KvxError
from kvx.tier_config import PeerTierConfig
from kvx.transfer.agents.config import AgentConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvx.config import CacheConfig
    from kvx.transfer.agents.agent import Agent
    from kvx.transfer.agents.peer import Peer

_CONNECT_S = 3.0
_ANSWER_S = 2.0


def peer_findings(config: CacheConfig | None) -> Iterator[Finding]:
    """Yield what the peer tier of a configuration would do; without one, what this machine can."""
    tier = PeerTierConfig() if config is None else config.tier(PeerTierConfig)
    if tier is None:
        yield Finding(
            "peer tier", is_good=True, found="not configured",
            remedy="a tier of kind peer: reads blocks of caches of other processes",
        )  # fmt: skip
        return
    try:
        # Under its own name it would take the place of the cache's agent.
        agent = open_agent(
            dataclasses.replace(tier, name=f"doctor-{secrets.token_hex(4)}", listen=(), peers=())
        )
    except KvxError as error:
        yield Finding("peers", is_good=False, found=f"no agent: {error}")
        return
    with agent:
        yield _this_host(agent)
        if config is not None:
            yield _other_hosts(tier)
            for target in tier.peers:
                yield _look_at(agent, target)


def _this_host(agent: Agent) -> Finding:
    place = next((one for one in agent.addresses if one.startswith("unix:")), "")
    if place:
        return Finding(
            "peers on this host", is_good=True, found=f"copied out of shared memory; {place}"
        )
    remedy = f"unix = {AgentConfig().unix}: lets memory be passed over a socket file"
    return Finding("peers on this host", is_good=False, found="over TCP only", remedy=remedy)


def _other_hosts(tier: PeerTierConfig) -> Finding:
    is_secret = bool(tier.key or tier.key_file)
    if tier.listen and is_secret:
        return Finding("peers on other hosts", is_good=True, found=", ".join(tier.listen))
    missing = [] if tier.listen else ["listen"]
    missing += [] if is_secret else ["a key (KVX_PEER_KEY or key_file)"]
    return Finding(
        "peers on other hosts", is_good=False, found=f"cannot reach this cache: no {missing[0]}",
        remedy=f"set {' and '.join(missing)} in the tier of kind peer",
    )  # fmt: skip


def _look_at(agent: Agent, target: str) -> Finding:
    subject = f"peer {target}"
    try:
        peer = agent.connect(target, _CONNECT_S)
    except KvxError as error:
        return Finding(subject, is_good=False, found=str(error))
    chosen = agent.explain(peer).chosen
    way = "no way" if chosen is None else chosen.backend
    count = _served(agent, peer)
    if count is None:
        return Finding(
            subject, is_good=False, found=f"{peer.name} is up over {way}; no cache serves there",
            remedy="open a cache there with a tier of kind peer and serve: true",
        )  # fmt: skip
    return Finding(
        subject, is_good=chosen is not None,
        found=f"{peer.name} is up over {way} and serves {count} blocks",
    )  # fmt: skip


def _served(agent: Agent, peer: Peer) -> int | None:
    """Return how many blocks the tiers of a peer hold; None when it does not say."""
    count, done = [0], threading.Event()

    def hear(name: str, payload: bytes) -> None:
        message = messages.decode(payload)
        if isinstance(message, SnapshotPart) and name == peer.name:
            count[0] += len(message.keys) // KEY_BYTES
            if message.is_last:
                done.set()

    agent.hear(TOPIC, hear)
    try:
        agent.say(peer.name, TOPIC, messages.encode(Subscribe(0, 0)))
        return count[0] if done.wait(_ANSWER_S) else None
    except KvxError:
        return None
    finally:
        agent.hear(TOPIC, None)
