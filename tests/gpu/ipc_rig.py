"""Two agents in two processes, with blocks on devices or in host memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from kvx.transfer.agents.agent import Agent
from kvx.transfer.conformance import KEY, READ, WRITE, Rig
from kvx.transfer.memory import MemoryRegion
from kvx.transfer.owner import OwnerProcess, pattern
from tests.gpu.device_blocks import DeviceBlocks
from tests.gpu.ipc_owner import DeviceOwner
from tests.gpu.rig import Gpu
from tests.sim.cuda_driver import SimulatedDriver

NUM_BLOCKS, BLOCK_BYTES = 64, 4096


@contextlib.contextmanager
def open_ipc(
    gpu: Gpu,
    *,
    here: str = "plain",
    there: str = "plain",
    num_blocks: int = NUM_BLOCKS,
    block_bytes: int = BLOCK_BYTES,
    backend: str = "cuda-ipc",
    config: Mapping[str, object] | None = None,
    listen: str | None = None,
    **owner: Any,
) -> Iterator[Rig]:
    """Open a rig: an initiator in this process, an owner in another one.

    Args:
        gpu: The device of this process.
        here: Where the initiator's blocks lie: ``plain``, ``exportable`` or ``host``.
        there: Where the owner's do.
        num_blocks: Blocks of each side.
        block_bytes: Their size.
        backend: The way under test.
        config: Of both agents.
        listen: Where the owner listens besides its socket file.
        owner: More options of `DeviceOwner`.
    """
    driver = None if gpu.is_real else SimulatedDriver()
    terms = dict(config or {})
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            OwnerProcess(
                kind=DeviceOwner, key=KEY, config=terms, num_blocks=num_blocks,
                block_bytes=block_bytes, where=there, is_real=gpu.is_real, listen=listen, **owner,
            )
        )  # fmt: skip
        blocks: Any
        if here == "host":
            region = MemoryRegion(num_blocks * block_bytes, is_shared=True)
            size = num_blocks * block_bytes
            blocks = region.array()[:size].reshape(num_blocks, block_bytes)
            source: object = region
        else:
            blocks = DeviceBlocks(
                gpu.device, driver, num_blocks=num_blocks, block_bytes=block_bytes,
                is_exportable=here == "exportable",
            )  # fmt: skip
            # Freed behind the agent, which has it registered.
            stack.callback(blocks.close)
            source = blocks.memory
        agent = stack.enter_context(Agent("initiator", key=KEY, config=terms))
        peer = agent.connect(process.ask("card"))
        rig = Rig(agent, agent.register(source), blocks, peer, process, process.ask, backend)
        rig.ask("fill", 1)
        yield rig


def endpoint_of(rig: Rig, backend: str = "cuda-ipc") -> Any:
    """Return the initiator's endpoint of a backend."""
    return rig.agent._parts.ways._endpoints[backend]


def moves_both_ways(rig: Rig, num_blocks: int) -> None:
    """Read all the blocks of a rig, then write and tell of it."""
    token = rig.ask("lease", list(range(num_blocks)), rights=READ | WRITE)[1]
    remote, local = rig.peer.blocks(lease=token), rig.local(range(num_blocks))
    rig.agent.read(local, remote).wait()
    assert (rig.blocks == pattern(1, num_blocks, BLOCK_BYTES)).all()
    rig.blocks[:] = pattern(2, num_blocks, BLOCK_BYTES)
    result = rig.agent.write(local, remote, notify=b"all of it").wait()
    assert result.blocks_done == num_blocks
    assert ("initiator", b"all of it") in rig.ask("notifications", 5.0)
    for block in (0, 4095, 8192, num_blocks - 1):
        assert rig.ask("content", block) == rig.blocks[block].tobytes()
