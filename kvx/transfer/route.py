"""Which backend a transfer takes, and why not another one: pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class RouteState(enum.StrEnum):
    """What a backend is for one peer."""

    CHOSEN = "chosen"
    POSSIBLE = "possible"
    IMPOSSIBLE = "not here"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend that could be asked: its rank, and what speaks against it (empty: nothing)."""

    backend: str
    rank: int
    objection: str


@dataclass(frozen=True, slots=True)
class Route:
    """One backend as seen from one peer.

    Attributes:
        backend: Its name.
        state: Whether it is the one taken.
        rank: Lower is preferred.
        reason: Why it is not taken; empty for the chosen one.
    """

    backend: str
    state: RouteState
    rank: int
    reason: str

    def __str__(self) -> str:
        """Return a line for people."""
        if self.state is RouteState.CHOSEN:
            return f"{self.backend}: chosen"
        if self.state is RouteState.POSSIBLE:
            return f"{self.backend}: possible; {self.reason}"
        return f"{self.backend}: not here because {self.reason}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """Every backend, the chosen one first, then in order of preference."""

    peer: str
    routes: tuple[Route, ...]

    @property
    def chosen(self) -> Route | None:
        """The one taken; None when none is possible."""
        return next((route for route in self.routes if route.state is RouteState.CHOSEN), None)

    def __str__(self) -> str:
        """Return the lines for people."""
        return "\n".join([f"to {self.peer}:", *(f"  {route}" for route in self.routes)])


def choose(
    candidates: Iterable[Candidate], *, allowed: Sequence[str] = (), forced: str | None = None
) -> tuple[Route, ...]:
    """Return what every backend is, the chosen one first.

    Args:
        candidates: All backends that exist.
        allowed: Those that the configuration allows, best first; none for all, by rank.
        forced: The only one that the call allows.
    """
    judged = sorted(
        ((_objection(one, allowed, forced), one) for one in candidates),
        key=lambda pair: (
            bool(pair[0]), allowed.index(pair[1].backend) if pair[1].backend in allowed else 0,
            pair[1].rank, pair[1].backend,
        ),
    )  # fmt: skip
    routes = []
    for place, (objection, one) in enumerate(judged):
        if objection:
            routes.append(Route(one.backend, RouteState.IMPOSSIBLE, one.rank, objection))
        elif place == 0:
            routes.append(Route(one.backend, RouteState.CHOSEN, one.rank, ""))
        else:
            reason = f"{judged[0][1].backend} is preferred"
            routes.append(Route(one.backend, RouteState.POSSIBLE, one.rank, reason))
    return tuple(routes)


def _objection(one: Candidate, allowed: Sequence[str], forced: str | None) -> str:
    if forced is not None and one.backend != forced:
        return f"the call takes {forced} only"
    if allowed and one.backend not in allowed:
        return f"the configuration allows {', '.join(allowed)} only"
    return one.objection
