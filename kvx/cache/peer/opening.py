"""The agent of a cache: its own by the configuration, or one that the application shares."""

from __future__ import annotations

import re
import secrets
import socket
from typing import TYPE_CHECKING

from kvx.cache.peer.tier import PeerTier
from kvx.errors import ConfigError, UsageError
from kvx.key_source import read_key
from kvx.tier_config import PeerTierConfig
from kvx.transfer.agents.address import is_address, parse_address
from kvx.transfer.agents.agent import Agent

if TYPE_CHECKING:
    from kvx.cache.shared import Shared
    from kvx.config import CacheConfig

_NAME_BYTES_MAX = 40


def check_agent(config: CacheConfig, agent: Agent | None) -> None:
    """Raise for an agent that does not fit the configuration.

    Raises:
        UsageError: There is no peer tier for the agent.
        ConfigError: The tier has settings for an agent of its own; or a malformed address.
    """
    tier = config.tier(PeerTierConfig)
    if tier is None:
        if agent is not None:
            raise UsageError("agent: the configuration has no tier of kind peer to use it")
        return
    if agent is not None and tier.has_agent:
        raise ConfigError(
            "name, listen, key, key_file, directory: those of the agent that was passed hold; "
            "leave them out"
        )
    for one in tier.peers:
        if "/" in one or ":" in one:
            parse_address(one)


def open_agent(config: PeerTierConfig) -> Agent:
    """Return an agent as the tier's configuration describes it.

    Raises:
        KvxError: As `kvx.Agent`.
    """
    key: bytes | str | None = config.key or None
    if config.key_file is not None:
        key = read_key(config.key_file)
    # Other names are sought once the agent is there: their cards have to come first.
    addresses = [one for one in config.peers if is_address(one)]
    return Agent(
        config.name or _made_up_name(),
        listen=config.listen or None,
        key=key,
        config={
            "peers": addresses,
            "directory": config.directory,
            # Whom a directory names may have what we look for.
            "mesh": config.directory is not None,
        },
    )


def open_peers(shared: Shared, config: CacheConfig, agent: Agent | None) -> PeerTier | None:
    """Return the peer tier of a configuration; None without one.

    Raises:
        KvxError: The agent cannot be opened.
    """
    tier = config.tier(PeerTierConfig)
    if tier is None:
        return None
    found = open_agent(tier) if agent is None else agent
    try:
        return PeerTier(shared, tier, config.breaker, found, is_own_agent=agent is None)
    except BaseException:
        if agent is None:
            found.close(1.0)
        raise


def _made_up_name() -> str:
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip(".-") or "cache"
    return f"{host[:_NAME_BYTES_MAX]}-{secrets.token_hex(4)}"
