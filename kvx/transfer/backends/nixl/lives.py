"""The lives of peers that NIXL knows: how they begin, and how their end becomes known.

A peer tells over the agents' connection what it is through with. When that connection is gone and
both processes live on, because it broke or an agent was closed, NIXL's own still stands: whoever
touches the other's memory no more whispers that over this one, and whoever waits for it listens.
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import TYPE_CHECKING

from kvx.errors import UnavailableError, UsageError
from kvx.transfer.backends.nixl import messages

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.transfer.backends.nixl.bindings import NixlAgent
    from kvx.transfer.backends.nixl.messages import Hello, Message, Over
    from kvx.transfer.backends.nixl.owner import Owner
    from kvx.transfer.backends.nixl.pump import Verifier
    from kvx.transfer.backends.nixl.registry import Registry

_log = logging.getLogger(__name__)


def life_of(agent: str, incarnation: int) -> str:
    """Return what NIXL calls one life of an agent: a restarted one is somebody else."""
    return f"{agent}.{incarnation:016x}"


def agent_of(life: str) -> str:
    """Return whose life it is."""
    return life.rpartition(".")[0]


class Lives:
    """Which lives NIXL knows, and which are missed. Thread-safe."""

    def __init__(
        self,
        nixl: NixlAgent,
        life: str,
        *,
        registry: Registry,
        owner: Owner,
        verifier: Verifier,
        is_in_use: Callable[[str], bool],
    ) -> None:
        """Know nobody.

        Args:
            nixl: Knows them.
            life: Our own.
            registry: Our memory: hears of those that touch it no more.
            owner: Holds it for writers: hears of them, too.
            verifier: Tells them, behind what was told before.
            is_in_use: Whether anything of a transfer with a life is left.
        """
        self._nixl = nixl
        self._life = life
        self._registry = registry
        self._owner = owner
        self._verifier = verifier
        self._is_in_use = is_in_use
        self._lock = threading.Lock()
        self._known: dict[str, int] = {}  # and their last hello that we heeded
        self._ended: set[str] = set()
        self._missed: set[str] = set()
        self._is_closed = False

    def meet(self, hello: Hello, use: Callable[[], None]) -> None:
        """Make NIXL know a life, connect with it, and begin to `use` it.

        Raises:
            UnavailableError: NIXL refuses it, or does not reach it.
        """
        agent = agent_of(hello.name)
        with self._lock:
            former = [one for one in self._known if agent_of(one) == agent and one != hello.name]
            self._ended.update(former)
            self._learn(hello)
            self._nixl.connect(hello.name)
            use()
        for life in former:
            self.part(life)

    def learn(self, hello: Hello) -> None:
        """Make NIXL know what a life has registered now.

        Raises:
            UnavailableError: NIXL refuses it.
        """
        with self._lock:
            if hello.name in self._known:
                self._learn(hello)

    def lost(self, life: str, *, has_ended: bool) -> None:
        """Take note that a life cannot be reached, or has ended."""
        with self._lock:
            if has_ended:
                self._missed.discard(life)
                self._ended.add(life)
            else:
                self._missed.add(life)
        if has_ended:
            self._owner.buried(life)
            self._registry.buried(life)
        self.part(life)

    def back(self, life: str) -> None:
        """Take note that a life can be reached."""
        with self._lock:
            self._missed.discard(life)

    def part(self, life: str) -> None:
        """Say that nothing with a life is left, once that is so and nobody else says it.

        NIXL forgets a life that has ended, or all when ours has.
        """
        with self._lock:
            if self._is_in_use(life):
                return
            has_ended = life in self._ended
            self._ended.discard(life)
            if life not in self._known:
                return
            if not has_ended and (self._is_closed or life in self._missed):
                word = messages.Left(self._life, self._known[life])
                self._nixl.notify(life, messages.encode(word))
            if has_ended or self._is_closed:
                del self._known[life]
                self._nixl.forget_peer(life)

    def close(self) -> None:
        """Take leave of everybody, at once or when nothing with them is left."""
        with self._lock:
            self._is_closed = True
            known = list(self._known)
        for life in known:
            self.part(life)

    def whisper(self, life: str, message: Over) -> None:
        """Tell over NIXL's connection, if it stands, what cannot be told over the agents'."""
        with self._lock:
            if life in self._known:
                self._nixl.notify(life, messages.encode(message))

    def hear(self) -> bool:
        """Take what was whispered; returns whether more may come."""
        with self._lock:
            self._missed = {one for one in self._missed if self._is_owed(one)}
            # Whoever reads from an agent that has closed is not waited for.
            is_awaited = bool(self._owner.held() if self._is_closed else self._missed)
        if not is_awaited:
            return False
        for life, data in self._nixl.notices():
            try:
                self._heard(life, messages.decode(data))
            except UsageError as error:
                _log.warning("%s whispered %s", life, error)
        return True

    def _is_owed(self, life: str) -> bool:
        """Return whether a life may touch memory of ours."""
        return self._registry.is_told(life) or self._owner.knows(life)

    def _heard(self, life: str, message: Message) -> None:
        match message:
            case messages.Left(name, hello) if name == life:
                self._registry.left(life, hello)
            case messages.Over(job):
                self._verifier.put(functools.partial(self._owner.over, agent_of(life), job))
            case _:
                raise UsageError(f"a {type(message).__name__}, which is said aloud")

    def _learn(self, hello: Hello) -> None:
        self._known[hello.name] = max(hello.number, self._known.get(hello.name, 0))
        name = self._nixl.load_peer(hello.metadata)
        if name != hello.name:
            raise UnavailableError(f"{hello.name} sent what NIXL takes for {name}")
