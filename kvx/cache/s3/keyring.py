"""Which key seals whose objects, in one tier.

Where there is a key at all every tenant needs one, of its own or the one for all others: so
nobody's blocks are stored unsealed because a name was forgotten or misspelt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.errors import ConfigError
from kvx.namespace import tenant_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvx.cache.s3.seal import Sealer


class Keyring:
    """The sealers of a tier. Never changed; shows no key.

    Attributes:
        is_sealing: Whether objects are sealed: those of all tenants, or of none.
    """

    __slots__ = ("_by_id", "_default", "_of_tenants", "is_sealing")

    def __init__(self, sealers: Mapping[str | None, Sealer]) -> None:
        """Take sealers by the name of the tenant; None stands for all others.

        Raises:
            ConfigError: Two have the same key, and so could read each other's objects.
        """
        by_id: dict[bytes, tuple[str | None, Sealer]] = {}
        for tenant, sealer in sealers.items():
            first, _ = by_id.setdefault(sealer.id, (tenant, sealer))
            if first != tenant:
                raise ConfigError(
                    f"seal_keys: {_called(first)} and {_called(tenant)} have the same key, so they "
                    "could read each other's objects; give each its own",
                    key="seal_keys",
                )
        self._by_id = {seal_id: sealer for seal_id, (_, sealer) in by_id.items()}
        self._default = sealers.get(None)
        self._of_tenants = {
            tenant_digest(tenant): sealer
            for tenant, sealer in sealers.items()
            if tenant is not None
        }
        self.is_sealing = bool(sealers)

    def check(self, tenant: str) -> None:
        """Refuse a tenant that has no key where others have.

        Raises:
            ConfigError: Says how to give it one.
        """
        if self._has(tenant_digest(tenant)):
            return
        raise ConfigError(
            f"seal_keys: {_called(tenant)} has no key, and nothing of it is stored unsealed where "
            "others seal: name its key there, or one for all others by seal_key_file or "
            "seal_key_env",
            key="seal_keys",
        )

    def of(self, tenant: int) -> Sealer | None:
        """Return what seals the objects of a tenant, by `tenant_digest`; None: nothing is sealed.

        Raises:
            ConfigError: It has no key where others have; `check` says so before.
        """
        if not self._has(tenant):
            raise ConfigError("seal_keys: a tenant has no key", key="seal_keys")
        return self._of_tenants.get(tenant, self._default)

    def by_id(self, seal_id: bytes) -> Sealer | None:
        """Return the sealer of an id; None where its key is not here."""
        return self._by_id.get(seal_id)

    def makes(self, seal_id: bytes) -> bool:
        """Return whether objects of an id, empty for unsealed ones, are made with these keys."""
        return seal_id in self._by_id if self.is_sealing else not seal_id

    def _has(self, tenant: int) -> bool:
        return not self.is_sealing or self._default is not None or tenant in self._of_tenants


def _called(tenant: str | None) -> str:
    return "all others" if tenant is None else f"tenant {tenant!r}"
