"""Device planes layer by layer: order, prefixes, streams, and what stops them."""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvx
from kvx.errors import TransferTimeout, UnavailableError, UsageError
from kvx.transfer.codes import Code
from kvx_ext import _core
from tests.cache.conftest import BLOCK_BYTES, Opener, make_blocks, make_hashes
from tests.cache.engine_memory import UNTOUCHED, EngineMemory, empty, plain_space, store
from tests.cache.on_device import DeviceArray
from tests.sim.cuda_driver import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from tests.cache.on_device import Gpu

pytestmark = pytest.mark.parametrize("gpu", ["device, seed 1"], indirect=True)

LAYOUT = kvx.KVLayout.of_model(
    "layer_first", num_layers=4, num_kv_heads=2, head_dim=32, block_tokens=16, item_bytes=2
)
NUM_BLOCKS = 8
PLANE_BYTES = LAYOUT.bytes_of_planes[0]
HASHES = make_hashes(NUM_BLOCKS)
ROWS = make_blocks(NUM_BLOCKS, block_bytes=LAYOUT.block_bytes)
# The engine's slots, neither in order nor side by side.
IDS = [9, 2, 5, 11, 0, 7, 3, 10]


class Planes:
    """Keys and values of every layer in allocations of their own, rows further apart than long.

    Attributes:
        blocks: The engine's slots that a test moves.
    """

    def __init__(self, gpu: Gpu) -> None:
        """Allocate them for 12 slots; nothing is in them yet."""
        self._gpu = gpu
        self._arrays = [
            DeviceArray(gpu.device, (12, PLANE_BYTES), PLANE_BYTES + 512)
            for _ in range(LAYOUT.num_planes)
        ]
        for array in self._arrays:
            array.upload(gpu.driver, np.full((12, PLANE_BYTES), UNTOUCHED, np.uint8))
        self.blocks = kvx.BlockView(LAYOUT, self._arrays).slots(IDS)

    def write(self, rows: npt.NDArray[np.uint8]) -> None:
        """Put canonical blocks into the slots."""
        for number, array in enumerate(self._arrays):
            plane = rows[:, number * PLANE_BYTES : (number + 1) * PLANE_BYTES]
            for place, row in zip(IDS, plane, strict=True):
                at = array.memory.address + place * array.row_bytes
                self._gpu.driver.write(at, row.tobytes())

    def read(self) -> npt.NDArray[np.uint8]:
        """Return the slots' canonical bytes."""
        return np.concatenate([one.download(self._gpu.driver)[IDS] for one in self._arrays], axis=1)

    def read_layer(self, layer: int) -> npt.NDArray[np.uint8]:
        """Return one layer of the slots, while later ones may be on their way."""
        both = self._arrays[2 * layer : 2 * layer + 2]
        return np.concatenate([one.download(self._gpu.driver)[IDS] for one in both], axis=1)


def layer_of(rows: npt.NDArray[np.uint8], layer: int) -> npt.NDArray[np.uint8]:
    """Return a layer's part of canonical blocks."""
    return rows[:, 2 * layer * PLANE_BYTES : 2 * (layer + 1) * PLANE_BYTES]


@pytest.fixture
def space(open_cache: Opener) -> kvx.CacheSpace:
    """Hand out a namespace whose blocks DRAM holds, and HBM does not."""
    space = plain_space(open_cache(has_nvme=False), block_bytes=LAYOUT.block_bytes)
    assert space.offload(HASHES, ROWS).wait().num_blocks == NUM_BLOCKS
    return space


@pytest.fixture
def frozen(gpu: Gpu) -> Iterator[None]:
    """Keep copies to the device from completing until the test is over."""
    gpu.driver.freeze(Engine.HOST_TO_DEVICE)
    yield
    gpu.driver.thaw(Engine.HOST_TO_DEVICE)


@pytest.fixture
def stream(gpu: Gpu) -> Iterator[int]:
    """Hand out a stream of the engine."""
    made = gpu.device.create_stream()
    yield made
    gpu.device.destroy_stream(made)


