"""Garbage is found and removed, everything else stays; memory stays bounded; failures are told."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable

import pytest

from kvx.cache.s3.inventory import Finding, Verdict
from kvx.cache.s3.store import DELETE_BATCH_MAX, ObjectError, ObjectFacts, ObjectFault
from kvx.cache.s3.sweep import SweepRules, SweepTotals, sweep
from tests.cache.s3.groups import NOW_S, SEALER, Group
from tests.cache.s3.memory_store import Bucket, MemoryStore
from tests.cache.s3.stocking import inventory_of, of_version, put, put_group

MANY = 30_000


async def run(
    bucket: Bucket, notify: Callable[[Finding], None] = lambda _: None, **rules: object
) -> SweepTotals:
    totals = SweepTotals()
    rule = SweepRules(**{"now_s": NOW_S + 10, **rules})
    await sweep(inventory_of(MemoryStore(bucket)), rule, totals, notify=notify)
    return totals


def damaged_ways() -> dict[str, Callable[[bytearray], bytes]]:
    """Return what can be wrong with an object, and how it becomes so."""
    other = Group(seed=7).encode().tobytes()
    return {
        "header": lambda body: bytes(body[:20]) + b"?" + bytes(body[21:]),
        "no object": lambda body: b"{}" * (len(body) // 2),
        "empty": lambda _: b"",
        "tiny": lambda body: bytes(body[:100]),
        "cut": lambda body: bytes(body[:-1]),
        "longer": lambda body: bytes(body) + b"\0",
        "footer": lambda body: bytes(body[:-9]) + b"??" + bytes(body[-7:]),
        "another object": lambda _: other,
        "sealed": lambda _: Group(sealer=SEALER).encode().tobytes(),
        "footer of another": lambda body: bytes(body[:-192]) + other[-192:],
    }


@pytest.mark.parametrize("way", damaged_ways())
async def test_damaged_objects_are_garbage(bucket: Bucket, way: str) -> None:
    good = put_group(bucket, Group(seed=1))
    group = Group()
    put(bucket, group.name(), damaged_ways()[way](bytearray(group.encode().tobytes())))
    reasons = []
    totals = await run(bucket, lambda one: reasons.append((one.verdict, one.why)))
    assert totals.by_verdict[Verdict.DAMAGED].num_objects == 1
    assert totals.by_verdict[Verdict.GOOD].num_objects == 1
    assert [why for verdict, why in reasons if verdict is Verdict.DAMAGED] != [""]
    assert bucket.names() == sorted([good, group.name()]), "a dry run deletes nothing"
    totals = await run(bucket, is_deleting=True)
    assert bucket.names() == [good]
    assert totals.deleted.num_objects == totals.doomed.num_objects == 1


@pytest.mark.parametrize("sealer", [None, SEALER], ids=["plain", "sealed"])
async def test_what_is_right_stays(bucket: Bucket, sealer: object) -> None:
    for seed in range(5):
        put_group(bucket, Group(seed=seed, sealer=sealer, expiry_s=NOW_S + 11))  # type: ignore[arg-type]
    before = dict(bucket.objects)
    totals = await run(bucket, is_deleting=True, has_other_versions=True, older_than_s=1000)
    assert totals.by_verdict[Verdict.GOOD].num_objects == 5
    assert totals.by_verdict[Verdict.GOOD].size_bytes == 5 * Group(sealer=sealer).shape.object_bytes  # type: ignore[arg-type]
    assert bucket.objects == before
    assert bucket.calls["delete"] == 0


async def test_expired_objects_go(bucket: Bucket) -> None:
    put_group(bucket, Group(expiry_s=NOW_S + 10))
    stays = put_group(bucket, Group(seed=1, expiry_s=NOW_S + 11))
    totals = await run(bucket, is_deleting=True)
    assert bucket.names() == [stays]
    assert totals.by_verdict[Verdict.EXPIRED].num_objects == 1
    assert totals.deleted.size_bytes == Group().shape.object_bytes


async def test_old_objects_go_if_asked_and_are_not_read(bucket: Bucket) -> None:
    for seed in range(4):
        put_group(bucket, Group(seed=seed), modified_s=NOW_S - seed * 100)
    assert (await run(bucket)).doomed.num_objects == 0
    bucket.calls.clear()
    totals = await run(bucket, older_than_s=210, is_deleting=True)
    assert totals.by_verdict[Verdict.OLD].num_objects == 2
    assert len(bucket.names()) == 2
    assert bucket.calls["get"] == 2 * 2, "header and footer of those that stay"


async def test_other_versions_go_if_asked(bucket: Bucket) -> None:
    put(bucket, "kvx/v2/some/other/name", of_version(2))
    put(bucket, Group().name().replace("/v1/", "/v3/"), of_version(3))
    put(bucket, Group().name(), of_version(4))
    await run(bucket, is_deleting=True)
    assert len(bucket.names()) == 3
    totals = await run(bucket, is_deleting=True, has_other_versions=True)
    assert bucket.names() == []
    assert totals.by_verdict[Verdict.OTHER_VERSION].num_objects == 3


async def test_what_is_not_kvxs_is_never_touched(bucket: Bucket) -> None:
    name = Group().name()
    names = [
        "kvx", "kvx/", "kvx/notes.txt", "kvx/v1/notes.txt", "kvx/v2/notes.txt", "kvx/v2/tiny",
        name + ".bak", "x" + name, "other/" + name, name.replace("/4/", "/04/"), "kvxx/v1/a",
        name.replace("kvx/", ""), name[:-2], "kvx/v01/notes", "kvx/v2/of-version-1", "kvx/vault",
    ]  # fmt: skip
    for one in names:
        put(bucket, one, b"precious" * (1 if one == "kvx/v2/tiny" else 40), modified_s=0)
    put(bucket, "kvx/v2/of-version-1", Group().encode().tobytes(), modified_s=0)
    for one in ("kvx/v1/later-within", "kvx/vault-later", "kvx/v1/v2/later"):
        put(bucket, one, of_version(2), modified_s=0)
    before = dict(bucket.objects)
    await run(bucket, is_deleting=True, has_other_versions=True, older_than_s=0.0, now_s=1e12)
    assert bucket.objects == before
    assert bucket.calls["delete"] == 0


async def test_one_namespace_alone(bucket: Bucket) -> None:
    mine, theirs = Group(expiry_s=1), Group(expiry_s=1, public_id=bytes(16))
    put_group(bucket, mine)
    put_group(bucket, theirs)
    await run(bucket, is_deleting=True, public_id=bytes(16))
    assert bucket.names() == [mine.name()]


async def test_objects_that_go_meanwhile_are_no_failure(bucket: Bucket) -> None:
    for seed in range(3):
        put_group(bucket, Group(seed=seed))
    gone, shorter, _ = bucket.names()

    def meddle(verb: str, name: str) -> None:
        if verb == "get" and name == gone:
            bucket.objects.pop(gone, None)
        if verb == "get" and name == shorter:
            put(bucket, shorter, b"short")

    bucket.fault = meddle  # type: ignore[assignment]
    totals = await run(bucket, is_deleting=True)
    assert totals.by_verdict[Verdict.GONE].num_objects == 2
    assert totals.by_verdict[Verdict.GOOD].num_objects == 1
    assert bucket.calls["delete"] == 0


async def test_passing_failures_are_lived_through(bucket: Bucket) -> None:
    for seed in range(8):
        put_group(bucket, Group(seed=seed, expiry_s=1 if seed % 2 else 0))
    seen: set[tuple[str, str]] = set()

    def once(verb: str, name: str) -> ObjectFault | None:
        if (verb, name) in seen:
            return None
        seen.add((verb, name))
        return ObjectFault.SERVER

    bucket.fault = once
    totals = await run(bucket, is_deleting=True)
    assert totals.deleted.num_objects == 4
    assert len(bucket.names()) == 4


@pytest.mark.parametrize("verb", ["list", "get", "delete"])
async def test_what_fails_for_good_is_raised_and_the_totals_are_right(
    bucket: Bucket, verb: str
) -> None:
    put_group(bucket, Group(expiry_s=1))
    bucket.fault = lambda called, _: ObjectFault.DENIED if called == verb else None
    totals = SweepTotals()
    with pytest.raises(ObjectError) as caught:
        await sweep(
            inventory_of(MemoryStore(bucket)), SweepRules(NOW_S + 10, is_deleting=True), totals
        )
    assert caught.value.fault is ObjectFault.DENIED
    assert totals.deleted.num_objects == 0
    assert totals.doomed.num_objects == (1 if verb == "delete" else 0)
    assert len(bucket.names()) == 1


class EndlessStore(MemoryStore):
    """Lists `count` objects that exist only while they are listed."""

    def __init__(self, count: int) -> None:
        super().__init__(Bucket())
        self.count = count
        self.deleted = 0
        self.pages = 0

    async def list(self, prefix: str, *, after: str = ""):  # type: ignore[no-untyped-def]  # noqa: ANN201
        first = int(after[-32:], 16) + 1 if after else 0
        for start in range(first, self.count, 1000):
            self.pages += 1
            yield [
                ObjectFacts(f"{prefix}{bytes(16).hex()}/4/{number:032x}", 100, 0.0)
                for number in range(start, min(start + 1000, self.count))
            ]

    async def delete(self, names) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        assert len(names) <= DELETE_BATCH_MAX
        self.deleted += len(names)


async def test_memory_does_not_grow_with_the_bucket() -> None:
    peaks = []
    for count in (2_000, MANY):
        store, totals = EndlessStore(count), SweepTotals()
        tracemalloc.start()
        try:
            rules = SweepRules(time.time(), older_than_s=60, is_deleting=True)
            await sweep(inventory_of(store), rules, totals)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert store.deleted == totals.deleted.num_objects == count
        assert store.pages == -(-count // 1000)
    assert peaks[1] < 1.5 * peaks[0]


async def test_no_more_are_looked_at_at_a_time_than_allowed(bucket: Bucket) -> None:
    for seed in range(40):
        put_group(bucket, Group(num_blocks=1, seed=seed))
    under_way, peak = 0, 0
    store = MemoryStore(bucket)
    inner = store.get

    async def get(name: str, start: int, size_bytes: int) -> memoryview:
        nonlocal under_way, peak
        under_way += 1
        peak = max(peak, under_way)
        try:
            return await inner(name, start, size_bytes)
        finally:
            under_way -= 1

    store.get = get  # type: ignore[method-assign]
    bucket.latency_s = 0.001
    totals = SweepTotals()
    await sweep(inventory_of(store, max_in_flight=5), SweepRules(NOW_S), totals)
    assert totals.by_verdict[Verdict.GOOD].num_objects == 40
    assert 1 < peak <= 5
