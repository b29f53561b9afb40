"""What lies in a bucket: listed a page at a time, judged object by object, in bounded memory.

For people and for `kvx inspect` and `kvx gc`. Nothing is changed but by `Inventory.delete`.
"""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from kvx.cache.s3.format import HEADER_BYTES, Header, read_footer, read_header
from kvx.cache.s3.names import FORMAT_VERSION, ObjectName, parse_name, root, version_of
from kvx.cache.s3.store import ObjectError, ObjectFault
from kvx.errors import CorruptBlock, IncompatibleError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

    from kvx.cache.s3.effort import Effort
    from kvx.cache.s3.store import ObjectFacts, ObjectStore

AnswerT = TypeVar("AnswerT")
# Gone, or another one by now.
_CHANGED: Final = frozenset({ObjectFault.MISSING, ObjectFault.RANGE})


class Verdict(enum.StrEnum):
    """What an object is."""

    GOOD = "good"
    EXPIRED = "expired"
    OLD = "old"
    OTHER_VERSION = "other version"
    DAMAGED = "damaged"
    FOREIGN = "not kvx's"
    GONE = "gone since it was listed"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out about one object.

    Attributes:
        facts: Name, size and age.
        verdict: What it is.
        why: In words; empty where the verdict says it all.
        header: Of the object, where it was read and is right.
    """

    facts: ObjectFacts
    verdict: Verdict
    why: str = ""
    header: Header | None = None


class Inventory:
    """The objects under one prefix of one bucket."""

    def __init__(
        self,
        store: ObjectStore,
        effort: Effort,
        *,
        prefix: str,
        deadline_s: float = 30.0,
        max_in_flight: int = 16,
    ) -> None:
        """Take the store; the caller closes it.

        Args:
            store: The bucket.
            effort: How hard calls are tried.
            prefix: As in the tier's configuration.
            deadline_s: Most seconds of a call, retries included.
            max_in_flight: Most objects looked at at a time.
        """
        self.prefix = prefix
        self._store = store
        self._effort = effort
        self._deadline_s = deadline_s
        self._max_in_flight = max_in_flight

    async def pages(self, within: str = "") -> AsyncIterator[Sequence[ObjectFacts]]:
        """Yield all objects below the prefix whose names go on with `within`, in order.

        Raises:
            ObjectError: The listing failed, and failed again.
        """
        prefix, after = root(self.prefix) + within, ""
        # Each page is asked for by the name before it, so that an interruption costs nothing.
        while page := await self._call("list", lambda: self._page(prefix, after)):  # noqa: B023 - awaited
            yield page
            after = page[-1].name

    async def over(
        self, page: Iterable[ObjectFacts], work: Callable[[ObjectFacts], Awaitable[AnswerT]]
    ) -> list[AnswerT]:
        """Return what `work` makes of each object, in no order; `max_in_flight` at a time.

        Raises:
            ObjectError: Of the first work that raised one; the others were cancelled.
        """
        waiting, found = iter(page), list[AnswerT]()

        async def worker() -> None:
            for facts in waiting:
                found.append(await work(facts))

        failed: list[BaseException] = []
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(self._max_in_flight):
                    workers.create_task(worker())
        except* ObjectError as group:
            failed.extend(group.exceptions)
        # Some versions of Python wrap what is raised above in another group.
        if failed:
            raise failed[0]
        return found

    async def judge(
        self, facts: ObjectFacts, *, now_s: float, older_than_s: float | None = None
    ) -> Finding:
        """Return what an object is, from its name, its age, its header and its footer.

        Args:
            facts: As listed.
            now_s: Unix time.
            older_than_s: Seconds after which an object is OLD, unread; None for never.

        Raises:
            ObjectError: It could not be read, for another reason than that it is gone.
        """
        name = parse_name(self.prefix, facts.name)
        try:
            if name is None:
                return await self._judge_other(facts)
            if older_than_s is not None and facts.modified_s <= now_s - older_than_s:
                return Finding(facts, Verdict.OLD)
            return await self._judge_content(facts, name, now_s)
        except IncompatibleError as error:
            return Finding(facts, Verdict.OTHER_VERSION, str(error))
        except CorruptBlock as error:
            return Finding(facts, Verdict.DAMAGED, str(error))
        except ObjectError as error:
            if error.fault not in _CHANGED:
                raise
            return Finding(facts, Verdict.GONE)

    async def read(self, facts: ObjectFacts, start: int, size_bytes: int) -> memoryview:
        """Return bytes of an object.

        Raises:
            ObjectError: As `ObjectStore.get`.
        """
        return await self._call(
            "get", lambda: self._store.get(facts.name, start, size_bytes), size_bytes=size_bytes
        )

    async def delete(self, names: Sequence[str]) -> None:
        """Delete up to DELETE_BATCH_MAX objects."""
        await self._call("delete", lambda: self._store.delete(names))

    async def _call(
        self, verb: str, attempt: Callable[[], Awaitable[AnswerT]], *, size_bytes: int = 0
    ) -> AnswerT:
        ends_at = asyncio.get_running_loop().time() + self._deadline_s
        return await self._effort.call(verb, attempt, ends_at=ends_at, size_bytes=size_bytes)

    async def _page(self, prefix: str, after: str) -> Sequence[ObjectFacts]:
        async for page in self._store.list(prefix, after=after):
            if page:
                return page
        return ()

    async def _judge_other(self, facts: ObjectFacts) -> Finding:
        """Judge what has no name of this version: kvx's only if its header says so, too."""
        version = version_of(self.prefix, facts.name)
        if version in (None, FORMAT_VERSION) or facts.size_bytes < HEADER_BYTES:
            return Finding(facts, Verdict.FOREIGN)
        try:
            read_header(await self.read(facts, 0, HEADER_BYTES), facts.name)
        except CorruptBlock as error:
            return Finding(facts, Verdict.FOREIGN, str(error))
        why = f"named as version {version}, with a header of version {FORMAT_VERSION}"
        return Finding(facts, Verdict.FOREIGN, why)

    async def _judge_content(self, facts: ObjectFacts, name: ObjectName, now_s: float) -> Finding:
        size_bytes = min(HEADER_BYTES, facts.size_bytes)
        found = await self.read(facts, 0, size_bytes) if size_bytes else b""
        header = read_header(found, facts.name)
        shape = header.shape
        seal_id = header.seal_id if shape.is_sealed else b""
        if name != ObjectName(header.facts.public_id, shape.num_blocks, header.last_key, seal_id):
            return Finding(facts, Verdict.DAMAGED, "its header is that of another object")
        if facts.size_bytes != shape.object_bytes:
            why = f"it has {facts.size_bytes} bytes, {shape.object_bytes} by its header"
            return Finding(facts, Verdict.DAMAGED, why)
        if 0 < header.facts.expiry_s <= now_s:
            return Finding(facts, Verdict.EXPIRED, header=header)
        footer = read_footer(await self.read(facts, *shape.footer_span), facts.name)
        if not footer.fits(header):
            return Finding(facts, Verdict.DAMAGED, "its footer is that of another object")
        return Finding(facts, Verdict.GOOD, header=header)
