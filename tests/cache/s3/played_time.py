"""An event loop whose clock jumps to the next timer when nobody has anything to do."""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

BEGIN_S = 1000.0


class _Jumping(selectors.SelectSelector):
    """Turns what others would wait for into time that has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = BEGIN_S

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits for somebody, and nobody for a timer"
            self.now_s += timeout
        return ready


class PlayedLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


def play(scene: Callable[[], Coroutine[None, None, None]]) -> None:
    """Run a scene from `BEGIN_S` on, in no time."""
    with asyncio.Runner(loop_factory=PlayedLoop) as runner:
        runner.run(scene())
