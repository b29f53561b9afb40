"""What both sides of a pair are: an agent, registered memory, and requests that are answered."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import kvx
from kvx.errors import CapacityError, UsageError
from kvx_bench.transfer.pair.memory import BenchMemory, open_memory
from kvx_bench.transfer.pattern import Pattern

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_CLOSE_S = 5.0


class Side:
    """One agent. Requests come as plain values, so that they can come from anywhere.

    Attributes:
        agent: The agent.
    """

    def __init__(self, agent: kvx.Agent, *, driver: str, bytes_max: int | None = None) -> None:
        """Answer for an agent.

        Args:
            agent: Closed by `close`.
            driver: Library of CUDA's, for device memory.
            bytes_max: Most memory that a request may make it populate; None for any.
        """
        self.agent = agent
        self._driver = driver
        self._bytes_max = bytes_max
        self._memory: BenchMemory | None = None
        self._registration: kvx.Registration | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do one request."""
        match request["do"]:
            case "map":
                return self._map(request["num_bytes"], request["kind"])
            case "fill":
                return self._fill(request)
            case "look":
                return self._look(request)
            case "cpu":
                return {"cpu_s": time.process_time()}
        raise UsageError(f"a {type(self).__name__} cannot {request['do']}")

    @property
    def registration(self) -> kvx.Registration:
        """The registered memory."""
        assert self._registration is not None, "memory is mapped first"
        return self._registration

    @property
    def memory(self) -> BenchMemory:
        """The same as memory to look at."""
        assert self._memory is not None, "memory is mapped first"
        return self._memory

    def close(self) -> None:
        """Close the agent and let the memory go."""
        self.agent.close(_CLOSE_S)
        if self._memory is not None:
            self._memory.close()

    def blocks(self, request: dict[str, Any]) -> kvx.Descriptors:
        """Return the first blocks of a request's size, as many as it says."""
        return self.registration.blocks(range(request["batch"]), request["block_bytes"])

    def _map(self, num_bytes: int, kind: str) -> dict[str, Any]:
        if self._bytes_max is not None and num_bytes > self._bytes_max:
            raise CapacityError(
                f"{num_bytes} bytes of memory are asked for and {self._bytes_max} are allowed: "
                "take fewer or smaller blocks, or raise --memory-max where it listens",
                needed_bytes=num_bytes,
                available_bytes=self._bytes_max,
            )
        self._forget()
        memory = open_memory(kind, num_bytes, self._driver)
        try:
            self._registration = self.agent.register(memory.registrable())
        except BaseException:
            memory.close()
            raise
        self._memory = memory
        return {}

    def _forget(self) -> None:
        if self._registration is not None:
            self._registration.close()
            self.memory.close()
        self._registration, self._memory = None, None

    def _fill(self, request: dict[str, Any]) -> dict[str, Any]:
        content = self.memory.load()
        pattern = Pattern(request["block_bytes"], request["iteration"])
        pattern.fill(_blocks_of(content, request))
        self.memory.store(content)
        return {}

    def _look(self, request: dict[str, Any]) -> dict[str, Any]:
        pattern = Pattern(request["block_bytes"], request["iteration"])
        found = pattern.first_difference(_blocks_of(self.memory.load(), request))
        return {"difference": None if found is None else found.plain()}


def _blocks_of(content: npt.NDArray[np.uint8], request: dict[str, Any]) -> npt.NDArray[np.uint8]:
    size, batch = request["block_bytes"], request["batch"]
    return content[: size * batch].reshape(batch, size)


def open_agent(request: dict[str, Any]) -> kvx.Agent:
    """Return the agent that an "open" request describes."""
    key = request.get("key")
    return kvx.Agent(
        request["name"],
        listen=request.get("listen"),
        key=None if key is None else bytes.fromhex(key),
        config=request.get("config", {}),
    )


@contextlib.contextmanager
def closing(side: Side) -> Any:
    """Close a side at the end."""
    try:
        yield side
    finally:
        side.close()
