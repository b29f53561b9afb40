"""Copies and other people's streams: marks that copies follow, gates that streams wait for."""

from __future__ import annotations

import pytest

from kvx.errors import UsageError
from kvx.transfer.codes import Code
from tests.gpu.rig import PATIENCE_S, Gpu, address_of, copy_one, one

SIZE = 1 << 20
# Long enough for a copy that waits for nothing to be over.
MOMENT_S = 0.1


@pytest.fixture
def gpu_with_gates(gpu: Gpu) -> Gpu:
    """Only where streams can wait for a word."""
    if not gpu.device.info()["has_stream_values"]:
        pytest.skip("streams of this device cannot wait for a value")
    return gpu


def test_a_copy_follows_its_mark(gpu_with_gates: Gpu) -> None:
    gpu = gpu_with_gates
    host, memory, stream = gpu.host(SIZE), gpu.memory(SIZE), gpu.stream()
    gpu.write(memory.address, bytes(SIZE))
    gate = gpu.gate()
    assert gate.wait_on(stream, 1) == ""
    gpu.device.fill(memory.address, 0x5A, SIZE, stream)
    mark = gpu.device.mark(stream)
    copies = gpu.copies()
    run = (one(address_of(host)), one(memory.address), one(SIZE))
    ticket = copies.submit("d2h", *run, after=mark)
    assert Code(copies.wait(ticket, MOMENT_S)) is Code.TIMEOUT
    assert not host.any()
    gate.advance(1)
    assert Code(copies.wait(ticket, PATIENCE_S)) is Code.OK
    assert (host == 0x5A).all()
    gpu.device.stream_synchronize(stream)


def test_what_comes_after_the_mark_is_not_waited_for(gpu_with_gates: Gpu) -> None:
    gpu = gpu_with_gates
    host, memory, stream = gpu.host(SIZE), gpu.memory(2 * SIZE), gpu.stream()
    gpu.device.fill(memory.address, 7, SIZE, stream)
    mark = gpu.device.mark(stream)
    gate = gpu.gate()
    assert gate.wait_on(stream, 1) == ""
    gpu.device.fill(memory.address + SIZE, 8, SIZE, stream)
    copies = gpu.copies()
    run = (one(address_of(host)), one(memory.address), one(SIZE))
    ticket = copies.submit("d2h", *run, after=mark)
    assert Code(copies.wait(ticket, PATIENCE_S)) is Code.OK
    assert (host == 7).all()
    gate.advance(1)
    gpu.device.stream_synchronize(stream)
    assert gpu.read(memory.address + SIZE, SIZE) == bytes([8]) * SIZE


def test_a_stream_waits_for_its_gate_to_reach_the_value(gpu_with_gates: Gpu) -> None:
    """A transfer of two layers: the stream goes on with the second when that has arrived."""
    gpu = gpu_with_gates
    host, memory, stream = gpu.host(2 * SIZE), gpu.memory(2 * SIZE), gpu.stream()
    results = gpu.host(4096)
    host[:SIZE], host[SIZE:] = 1, 2
    gate = gpu.gate()
    assert gate.wait_on(stream, 2) == ""
    gpu.device.fill(memory.address, 9, 4096, stream)
    copies = gpu.copies()
    for layer in (0, 1):
        start = layer * SIZE
        copy_one(copies, "h2d", memory.address + start, address_of(host) + start, SIZE)
        assert gate.value == layer
        gate.advance(layer + 1)
    # Were it not for the gate, the first layer would have overwritten the fill.
    copies_after = gpu.device.mark(stream)
    run = (one(address_of(results)), one(memory.address), one(4096))
    assert Code(copies.wait(copies.submit("d2h", *run, after=copies_after), PATIENCE_S)) is Code.OK
    assert (results == 9).all()


def test_a_gate_only_grows(gpu: Gpu) -> None:
    gate = gpu.gate()
    assert gate.value == 0
    gate.advance(5)
    gate.advance(3)
    assert gate.value == 5


def test_a_gate_that_was_reached_holds_nobody_up(gpu_with_gates: Gpu) -> None:
    gpu = gpu_with_gates
    stream = gpu.stream()
    gate = gpu.gate()
    gate.advance(3)
    assert gate.wait_on(stream, 2) == ""
    gpu.device.stream_synchronize(stream)


def test_the_null_stream_is_refused(gpu: Gpu) -> None:
    with pytest.raises(UsageError):
        gpu.device.mark(0)
    with pytest.raises(UsageError):
        gpu.gate().wait_on(0, 1)
