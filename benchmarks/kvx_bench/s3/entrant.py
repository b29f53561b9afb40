"""A client in a process of its own, and those that take part in a run."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

from kvx_bench.row import Sample
from kvx_bench.transfer.child import Child

if TYPE_CHECKING:
    from kvx_bench.s3.bucket import Bucket
    from kvx_bench.s3.clients.client import Place

_PATIENCE_S = 600.0
# Prompts are numbered; this one is stored once, and read by everybody.
STANDING = 1
_fresh = itertools.count(STANDING + 1)


class Entrant:
    """One client. CPU seconds are its process's alone: all of them, and nothing of the server's.

    Attributes:
        place: Where it works.
        description: What it does, in one line.
    """

    def __init__(self, name: str, bucket: Bucket, place: Place, *, num_blocks: int) -> None:
        """Start it.

        Raises:
            UnavailableError: What it uses is not here.
        """
        self.place = place
        self._bucket = bucket
        keys = bucket.service.keys
        settings = {} if keys is None else keys.as_environment()
        self._child = Child.of_module("kvx_bench.s3.side", settings=settings)
        self._child.socket.settimeout(_PATIENCE_S)
        try:
            self.description: str = self.ask(
                "describe", client=name, place=asdict(place), num_blocks=num_blocks
            )["description"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Nothing but the process."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End it."""
        self.close()

    def ask(self, what: str, **request: object) -> dict[str, Any]:
        """Have it do something.

        Raises:
            UnavailableError: It could not; with its reason.
        """
        return self._child.ask(do=what, **request)

    def store(self) -> None:
        """Store the prompt that stands."""
        self.ask("put", prompt=STANDING)

    def get(self) -> Sample:
        """Bring the prompt that stands; every byte is looked at afterwards."""
        return Sample(**self.ask("get", prompt=STANDING))

    def put(self) -> Sample:
        """Store another one, bring it back, look at every byte, and remove it again."""
        prompt, before = next(_fresh), self._bucket.names()
        sample = Sample(**self.ask("put", prompt=prompt))
        self.ask("get", prompt=prompt)
        self._bucket.remove(self._bucket.names() - before)
        return sample

    def close(self) -> None:
        """End it."""
        self._child.close()
