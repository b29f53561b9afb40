"""How a scheduler asks all ranks of its engine; a block is there only if every rank has it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

import kvx
from kvx_vllm.rank_link import Begin, Link, Locate, Located

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from kvx_vllm.rank_cache import RankCache
    from kvx_vllm.rank_link import Message

_log = logging.getLogger(__name__)
# Asked and not answered; more wait their turn, so that no rank is flooded by a batch of prompts.
_OPEN_MAX = 256
_RECONNECT_S = 1.0
_FORGET_S = 60.0
ONE_MACHINE = (
    "all workers of an engine that uses kvx run on its scheduler's machine and see the same files: "
    "let --tensor-parallel-size and --pipeline-parallel-size fit one machine"
)


class Ranks(Protocol):
    """All ranks of one engine.

    Attributes:
        life: Of the cache: one more after every reset. What is stored for an earlier life is not.
    """

    life: int

    def meet(self, paths: Mapping[int, Path]) -> None:
        """Take from vLLM where ranks in other processes listen."""

    def locate(self, group: int, hashes: Sequence[bytes], first: int) -> kvx.Location | None:
        """Return where blocks are that all ranks hold; None while that is not known."""

    def reset(self) -> None:
        """Let nothing be found that was stored before."""

    def close(self) -> None:
        """Ask no more."""


class OneRankHere:
    """The only rank, in this process."""

    def __init__(self, rank: RankCache) -> None:
        """Ask it directly."""
        self._rank = rank
        self.life = 0

    def meet(self, paths: Mapping[int, Path]) -> None:
        """Do nothing: it is here."""

    def locate(self, group: int, hashes: Sequence[bytes], first: int) -> kvx.Location:
        """Return where blocks are."""
        return self._rank.locate(group, hashes, first)

    def reset(self) -> None:
        """Let nothing be found that was stored before."""
        self.life += 1
        self._rank.begin_life(self.life)

    def close(self) -> None:
        """Leave it to its worker."""


@dataclass(slots=True)
class Question:
    """Where blocks of a prompt are, asked of all ranks.

    Attributes:
        number: Its own.
        num_blocks: How many are asked for.
        asked_at: Of the clock.
        answers: By rank; None of those that are down.
    """

    number: int
    num_blocks: int
    asked_at: float
    answers: dict[int, kvx.Location | None] = field(default_factory=dict)


class RanksElsewhere:
    """Ranks in processes of their own on this machine. Never blocks; used by the scheduler alone.

    A rank that is gone, or says nothing within the deadline, holds nothing: a miss, no error.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect to nobody yet.

        Args:
            paths: Where each rank listens.
            deadline_s: Seconds within which every rank has to answer.
            clock: In seconds.
        """
        self.life = 0
        self._deadline_s = deadline_s
        self._clock = clock
        self._ranks = [RankElsewhere(rank, path, clock) for rank, path in enumerate(paths)]
        self._questions: dict[tuple[int, int, bytes], Question] = {}
        self._open: dict[int, Question] = {}
        self._num_asked = 0
        self._forget_at = 0.0

    def meet(self, paths: Mapping[int, Path]) -> None:
        """Connect to ranks where vLLM says they listen; called once, at start.

        Raises:
            kvx.UnavailableError: One cannot be reached: it runs on another machine.
        """
        for number, path in paths.items():
            if number >= len(self._ranks):
                raise kvx.UnavailableError(f"rank {number} of {len(self._ranks)} ranks was told")
            self._ranks[number].connect(path)

    def locate(self, group: int, hashes: Sequence[bytes], first: int) -> kvx.Location | None:
        """Return where blocks are that all ranks hold; None while that is not known."""
        if first >= len(hashes):
            return kvx.Location(np.zeros(0, np.uint8), kvx.MissReason.HIT)
        self._take_answers()
        key = (group, first, hashes[-1])  # vLLM's hashes are chained: the last one stands for all
        question = self._questions.get(key)
        if question is None:
            if len(self._open) >= _OPEN_MAX:
                return None
            question = self._questions[key] = self._ask(group, hashes, first)
        if question.number in self._open:
            return None
        del self._questions[key]
        return combined(list(question.answers.values()), question.num_blocks)

    def reset(self) -> None:
        """Let nothing be found that was stored before; whatever is sent from now on says so too."""
        self.life += 1
        self._questions.clear()
        self._open.clear()
        for rank in self._ranks:
            rank.send(Begin(self.life))

    def close(self) -> None:
        """Ask no more."""
        self._questions.clear()
        self._open.clear()
        for rank in self._ranks:
            rank.close()

    def _ask(self, group: int, hashes: Sequence[bytes], first: int) -> Question:
        self._num_asked += 1
        message = Locate(self._num_asked, self.life, group, first, list(hashes))
        question = Question(self._num_asked, len(hashes) - first, self._clock())
        for number, rank in enumerate(self._ranks):
            if not rank.send(message):
                question.answers[number] = None
        if len(question.answers) < len(self._ranks):
            self._open[question.number] = question
        return question

    def _take_answers(self) -> None:
        for number, rank in enumerate(self._ranks):
            for answer in rank.receive():
                question = self._open.get(answer.number)
                if question is not None and len(answer.tiers) == question.num_blocks:
                    self._note(question, number, location_of(answer))
            if not rank.is_connected:
                for question in list(self._open.values()):
                    if number not in question.answers:
                        self._note(question, number, None)
        self._give_up()

    def _note(self, question: Question, rank: int, location: kvx.Location | None) -> None:
        question.answers[rank] = location
        if len(question.answers) == len(self._ranks):
            del self._open[question.number]

    def _give_up(self) -> None:
        """Let ranks hold nothing whose deadline is over, and forget what nobody came back for."""
        now = self._clock()
        for question in list(self._open.values()):
            if now - question.asked_at <= self._deadline_s:
                break  # those after it were asked later
            for number in set(range(len(self._ranks))) - question.answers.keys():
                self._ranks[number].say_once(f"says nothing within {self._deadline_s} s")
                self._note(question, number, None)
        if now > self._forget_at:
            self._forget_at = now + _FORGET_S
            self._questions = {
                key: one
                for key, one in self._questions.items()
                if one.number in self._open or now - one.asked_at < _FORGET_S
            }


class RankElsewhere:
    """One rank in another process, and the connection to it."""

    def __init__(self, number: int, path: Path, clock: Callable[[], float]) -> None:
        """Connect when something is to be sent."""
        self._number = number
        self._path = path
        self._clock = clock
        self._link: Link | None = None
        self._try_at = clock()
        self._is_said = False

    @property
    def is_connected(self) -> bool:
        """Whether it can answer."""
        return self._link is not None

    def connect(self, path: Path) -> None:
        """Connect to where it listens.

        Raises:
            kvx.UnavailableError: It does not listen there.
        """
        self._path = path
        self.close()
        try:
            self._link = Link.to(path)
        except OSError as error:
            raise kvx.UnavailableError(
                f"rank {self._number} listens on {path}, which its scheduler cannot reach: "
                f"{error.strerror}; {ONE_MACHINE}"
            ) from error

    def send(self, message: Message) -> bool:
        """Send a message; False where the rank is gone."""
        if self._link is None and not self._reconnect():
            return False
        assert self._link is not None
        try:
            self._link.send(message)
        except OSError as error:
            self._lose(error)
            return False
        return True

    def receive(self) -> list[Located]:
        """Return what it has answered."""
        if self._link is None:
            return []
        try:
            self._link.flush()
            messages = self._link.receive()
        except OSError as error:
            self._lose(error)
            return []
        if messages:
            self._is_said = False
        return [one for one in messages if isinstance(one, Located)]

    def say_once(self, what: str) -> None:
        """Log what is wrong with it, once until it answers again."""
        if not self._is_said:
            _log.warning("kvx: rank %d %s: it counts as holding nothing", self._number, what)
        self._is_said = True

    def close(self) -> None:
        """Disconnect."""
        if self._link is not None:
            self._link.close()
        self._link = None

    def _reconnect(self) -> bool:
        if self._clock() < self._try_at:
            return False
        try:
            self._link = Link.to(self._path)
        except OSError as error:
            self._lose(error)
            return False
        return True

    def _lose(self, error: OSError) -> None:
        self.close()
        self._try_at = self._clock() + _RECONNECT_S
        self.say_once(f"cannot be asked on {self._path} ({error})")


def location_of(answer: Located) -> kvx.Location:
    """Return what a rank said."""
    tiers = np.frombuffer(answer.tiers, np.uint8)
    return kvx.Location(tiers, answer.reason, answer.is_final)


def combined(answers: Sequence[kvx.Location | None], num_blocks: int) -> kvx.Location:
    """Return where blocks are that all ranks hold: in the lowest tier that one has to read.

    Args:
        answers: One for each rank; None of a rank that is down.
        num_blocks: How many were asked for.
    """
    nowhere = kvx.Location(np.zeros(num_blocks, np.uint8), kvx.MissReason.TIER_DOWN)
    locations = [nowhere if one is None else one for one in answers]
    tiers = np.stack([one.tiers for one in locations])
    is_lacking = tiers == kvx.TierKind.NONE
    lowest = np.where(is_lacking.any(axis=0), kvx.TierKind.NONE, tiers.max(axis=0))
    is_final = np.array([one.is_final for one in locations])
    # A block that S3 may still hold for one rank is lost all the same if another rank has not it.
    is_lost = is_lacking[is_final].any(axis=0)
    is_awaited = is_lacking[~is_final].any(axis=0) & ~is_lost
    reason = kvx.MissReason.HIT
    missing = np.flatnonzero(lowest == kvx.TierKind.NONE)
    if len(missing):
        # Each says why its own first is lacking, so whoever lacks the first of all says why.
        reason = locations[int(np.flatnonzero(is_lacking[:, missing[0]])[0])].reason
    return kvx.Location(lowest.astype(np.uint8), reason, not is_awaited.any())
