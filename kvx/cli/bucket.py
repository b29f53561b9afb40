"""A bucket on the command line: its address, how it is reached, and work that is done in it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvx.cache.breaker import Breaker
from kvx.cache.s3.effort import Effort
from kvx.cache.s3.instruments import S3Instruments
from kvx.cache.s3.inventory import Inventory
from kvx.cache.s3.obstore_store import open_store
from kvx.config import BreakerConfig, CacheConfig
from kvx.errors import UsageError
from kvx.metrics import Registry
from kvx.tier_config import S3TierConfig

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable

    from kvx.cache.s3.store import ObjectStore

SCHEME: Final = "s3://"
_DEADLINE_S: Final = 30.0
# A command has nothing else to do: it gives up only what fails on and on.
_BREAKER: Final = BreakerConfig(failures=100)
# Option of the command, field of the tier's configuration.
_FIELDS: Final = {
    "endpoint": "endpoint",
    "region": "region",
    "profile": "profile",
    "ca_file": "ca_file",
    "anonymous": "is_anonymous",
    "max_in_flight": "max_in_flight",
    "deadline": "deadline_s",
    "seal_key_file": "seal_key_file",
    "seal_key_env": "seal_key_env",
}


def add_bucket_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how a bucket is reached."""
    group = parser.add_argument_group(
        "for s3://", "Credentials come by the usual AWS chain. Without /PREFIX it is that of the "
        "configuration, kvx by default; s3://BUCKET/ is none."
    )  # fmt: skip
    group.add_argument("--config", help="configuration of a cache, whose S3 tier says the rest")
    group.add_argument("--endpoint", help="URL of the service; AWS by default")
    group.add_argument("--region")
    group.add_argument("--profile", help="of the AWS configuration files")
    group.add_argument("--ca-file", type=Path, help="certificates to trust besides the system's")
    group.add_argument("--anonymous", action="store_true", default=None, help="sign no request")
    group.add_argument("--max-in-flight", type=int, metavar="N", help="most requests at a time")
    group.add_argument(
        "--deadline", type=float, metavar="S",
        help=f"most seconds of a call, retries included; {_DEADLINE_S:g} by default",
    )  # fmt: skip


def add_seal_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the key of sealed objects is."""
    group = parser.add_argument_group("for s3:// with --verify")
    group.add_argument("--seal-key-file", type=Path, help="key of sealed objects")
    group.add_argument("--seal-key-env", metavar="NAME", help="variable with that key")


def bucket_config(address: str, options: argparse.Namespace) -> S3TierConfig:
    """Return the bucket of an address such as ``s3://bucket/prefix``, reached as options say.

    Raises:
        UsageError: It is no such address, or an option does not fit.
    """
    bucket, slash, prefix = address.removeprefix(SCHEME).partition("/")
    if not address.startswith(SCHEME) or not bucket:
        raise UsageError(f"{address!r} is no bucket; s3://BUCKET or s3://BUCKET/PREFIX is")
    configured = CacheConfig.load(options.config).tier(S3TierConfig) if options.config else None
    start = configured or S3TierConfig(bucket)
    found = vars(options)
    given = {
        field: found[option] for option, field in _FIELDS.items() if found.get(option) is not None
    }
    # A tier would rather miss than wait; here somebody wants an answer.
    given.setdefault("deadline_s", max(_DEADLINE_S, start.deadline_s))
    if "seal_key_file" in given or "seal_key_env" in given:
        # It alone: what the configuration names need not be readable here.
        given = {"seal_key_file": None, "seal_key_env": "", "seal_keys": {}, **given}
    return replace(start, bucket=bucket, prefix=prefix if slash else start.prefix, **given)


def with_inventory(config: S3TierConfig, work: Callable[[Inventory], Awaitable[None]]) -> None:
    """Open the bucket, do the work in it, and close it. Blocks.

    Raises:
        ObjectError: A call failed, and failed again.
        UnavailableError: The packages it needs are not installed.
    """
    asyncio.run(_work(open_store(config), config, work))


async def _work(
    store: ObjectStore, config: S3TierConfig, work: Callable[[Inventory], Awaitable[None]]
) -> None:
    instruments = S3Instruments(Registry())
    effort = Effort(Breaker(_BREAKER), instruments, max_in_flight=config.max_in_flight)
    try:
        await work(
            Inventory(
                store, effort, prefix=config.prefix, deadline_s=config.deadline_s,
                max_in_flight=config.max_in_flight,
            )
        )  # fmt: skip
    finally:
        await store.close()