def test_planes_become_canonical_blocks(open_cache: Opener, gpu: Gpu) -> None:
    cache = open_cache(has_nvme=False, has_hbm=False)
    space = plain_space(cache, block_bytes=LAYOUT.block_bytes)
    planes = Planes(gpu)
    planes.write(ROWS)
    assert space.offload(HASHES, planes.blocks).wait().num_blocks == NUM_BLOCKS
    target = np.zeros_like(ROWS)
    assert space.onboard(HASHES, target).wait().num_blocks == NUM_BLOCKS
    assert (target == ROWS).all()
    with space.lease(HASHES) as lease:
        assert all((lease.view(i) == row).all() for i, row in enumerate(ROWS))


def test_layers_arrive_in_order(space: kvx.CacheSpace, gpu: Gpu) -> None:
    gpu.driver.set_latency(Engine.HOST_TO_DEVICE, 0.01)
    try:
        planes = Planes(gpu)
        transfer = space.onboard(HASHES, planes.blocks, is_layerwise=True)
        for layer in range(LAYOUT.num_layers):
            assert transfer.wait_layer(layer, timeout_s=5.0) == NUM_BLOCKS
            assert (planes.read_layer(layer) == layer_of(ROWS, layer)).all()
    finally:
        gpu.driver.set_latency(Engine.HOST_TO_DEVICE, 0.0)
    assert transfer.wait().num_blocks == NUM_BLOCKS
    assert transfer.wait_layer(0) == NUM_BLOCKS
    assert (planes.read() == ROWS).all()


def test_a_layer_is_there_before_the_next(open_cache: Opener, gpu: Gpu) -> None:
    """Layers of more than 32 MiB, since the driver is handed as much at a time."""
    layout = kvx.KVLayout.of_model(
        "layer_first", num_layers=2, num_kv_heads=32, head_dim=128, block_tokens=512, item_bytes=2
    )
    cache = open_cache(has_nvme=False, has_hbm=False, dram={"capacity": "80MiB"})
    space = plain_space(cache, block_bytes=layout.block_bytes)
    count = 5
    rows = np.arange(1, count + 1, dtype=np.uint8)[:, None].repeat(layout.block_bytes, axis=1)
    space.offload(HASHES[:count], rows).wait()
    arrays = [DeviceArray(gpu.device, (count, layout.bytes_of_planes[0])) for _ in range(4)]
    gpu.driver.set_latency(Engine.HOST_TO_DEVICE, 0.2)
    try:
        view = kvx.BlockView(layout, arrays)
        transfer = space.onboard(HASHES[:count], view.slots(range(count)), is_layerwise=True)
        assert transfer.wait_layer(0) == count
        assert transfer.poll() is kvx.TransferState.PENDING
        for array in arrays[:2]:
            assert gpu.driver.read(array.memory.address, 4) == b"\x01" * 4
        assert transfer.wait_layer(1) == count
    finally:
        gpu.driver.set_latency(Engine.HOST_TO_DEVICE, 0.0)
    assert transfer.wait().num_blocks == count
    assert gpu.driver.read(arrays[3].memory.address, 4) == b"\x01" * 4


def test_layers_from_hbm_arrive(space: kvx.CacheSpace, gpu: Gpu) -> None:
    planes = Planes(gpu)
    space.onboard(HASHES[:5], kvx.BlockSelection(planes.blocks.view, planes.blocks.ids[:5])).wait()
    assert space.match(HASHES).blocks_in(kvx.TierKind.HBM) == 5
    again = Planes(gpu)
    transfer = space.onboard(HASHES, again.blocks, is_layerwise=True)
    for layer in range(LAYOUT.num_layers):
        assert transfer.wait_layer(layer) == NUM_BLOCKS
        assert (again.read_layer(layer) == layer_of(ROWS, layer)).all()
    assert transfer.wait().tiers.tolist() == [kvx.TierKind.HBM] * 5 + [kvx.TierKind.DRAM] * 3


def test_more_layers_than_dram_holds_at_once(open_cache: Opener, gpu: Gpu) -> None:
    """From NVMe through a DRAM of four blocks."""
    cache = open_cache(dram={"capacity": 4 * LAYOUT.block_bytes})
    space = plain_space(cache, block_bytes=LAYOUT.block_bytes)
    for row in range(NUM_BLOCKS):
        space.offload(HASHES[row : row + 1], ROWS[row : row + 1]).wait()
    assert cache.flush(10.0)
    planes = Planes(gpu)
    transfer = space.onboard(HASHES, planes.blocks, is_layerwise=True, deadline_s=5.0)
    for layer in range(LAYOUT.num_layers):
        assert transfer.wait_layer(layer) == NUM_BLOCKS
        assert (planes.read_layer(layer) == layer_of(ROWS, layer)).all()
    assert transfer.wait().num_blocks == NUM_BLOCKS


