"""Credentials from AWS's files of profiles, single sign-on and roles, by botocore where it is here.

obstore itself knows the environment, web identities, containers and instances; botocore knows the
whole chain.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kvx.config import aws_environment
from kvx.errors import UnavailableError

if TYPE_CHECKING:
    from botocore.credentials import Credentials
    from obstore.store import S3Credential

# obstore asks again five minutes before they expire; botocore renews its own ten before.
_GOOD_FOR = timedelta(minutes=10)


def provider_for(profile: str) -> ChainCredentials | None:
    """Return what asks botocore; None where obstore needs no help, or there is no botocore.

    Args:
        profile: The one to use; empty for the default chain, in which the environment is first.

    Raises:
        UnavailableError: A profile is named, and botocore is not here.
    """
    if not profile and aws_environment().has_credentials:
        return None
    if find_spec("botocore") is not None:
        return ChainCredentials(profile)
    if profile:
        raise UnavailableError(
            f"profile {profile!r}: AWS's files of profiles are read by botocore, which is not here:"
            " pip install boto3"
        )
    return None


@dataclass(slots=True)
class ChainCredentials:
    """Asked by obstore, on the loop, whenever the last ones are about to expire.

    Attributes:
        profile: Whose credentials; empty for those of the default chain.
    """

    profile: str
    _last: Credentials | None = None

    async def __call__(self) -> S3Credential:
        """Return what the chain has now; files are read, services asked, in another thread.

        Raises:
            LookupError: It has none.
        """
        return await asyncio.to_thread(self._fetch)

    def _fetch(self) -> S3Credential:
        from botocore.credentials import RefreshableCredentials  # noqa: PLC0415 - optional

        # Others never change by themselves, though the file they come from may have been.
        if not isinstance(self._last, RefreshableCredentials):
            self._last = self._find()
        frozen = self._last.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _GOOD_FOR,
        }

    def _find(self) -> Credentials:
        from botocore.session import Session  # noqa: PLC0415 - optional

        found = Session(profile=self.profile or None).get_credentials()
        if found is None:
            raise LookupError(
                "none in the environment, in files of profiles, of a container or an instance"
            )
        return found
