"""Slots go round in order, none is lost, and there is always one."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.cache.s3.concurrency import Concurrency
from tests.cache.s3.played_time import play


@pytest.mark.parametrize("is_released_first", [True, False])
def test_a_slot_is_not_lost_when_who_is_next_gives_up(is_released_first: bool) -> None:
    async def scene() -> None:
        slots = Concurrency(1)
        assert slots.try_acquire()
        ends_at = asyncio.get_running_loop().time() + 10
        first, second = (asyncio.create_task(slots.acquire(ends_at)) for _ in range(2))
        await asyncio.sleep(1)
        if is_released_first:
            slots.release()
        first.cancel()
        if not is_released_first:
            slots.release()
        assert await second
        assert (slots.in_flight, slots.num_waiting) == (1, 0)

    play(scene)


def test_nobody_passes_those_who_wait() -> None:
    async def scene() -> None:
        slots = Concurrency(1)
        assert slots.try_acquire()
        waiting = asyncio.create_task(slots.acquire(asyncio.get_running_loop().time() + 10))
        await asyncio.sleep(1)
        slots.release()
        assert not slots.try_acquire()
        assert await waiting

    play(scene)


def test_many_signs_of_one_round_are_one_sign() -> None:
    slots = Concurrency(64)
    for _ in range(64):
        slots.congested(0.5, begun_s=1.0, now_s=2.0)
    assert slots.limit == 32
    slots.congested(0.5, begun_s=2.0, now_s=3.0)
    assert slots.limit == 16


def test_slots_that_nobody_needs_are_not_added() -> None:
    slots = Concurrency(8)
    slots.congested(0.5, begun_s=1.0, now_s=2.0)
    for _ in range(100):
        slots.worked()
    assert slots.limit == 4


@given(
    st.integers(1, 5),
    st.lists(st.sampled_from(["acquire", "release", "worked", "congested", "cancel", "expire"])),
)
@settings(deadline=None)
def test_against_a_model(limit_max: int, steps: list[str]) -> None:
    """Whoever waits is served in order, as soon as there is a slot."""

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        slots = Concurrency(limit_max)
        waiting: list[asyncio.Task[bool]] = []
        held = 0
        for step in steps:
            if step == "acquire":
                waiting.append(asyncio.create_task(slots.acquire(loop.time() + 1.0)))
            elif step == "release" and held:
                held -= 1
                slots.release()
            elif step == "worked":
                slots.worked()
            elif step == "congested":
                slots.congested(0.5, loop.time(), loop.time())
            elif step == "cancel" and waiting:
                waiting.pop(len(waiting) // 2).cancel()
            await asyncio.sleep(1.5 if step == "expire" else 0.001)
            while waiting and waiting[0].done():
                held += waiting.pop(0).result()
            assert not any(one.done() for one in waiting)
            assert 1 <= slots.limit <= limit_max
            assert slots.in_flight == held <= limit_max
            assert slots.num_waiting == len(waiting)
            assert not waiting or held >= slots.limit

    play(scene)