def test_a_damaged_block_ends_the_prefix_before_any_layer_is_there(
    space: kvx.CacheSpace, gpu: Gpu
) -> None:
    with space.lease(HASHES) as lease:
        ctypes.memset(int(lease.addresses[4]) + 3 * PLANE_BYTES, ROWS[4, 3 * PLANE_BYTES] ^ 1, 1)
    planes = Planes(gpu)
    transfer = space.onboard(HASHES, planes.blocks, is_layerwise=True)
    for layer in range(LAYOUT.num_layers):
        assert transfer.wait_layer(layer) == 4
    result = transfer.wait()
    assert result.prefix_blocks == 4
    assert result.num_blocks == NUM_BLOCKS - 1
    assert result.reasons[4] == kvx.MissReason.CORRUPT
    got = planes.read()
    assert (got[4] == UNTOUCHED).all()
    rest = np.arange(NUM_BLOCKS) != 4
    assert (got[rest] == ROWS[rest]).all()


@pytest.mark.usefixtures("frozen")
def test_waiting_for_a_layer_ends_in_time(space: kvx.CacheSpace, gpu: Gpu) -> None:
    planes = Planes(gpu)
    transfer = space.onboard(HASHES, planes.blocks, is_layerwise=True, deadline_s=0.4)
    began = time.monotonic()
    with pytest.raises(TransferTimeout, match="layer 1 has not arrived after"):
        transfer.wait_layer(1, timeout_s=0.05)
    assert transfer.poll() is kvx.TransferState.PENDING
    with pytest.raises(TransferTimeout, match="deadline"):
        transfer.wait_layer(0)
    assert 0.35 < time.monotonic() - began < 5.0
    assert transfer.poll() is kvx.TransferState.TIMED_OUT
    assert transfer.result is not None
    assert transfer.result.prefix_blocks == 0
    assert not transfer.wait_quiesced(0.05), "the engine's memory is still being written"
    gpu.driver.thaw(Engine.HOST_TO_DEVICE)
    assert transfer.wait_quiesced(5.0)
    assert transfer.wait_quiesced(0.0)


def test_a_stream_waits_for_its_layer(space: kvx.CacheSpace, gpu: Gpu, stream: int) -> None:
    """What the engine reads behind the wait is the layer, with no CPU in between."""
    planes, copy = Planes(gpu), gpu.device.allocate(PLANE_BYTES)
    address = int(planes.blocks.planes[0, 0]) + IDS[0] * int(planes.blocks.planes[0, 1])
    gpu.driver.freeze(Engine.HOST_TO_DEVICE)
    with _core.Copies(gpu.device, sm="never", staging_bytes=0) as copies:
        try:
            transfer = space.onboard(HASHES, planes.blocks, is_layerwise=True)
            transfer.wait_on_stream(stream, 0)
            places = (np.array([one], np.uint64) for one in (copy.address, address, PLANE_BYTES))
            ticket = copies.submit("d2d", *places, after=gpu.device.mark(stream))
            assert copies.wait(ticket, 0.05) == Code.TIMEOUT, "it did not wait"
        finally:
            gpu.driver.thaw(Engine.HOST_TO_DEVICE)
        assert copies.wait(ticket, 5.0) == Code.OK
    assert gpu.driver.read(copy.address, PLANE_BYTES) == ROWS[0, :PLANE_BYTES].tobytes()
    assert transfer.wait(5.0).num_blocks == NUM_BLOCKS


@pytest.mark.usefixtures("frozen")
def test_a_stream_is_let_go_when_a_transfer_fails(
    space: kvx.CacheSpace, gpu: Gpu, stream: int
) -> None:
    transfer = space.onboard(HASHES, Planes(gpu).blocks, is_layerwise=True, deadline_s=0.2)
    transfer.wait_on_stream(stream)
    with pytest.raises(TransferTimeout):
        transfer.wait()
    gpu.device.stream_synchronize(stream)  # hangs if it were not
    gpu.driver.thaw(Engine.HOST_TO_DEVICE)
    assert transfer.wait_quiesced(5.0)


