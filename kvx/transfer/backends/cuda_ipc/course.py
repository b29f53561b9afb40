"""One transfer that is done here: first its source is found, then it is pulled.

Whoever ends its job early, at any moment, is told that it has quiesced once nothing of it is with
a device: at once while the source is being looked for, else when the last copy has landed.
"""

from __future__ import annotations

import enum
import threading
from typing import TYPE_CHECKING

from kvx.transfer.agents import descriptors
from kvx.transfer.backends.cuda_ipc.pull import Pull
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.transfer.backends.cuda_ipc.imports import Import, Imports
    from kvx.transfer.backends.cuda_ipc.sources import Sources, Want
    from kvx.transfer.backends.device.job import DeviceJob
    from kvx.transfer.backends.device.plan import PullPlan


class _Stage(enum.Enum):
    FINDING = enum.auto()
    PULLING = enum.auto()
    OVER = enum.auto()


class Course:
    """See the module. Thread-safe."""

    def __init__(
        self, job: DeviceJob, plan: PullPlan, want: Want, *, imports: Imports, sources: Sources,
        was_allowed: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Tie a job to what is to be done.

        Args:
            job: Told of all that happens.
            plan: What goes where.
            want: Where it comes from.
            imports: Gets the source back.
            sources: Finds it.
            was_allowed: Called when the owner has agreed.
        """
        self._job = job
        self._plan = plan
        self._want = want
        self._imports = imports
        self._sources = sources
        self._was_allowed = was_allowed
        self._lock = threading.Lock()
        self._stage = _Stage.FINDING
        self._question = 0
        self._pull: Pull | None = None
        self._source: Import | None = None
        job.when_ended = self._ended

    def begin(self) -> None:
        """Look for the source."""
        self._question = self._sources.find(self._want, self._found)

    def _found(self, source: Import | None, code: Code, text: str) -> None:
        if source is None:
            self._job.end(code, text)
            self._ended()
            return
        self._was_allowed()
        wrong = descriptors.objection(self._plan.remote, source.size_bytes)
        with self._lock:
            pull = None
            if self._stage is _Stage.FINDING and not wrong:
                self._stage = _Stage.PULLING
                self._source = source
                self._pull = pull = Pull(self._job, self._plan, source, self._pulled)
        if pull is not None:
            source.desk.do(pull.begin)
            return
        self._imports.release(source)
        if wrong:
            self._job.end(Code.USAGE, wrong)
            self._ended()

    def _ended(self) -> None:
        """Stop what can be stopped: the job has become terminal."""
        with self._lock:
            stage, pull, source = self._stage, self._pull, self._source
            if stage is _Stage.FINDING:
                self._stage = _Stage.OVER
        if stage is _Stage.FINDING:
            self._sources.forget(self._question)
            self._job.settle()
        elif pull is not None and source is not None:
            source.desk.do(pull.give_up)

    def _pulled(self) -> None:
        with self._lock:
            self._stage = _Stage.OVER
            source, self._source, self._pull = self._source, None, None
        assert source is not None, "it was pulled from"
        self._imports.release(source)
        self._job.settle()
