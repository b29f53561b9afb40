"""The bucket of a run: made where there is none, and left as it was found."""

from __future__ import annotations

import secrets
from importlib import import_module
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from kvx_bench.s3.service import Service

_DELETE_BATCH = 1000


class Bucket:
    """One, and a prefix in it that is nobody else's. By boto3, which is not timed here.

    Attributes:
        service: Where it is.
        name: Its name.
        prefix: What names of this run begin with.
    """

    def __init__(self, service: Service, name: str = "") -> None:
        """Use the bucket of that name, or make one."""
        self.service = service
        self.prefix = f"kvx-bench-{secrets.token_hex(6)}"
        self.name = name or self.prefix
        self._is_ours = not name
        keys = {} if service.keys is None else service.keys.as_arguments()
        self._client: Any = import_module("boto3").client(
            "s3", endpoint_url=service.url, region_name=service.region,
            config=import_module("botocore.config").Config(s3={"addressing_style": "path"}), **keys,
        )  # fmt: skip
        if self._is_ours:
            self._client.create_bucket(Bucket=self.name)

    def __enter__(self) -> Self:
        """Nothing but the bucket."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove what this run has stored, and the bucket if it made it."""
        self.remove(self.names())
        if self._is_ours:
            self._client.delete_bucket(Bucket=self.name)
        self._client.close()

    def names(self) -> frozenset[str]:
        """Return what this run has stored and not removed."""
        pages = self._client.get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=self.name, Prefix=f"{self.prefix}/")
        return frozenset(one["Key"] for page in found for one in page.get("Contents", ()))

    def remove(self, names: frozenset[str]) -> None:
        """Remove objects."""
        rest = sorted(names)
        for first in range(0, len(rest), _DELETE_BATCH):
            batch = [{"Key": name} for name in rest[first : first + _DELETE_BATCH]]
            self._client.delete_objects(Bucket=self.name, Delete={"Objects": batch, "Quiet": True})