def test_streams_that_cannot_wait(space: kvx.CacheSpace, gpu: Gpu, open_cache: Opener) -> None:
    gpu.driver.set_has_stream_values(has_stream_values=False)
    try:
        cache = open_cache(has_nvme=False)  # a device looks once what its driver has
        space = plain_space(cache)
        store(space, None, 4)
        transfer = space.onboard(make_hashes(4), empty(gpu, 4).blocks)
        stream = gpu.device.create_stream()
        with pytest.raises(UnavailableError, match="cannot wait"):
            transfer.wait_on_stream(stream)
        gpu.device.destroy_stream(stream)
        assert transfer.wait().num_blocks == 4
    finally:
        gpu.driver.set_has_stream_values(has_stream_values=True)


def test_an_offload_waits_for_the_stream_that_writes(
    open_cache: Opener, gpu: Gpu, stream: int
) -> None:
    space = plain_space(open_cache(has_nvme=False))
    memory = EngineMemory(gpu, make_blocks(4))
    assert isinstance(memory.blocks, DeviceArray)
    gpu.driver.set_latency(Engine.ON_DEVICE, 0.1)
    try:
        for value in (1, 2):
            gpu.device.fill(memory.blocks.memory.address, value, 4 * BLOCK_BYTES, stream)
        transfer = space.offload(make_hashes(4), memory.blocks, after=stream)
        assert transfer.wait().num_blocks == 4
    finally:
        gpu.driver.set_latency(Engine.ON_DEVICE, 0.0)
    target = np.zeros((4, BLOCK_BYTES), np.uint8)
    assert space.onboard(make_hashes(4), target).wait().num_blocks == 4
    assert (target == 2).all()


def test_an_onboard_waits_for_the_stream_that_reads(
    space: kvx.CacheSpace, gpu: Gpu, stream: int
) -> None:
    planes = Planes(gpu)
    address = int(planes.blocks.planes[0, 0])
    gpu.driver.set_latency(Engine.ON_DEVICE, 0.1)
    try:
        gpu.device.fill(address, 0xAB, PLANE_BYTES, stream)
        assert space.onboard(HASHES, planes.blocks, after=stream).wait().num_blocks == NUM_BLOCKS
    finally:
        gpu.driver.set_latency(Engine.ON_DEVICE, 0.0)
    assert (planes.read() == ROWS).all()


class Named:
    """A buffer that says it is where the test wants it."""

    def __init__(self, address: int, shape: tuple[int, int]) -> None:
        """Take an address."""
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


def test_what_cannot_be_is_refused(space: kvx.CacheSpace, gpu: Gpu) -> None:
    planes = Planes(gpu)
    whole = DeviceArray(gpu.device, (NUM_BLOCKS, LAYOUT.block_bytes))
    with pytest.raises(UsageError, match="opaque layout has no layers"):
        space.onboard(HASHES, whole, is_layerwise=True)
    with pytest.raises(UsageError, match="for blocks in device memory"):
        space.onboard(HASHES, np.zeros_like(ROWS), is_layerwise=True)
    with pytest.raises(UsageError, match="for blocks in device memory"):
        space.offload(HASHES, ROWS, after=77)
    for null in (0, 1, 2):
        with pytest.raises(UsageError, match="default stream"):
            space.offload(HASHES, planes.blocks, after=null)
    transfer = space.onboard(HASHES, planes.blocks, is_layerwise=True)
    for layer in (-1, LAYOUT.num_layers):
        with pytest.raises(UsageError, match="there is no layer"):
            transfer.wait_layer(layer)
    with pytest.raises(UsageError, match="default stream"):
        transfer.wait_on_stream(0)
    assert transfer.wait().num_blocks == NUM_BLOCKS
    on_cpu = space.onboard(HASHES, np.zeros_like(ROWS))
    with pytest.raises(UsageError, match="wait for it on the CPU"):
        on_cpu.wait_on_stream(77)
    on_cpu.wait()


def test_what_is_no_memory_of_the_device_is_refused(space: kvx.CacheSpace, gpu: Gpu) -> None:
    array = DeviceArray(gpu.device, (1, LAYOUT.block_bytes))
    with pytest.raises(UsageError):
        space.offload(HASHES[:1], Named(ROWS.ctypes.data, (1, LAYOUT.block_bytes)))
    beyond = Named(array.memory.address, (64, LAYOUT.block_bytes))
    with pytest.raises(UsageError, match="plane 0 has"):
        space.offload(make_hashes(64), beyond)
    gpu.driver.clear_convictions()  # it was asked about an address that is none
