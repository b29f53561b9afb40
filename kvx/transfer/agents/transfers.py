"""Reads and writes under way, as `kvx.Transfer`s over native jobs.

A transfer is settled by whoever looks first: a thread that waits does it itself, without the
agent's thread; only callbacks and `await` make the job tell that thread when it has ended.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from kvx.errors import UsageError
from kvx.transfer.agents.outcome import Circumstances, LinkOutcome, LinkResult, error_of
from kvx.transfer.backend import Reasoned
from kvx.transfer.handle import Transfer, TransferState

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.errors import KvxError
    from kvx.transfer.agents.instruments import AgentInstruments
    from kvx.transfer.agents.roster import PeerRecord
    from kvx.transfer.core import LinkJob


class LinkTransfer(Transfer[LinkResult]):
    """One read or write between agents; see `kvx.Transfer`."""

    def __init__(self, drive: LinkDrive, description: str) -> None:
        """Make a pending transfer; use `Agent.read` or `Agent.write` instead."""
        super().__init__(drive, description)
        self._drive = drive
        drive.transfer = weakref.ref(self)

    def poll(self) -> TransferState:
        """Return the state now. Never blocks."""
        self._drive.settle()
        return super().poll()

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """See `Transfer.add_done_callback`."""
        super().add_done_callback(callback)
        self._drive.watch(self)

    @property
    def result(self) -> LinkResult | None:
        """What has been reached, also after a timeout or cancel; None while pending."""
        self._drive.settle()
        return super().result

    @property
    def error(self) -> KvxError | None:
        """Why the transfer failed; None while pending or when done."""
        self._drive.settle()
        return super().error

    @property
    def outcome(self) -> LinkOutcome:
        """Where it stands, and after an end whether anybody may still be at its memory."""
        state = self.poll()
        if state in (TransferState.PENDING, TransferState.DONE) or self._drive.job.is_quiesced():
            return LinkOutcome(state.value)
        return LinkOutcome.QUARANTINED

    @property
    def backend(self) -> str:
        """The way the bytes go."""
        return self._drive.backend

    def __del__(self) -> None:
        """Count it, and warn when it failed and nobody ever looked."""
        drive = getattr(self, "_drive", None)
        if drive is not None:
            drive.settle_with(self)
        super().__del__()


class LinkDrive:
    """Drives a transfer by its job."""

    def __init__(
        self, job: LinkJob, record: PeerRecord, desk: TransferDesk, *, family: str, backend: str,
        verb: str, deadline_s: float,
    ) -> None:  # fmt: skip
        """Drive one job."""
        self.job = job
        self.backend = backend
        self._family = family
        self.transfer: weakref.ref[LinkTransfer] | None = None
        self._record = record
        self._desk = desk
        self._verb = verb
        self._deadline_s = deadline_s
        self._is_settled = False

    def drive(self, timeout_s: float) -> None:
        """Wait for the job on the caller's thread."""
        if self.job.wait(timeout_s):
            self.settle()

    def cancel(self) -> None:
        """See `LinkJob.cancel`."""
        self.job.cancel()

    def wait_layer(self, layer: int, timeout_s: float | None) -> int:
        """See `Transfer.wait_layer`: the only layer is the whole."""
        if layer != 0:
            raise UsageError(f"layer {layer}: transfers between agents have layer 0 only")
        transfer = None if self.transfer is None else self.transfer()
        assert transfer is not None, "it is the transfer that waits"
        return transfer.wait(timeout_s).blocks_done

    def wait_on_stream(self, stream: int, layer: int | None) -> None:  # noqa: ARG002 - never waits
        """See `Transfer.wait_on_stream`: never possible here."""
        raise UsageError("transfers between agents are waited for on the CPU")

    def wait_quiesced(self, timeout_s: float) -> bool:
        """See `Transfer.wait_quiesced`."""
        return self.job.wait_quiesced(timeout_s)

    def watch(self, transfer: LinkTransfer) -> None:
        """Let the agent's thread settle the transfer when its job ends."""
        if self._is_settled:
            return
        self._desk.watch(self._family, self.job.id, transfer)
        if self.job.watch():
            self._desk.ended(self._family, self.job.id)

    def settle(self) -> None:
        """Complete the transfer when its job has ended."""
        transfer = None if self._is_settled or self.transfer is None else self.transfer()
        if transfer is not None:
            self.settle_with(transfer)

    def settle_with(self, transfer: LinkTransfer) -> None:
        """Complete a transfer whose job has ended, also one that is being deleted just now."""
        if self._is_settled or not self.job.is_terminal():
            return
        job = self.job
        state = job.state()
        result = LinkResult(
            job.blocks_done, job.bytes_done, job.codes(), job.checksums(), job.latency_ns / 1e9,
            self.backend,
        )  # fmt: skip
        error = None if state == "done" else self._error_of(state, result)
        self._is_settled = True
        if transfer.complete(result, error):
            self._desk.instruments.note_transfer(self._verb, result, error)

    def _error_of(self, state: str, result: LinkResult) -> KvxError | None:
        job = self.job
        about = Circumstances(
            self._verb, self._record.name, _in_words(self._record), job.bytes, self._deadline_s,
            job.reason() if isinstance(job, Reasoned) else "",
        )  # fmt: skip
        return error_of(state, result, about, is_lost=job.is_lost())


class TransferDesk:
    """The transfers whose end somebody wants to be told of. Thread-safe."""

    def __init__(self, instruments: AgentInstruments) -> None:
        """Start empty."""
        self.instruments = instruments
        self._lock = threading.Lock()
        self._watched: dict[tuple[str, int], LinkTransfer] = {}

    def begin(
        self,
        job: LinkJob,
        record: PeerRecord,
        *,
        family: str,
        backend: str,
        verb: str,
        deadline_s: float,
    ) -> LinkTransfer:
        """Return the transfer of a job.

        Args:
            job: Moves the bytes.
            record: The peer.
            family: Whose numbers the job's is one of: empty for the native core's, else a backend.
            backend: The way.
            verb: ``read`` or ``write``.
            deadline_s: What the job was given.
        """
        drive = LinkDrive(
            job, record, self, family=family, backend=backend, verb=verb, deadline_s=deadline_s
        )
        preposition = "from" if verb == "read" else "to"
        return LinkTransfer(drive, f"the {verb} {preposition} {record.name}")

    def watch(self, family: str, job_id: int, transfer: LinkTransfer) -> None:
        """Keep a transfer until its job's end is told."""
        with self._lock:
            self._watched[family, job_id] = transfer

    def ended(self, family: str, job_id: int) -> None:
        """Settle the transfer of a job that has ended; on any thread."""
        with self._lock:
            transfer = self._watched.pop((family, job_id), None)
        if transfer is not None:
            transfer.poll()

    def end_all(self) -> None:
        """Settle what was watched: all jobs have ended with their agent."""
        with self._lock:
            watched, self._watched = list(self._watched.values()), {}
        for transfer in watched:
            transfer.poll()


def _in_words(record: PeerRecord) -> str:
    reason = f" ({record.reason})" if record.reason else ""
    return f"{record.name} is {record.state.value}{reason}"
