"""What can be chosen about the NIXL backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvx.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

# They wait for a driver that may not be there, at full speed: the probe creates what is asked for
# in a process of its own, and these are not asked for at all.
_FILE_PLUGINS = frozenset({"GDS", "GDS_MT", "POSIX", "OBJ", "AZURE_BLOB", "HF3FS", "GUSLI"})


@dataclass(frozen=True, slots=True)
class NixlOptions:
    """How NIXL is used.

    Attributes:
        backends: Plugins of NIXL, all of which must load.
        parameters: What `createBackend` gets, by plugin; see NIXL's own documentation.
        progress_every_s: NIXL's progress thread sleeps in poll and is woken by the network; this
            often it looks without being woken. 0 makes it spin on half a core.
        batch_bytes: Blocks are handed to NIXL in batches of about this size: one is verified while
            the next ones move, and a deadline waits for one batch at most.
        batches_in_flight_max: Of one transfer.
        is_verifying: Compute and compare checksums of everything that moves.
        probe_timeout_s: How long the plugins may take to load.
    """

    backends: tuple[str, ...] = ("UCX",)
    parameters: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    progress_every_s: float = 0.05
    batch_bytes: int = 16 << 20
    batches_in_flight_max: int = 8
    is_verifying: bool = True
    probe_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: Names the field and the value.
        """
        if not self.backends or _FILE_PLUGINS.intersection(self.backends):
            raise ConfigError(
                f"backends is {self.backends!r}: name plugins of NIXL that move memory between "
                "agents, such as 'UCX' or 'LIBFABRIC'",
                key="backends",
            )
        for name in ("progress_every_s", "batch_bytes", "batches_in_flight_max"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: it is above 0", key=name)
