"""The engines behind the proxy: which are up, and which one to ask next. Pure."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

# In a row, before an engine counts as down: one may be lost.
_FAILURES_MAX = 2
_turns = itertools.count()


@dataclass(eq=False, slots=True)
class Engine:
    """One vLLM server.

    Attributes:
        url: Of it, without a slash at the end.
        in_flight: Requests that it has now.
        last_turn: When it was chosen last, as a count of choices.
        failures: Health checks and connections that failed, in a row.
        went_down: Set while it counts as down; whoever waits for it gives up.
    """

    url: str
    in_flight: int = 0
    last_turn: int = -1
    failures: int = 0
    went_down: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_up(self) -> bool:
        """Whether it is to be asked."""
        return not self.went_down.is_set()

    def note_alive(self) -> bool:
        """Note that it has answered; returns whether it counted as down."""
        self.failures = 0
        was_down = not self.is_up
        self.went_down.clear()
        return was_down

    def note_failure(self) -> bool:
        """Note that it did not answer; returns whether it counts as down because of that."""
        self.failures += 1
        if self.failures < _FAILURES_MAX or not self.is_up:
            return False
        self.went_down.set()
        return True


def choose(engines: Sequence[Engine], besides: Collection[Engine] = ()) -> Engine | None:
    """Return the engine with the fewest requests, of equals the one that waits longest.

    Args:
        engines: All there are.
        besides: Those that were tried already.
    """
    possible = [one for one in engines if one.is_up and one not in besides]
    if not possible:
        return None
    found = min(possible, key=lambda one: (one.in_flight, one.last_turn))
    found.last_turn = next(_turns)
    return found
