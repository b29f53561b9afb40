"""A link between two network namespaces that can be cut and throttled. Needs root."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from types import TracebackType
from typing import Self

from kvx.transfer.agents.peer_state import PeerState
from tests.transfer.faults.ground import Ground
from tests.transfer.faults.process_faults import Fault
from tests.transfer.faults.victim import Way

_NAMESPACE = "kvx-faults"
_HERE, _THERE = "10.231.77.1", "10.231.77.2"
_OURS, _THEIRS = "kvx-ours", "kvx-theirs"
_RATE = "8mbit"


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


def _there(*words: str) -> None:
    _run("ip", "netns", "exec", _NAMESPACE, *words)


@functools.cache
def why_no_links() -> str:
    """Return why links cannot be made here; empty when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc", "nft") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} are not installed"
    try:
        with Link():
            _cut()
            _mend()
            _throttle()
            _unthrottle()
    except OSError as error:
        return f"the kernel does not do it: {error}"
    return ""


class Link:
    """Two ends, one of them in a namespace of its own."""

    def __enter__(self) -> Self:
        """Make it."""
        self._remove()
        _run("ip", "netns", "add", _NAMESPACE)
        try:
            _run("ip", "link", "add", _OURS, "type", "veth", "peer", "name", _THEIRS)
            _run("ip", "link", "set", _THEIRS, "netns", _NAMESPACE)
            _run("ip", "address", "add", f"{_HERE}/30", "dev", _OURS)
            _run("ip", "link", "set", _OURS, "up")
            _there("ip", "address", "add", f"{_THERE}/30", "dev", _THEIRS)
            _there("ip", "link", "set", _THEIRS, "up")
            _there("ip", "link", "set", "lo", "up")
        except OSError:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        """Take it away."""
        self._remove()

    @staticmethod
    def _remove() -> None:
        for words in (("link", "delete", _OURS), ("netns", "delete", _NAMESPACE)):
            subprocess.run(("ip", *words), capture_output=True, check=False)


def way() -> Way:
    """Return the way over the link."""
    return Way(
        "tcp, a link", "tcp", ("tcp",), is_shared=False, listen=f"tcp://{_THERE}:0", unix=False,
        namespace=_NAMESPACE,
    )  # fmt: skip


def _cut() -> None:
    _there("nft", "add", "table", "inet", "kvx")
    for hook in ("input", "output"):
        _there(
            "nft", "add", "chain", "inet", "kvx", hook,
            f"{{ type filter hook {hook} priority 0; policy drop; }}",
        )  # fmt: skip


def _mend() -> None:
    _there("nft", "delete", "table", "inet", "kvx")


def _throttle() -> None:
    limits = ("root", "tbf", "rate", _RATE, "burst", "16kbit", "latency", "200ms")
    _run("tc", "qdisc", "add", "dev", _OURS, *limits)
    _there("tc", "qdisc", "add", "dev", _THEIRS, *limits)


def _unthrottle() -> None:
    _run("tc", "qdisc", "delete", "dev", _OURS, "root")
    _there("tc", "qdisc", "delete", "dev", _THEIRS, "root")


def _cut_of(_: Ground) -> None:
    _cut()


def _mend_of(_: Ground) -> None:
    _mend()


def _throttle_of(_: Ground) -> None:
    _throttle()


def _unthrottle_of(_: Ground) -> None:
    _unthrottle()


LINK_FAULTS = (
    Fault(
        "link drops all", _cut_of, _mend_of, peer=(PeerState.HALF_OPEN,), goes_on=True, lead_s=0.05
    ),
    Fault("link throttled", _throttle_of, _unthrottle_of, goes_on=True, lead_s=0.05),
)
