"""Pairs of two processes on this host, or of one here and a target that listens elsewhere."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import kvx
from kvx.errors import IncompatibleError
from kvx_bench.case import DRIVER
from kvx_bench.transfer.child import Child
from kvx_bench.transfer.cpu_clock import process_cpu_s
from kvx_bench.transfer.pair.pair import Pair

if TYPE_CHECKING:
    from pathlib import Path

    from kvx_bench.transfer.pair.pair import Desk

_PROGRAM = "kvx_bench.transfer.pair.program"
# Over a socket file peers may map each other's memory. What is to be measured over the network must
# not have one: two agents of a host would take it.
_BY_NETWORK = {"tcp"}


@dataclass(frozen=True, slots=True)
class PairOptions:
    """How both agents are opened.

    Attributes:
        copy_threads: Of each; 0 for as many as agents have by default.
        driver: Library of CUDA's.
        key: Secret of both agents; None for none.
        python: What runs them; None for this one.
        config: Further options of `kvx.AgentConfig`.
    """

    copy_threads: int = 0
    driver: str = DRIVER
    key: bytes | None = None
    python: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def request(self, role: str, **terms: object) -> dict[str, Any]:
        """Return the request that opens one side."""
        config = {"copy_threads": self.copy_threads, **self.config, **terms}
        return {
            "do": "open", "role": role, "name": f"bench-{role}", "driver": self.driver,
            "config": config, "key": None if self.key is None else self.key.hex(),
        }  # fmt: skip


def open_pair(backend: str, options: PairOptions) -> Pair:
    """Start two processes on this host whose agents have one backend only.

    Raises:
        UnavailableError: That backend is not here; says why.
    """
    is_file = backend not in _BY_NETWORK
    terms: dict[str, Any] = {"backends": [backend], "unix": is_file}
    with contextlib.ExitStack() as made:
        target, initiator = (
            made.enter_context(Child.of_module(_PROGRAM, python=options.python)) for _ in range(2)
        )
        listen = None if is_file else "tcp://127.0.0.1:0"
        target.ask(**options.request("target", **terms), listen=listen)
        initiator.ask(**options.request("initiator", **terms))
        initiator.ask(do="connect", card=target.ask(do="describe")["card"])
        return Pair(
            initiator,
            target,
            lambda: (process_cpu_s(initiator.pid), process_cpu_s(target.pid)),
            made.pop_all(),
        )
    raise AssertionError("an exit stack swallows nothing")


class _Theirs:
    """Asks the target through the initiator's agent."""

    def __init__(self, initiator: Child) -> None:
        self._initiator = initiator

    def ask(self, **request: object) -> dict[str, Any]:
        """Pass a request on."""
        return self._initiator.ask(do="theirs", request=request)


def connect_pair(address: str, options: PairOptions) -> Pair:
    """Start an initiator here and connect it with a target that listens.

    Raises:
        UnavailableError: It cannot be reached, or refuses us.
        IncompatibleError: Another version of kvx runs there.
    """
    with contextlib.ExitStack() as made:
        initiator = made.enter_context(Child.of_module(_PROGRAM, python=options.python))
        initiator.ask(**options.request("initiator", unix=False))
        initiator.ask(do="connect", address=address)
        target: Desk = _Theirs(initiator)
        version = target.ask(do="describe")["version"]
        if version != kvx.__version__:
            raise IncompatibleError(
                f"kvx {version} listens at {address}, and this is {kvx.__version__}: install the "
                "same version on both sides",
                ours=kvx.__version__,
                theirs=version,
            )
        return Pair(
            initiator,
            target,
            lambda: (process_cpu_s(initiator.pid), float(target.ask(do="cpu")["cpu_s"])),
            made.pop_all(),
        )
    raise AssertionError("an exit stack swallows nothing")
