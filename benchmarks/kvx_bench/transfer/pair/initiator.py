"""The side that acts: it reads leased blocks of the target and writes to them, and times it."""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from kvx_bench.transfer.pair.notes import NoteDesk
from kvx_bench.transfer.pair.side import Side

if TYPE_CHECKING:
    import kvx

_CONNECT_S = 10.0
_DEADLINE_S = 60.0


class _Course:
    """A prepared batch of one backend, begun as often as one likes."""

    def __init__(self, prepared: kvx.PreparedTransfer, backend: str, *, is_write: bool) -> None:
        self._begin = prepared.write if is_write else prepared.read
        self._backend = backend

    def begin(self) -> kvx.LinkTransfer:
        return self._begin(deadline_s=_DEADLINE_S, backend=self._backend)

    def once(self) -> tuple[float, float]:
        """Return seconds until the submission came back, and until all had arrived."""
        began = time.perf_counter()
        transfer = self.begin()
        posted = time.perf_counter()
        transfer.wait()
        return posted - began, time.perf_counter() - began


class Initiator(Side):
    """Runs what it is asked to against one target."""

    def __init__(self, agent: kvx.Agent, *, driver: str) -> None:
        super().__init__(agent, driver=driver)
        self._peer: kvx.Peer | None = None
        self._desk: NoteDesk | None = None
        self._courses: dict[int, _Course] = {}
        self._number = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do one request."""
        match request["do"]:
            case "connect":
                return self._connect(request)
            case "theirs":
                assert self._desk is not None, "connected first"
                return self._desk.ask(**request["request"])
            case "prepare":
                return self._prepare(request)
            case "run":
                course = self._courses[request["course"]]
                return _run(course, request["count"], request["limit_s"])
            case "forget":
                del self._courses[request["course"]]
                return {}
            case "post":
                return self._post(request)
            case "map":
                self._courses.clear()
        return super().answer(request)

    def _connect(self, request: dict[str, Any]) -> dict[str, Any]:
        card = request.get("card")
        target = request["address"] if card is None else base64.b85decode(card)
        self._peer = self.agent.connect(target, _CONNECT_S)
        self._desk = NoteDesk(self.agent, self._peer)
        return {"name": self._peer.name}

    def _prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Check both sides and run once; the first submission makes what the next ones reuse."""
        remote = self._remote(request["token"])
        is_write, backend = request["is_write"], request["backend"]
        began = time.perf_counter()
        blocks = self._peer_is.blocks(lease=remote)
        prepared = self.agent.prepare(self.blocks(request), blocks)
        course = _Course(prepared, backend, is_write=is_write)
        transfer = course.begin()
        prepare_s = time.perf_counter() - began
        transfer.wait()
        self._number += 1
        self._courses[self._number] = course
        return {"course": self._number, "prepare_s": prepare_s}

    def _post(self, request: dict[str, Any]) -> dict[str, Any]:
        """Submit blocks in any order, as a cache's are, described anew each time and prepared."""
        remote, count, backend = (
            self._remote(request["token"]),
            request["batch"],
            request["backend"],
        )
        ours, theirs = (np.random.default_rng(seed).permutation(count) for seed in (1, 2))
        anew, again = [], []
        peer, size = self._peer_is, request["block_bytes"]
        for _ in range(request["count"]):
            began = time.perf_counter()
            transfer = self.agent.read(
                self.registration.blocks(ours, size), peer.blocks(theirs, lease=remote),
                deadline_s=_DEADLINE_S, backend=backend,
            )  # fmt: skip
            anew.append(time.perf_counter() - began)
            transfer.wait()
        prepared = self.agent.prepare(
            self.registration.blocks(ours, size), peer.blocks(theirs, lease=remote)
        )
        course = _Course(prepared, backend, is_write=False)
        course.once()
        again = [course.once()[0] for _ in range(request["count"])]
        return {"anew_s": anew, "prepared_s": again}

    def _remote(self, token: str) -> kvx.RemoteLease:
        return self._peer_is.lease(base64.b85decode(token))

    @property
    def _peer_is(self) -> kvx.Peer:
        assert self._peer is not None, "connected first"
        return self._peer


def _run(course: _Course, count: int, limit_s: float) -> dict[str, Any]:
    """Run up to `count` times, and no more once `limit_s` have gone by."""
    posts, walls = [], []
    until = time.perf_counter() + limit_s
    for _ in range(count):
        post_s, wall_s = course.once()
        posts.append(post_s)
        walls.append(wall_s)
        if time.perf_counter() > until:
            break
    return {"post_s": posts, "wall_s": walls}
