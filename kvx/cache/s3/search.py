"""How long a prefix of groups is stored, found out with few requests. Pure.

Groups are stored from the start of a prompt on, so the last stored one is searched for: each round
asks for a few groups at once, evenly spread over those that are in doubt. So n groups take
O(log n) requests, and O(log n) round trips to a base of one more than are asked for at once.
"""

from __future__ import annotations

PROBES = 4


class PrefixSearch:
    """The search over one prompt's groups, numbered from 0.

    Attributes:
        num_stored: Groups from the start that are stored, as far as is known.
        num_possible: Groups that may be stored at most.
    """

    def __init__(self, num_stored: int, num_groups: int) -> None:
        """Begin with a prefix that is known to be stored."""
        self.num_stored = num_stored
        self.num_possible = num_groups

    @property
    def is_over(self) -> bool:
        """Whether the length is known."""
        return self.num_stored >= self.num_possible

    def probes(self) -> list[int]:
        """Return the groups to ask for next, in order; none when it is over.

        The first one in doubt is among them, so that a prompt that is not stored at all takes a
        single round trip.
        """
        doubtful = self.num_possible - self.num_stored
        if doubtful <= PROBES:
            return list(range(self.num_stored, self.num_possible))
        spread = {self.num_stored + step * (doubtful - 1) // (PROBES - 1) for step in range(PROBES)}
        return sorted(spread)

    def note(self, group: int, *, is_stored: bool) -> None:
        """Take an answer."""
        if is_stored:
            self.num_stored = min(max(self.num_stored, group + 1), self.num_possible)
        else:
            self.num_possible = max(min(self.num_possible, group), self.num_stored)
