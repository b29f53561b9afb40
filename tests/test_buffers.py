"""Memory of other libraries: where it lies, and what is refused."""

from __future__ import annotations

import array
import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvx
from kvx.buffers import LEGACY_STREAM, PER_THREAD_STREAM, Buffer, describe, stream_handle
from kvx.errors import UnavailableError, UsageError
from kvx.layout import BlockView, KVLayout
from kvx_ext import _core
from tests.cache.conftest import make_hashes
from tests.dlpack_capsules import (
    COPIED,
    CPU,
    CUDA,
    CUDA_HOST,
    MANAGED,
    READ_ONLY,
    CudaArray,
    Producer,
)

AT = 0x7F00_0000_0000
KIND = kvx.MemoryKind


def facts(buffer: Buffer) -> tuple[object, ...]:
    return (
        buffer.address, buffer.shape, buffer.strides_bytes, buffer.item_bytes, buffer.is_writable,
        buffer.kind, buffer.device_ordinal, buffer.stream,
    )  # fmt: skip


def test_numpy_arrays() -> None:
    rows = np.zeros((4, 6), np.uint16)[:, :3]
    assert facts(describe(rows)) == (
        rows.ctypes.data, (4, 3), (12, 2), 2, True, KIND.HOST, -1, None,
    )  # fmt: skip
    rows.flags.writeable = False
    assert not describe(rows).is_writable


@pytest.mark.parametrize(
    ("buffer", "shape", "item_bytes", "is_writable"),
    [
        (bytearray(b"abcd"), (4,), 1, True),
        (b"abcd", (4,), 1, False),
        (array.array("i", [1, 2, 3]), (3,), 4, True),
        (memoryview(bytearray(8)).cast("B", (2, 4)), (2, 4), 1, True),
    ],
)
def test_the_buffer_protocol(
    buffer: object, shape: tuple[int, ...], item_bytes: int, is_writable: bool
) -> None:
    found = describe(buffer)
    assert (found.shape, found.item_bytes, found.is_writable) == (shape, item_bytes, is_writable)
    assert found.kind is KIND.HOST


def test_memory_lives_as_long_as_what_describes_it() -> None:
    rows = np.arange(64, dtype=np.uint8).reshape(4, 16)
    alive = weakref.ref(rows)
    found: Buffer | None = describe(rows)
    del rows
    gc.collect()
    assert alive() is not None
    found = None
    assert found is alive()


@pytest.mark.parametrize("is_versioned", [True, False])
def test_a_capsule_is_given_back_once(is_versioned: bool) -> None:
    producer = Producer(is_versioned=is_versioned)
    found = describe(producer)
    part = found.part(1)
    del found
    assert producer.returned == 0
    del part
    assert producer.returned == 1


@pytest.mark.parametrize("is_versioned", [True, False])
@pytest.mark.parametrize(
    ("device", "kind", "ordinal"),
    [((CPU, 0), KIND.HOST, -1), ((CUDA_HOST, 0), KIND.HOST, -1), ((CUDA, 3), KIND.DEVICE, 3)],
)
def test_dlpack(
    is_versioned: bool, device: tuple[int, int], kind: kvx.MemoryKind, ordinal: int
) -> None:
    producer = Producer(
        is_versioned=is_versioned, device=device, shape=(2, 3), strides=(8, 1), bits=16,
        byte_offset=32,
    )  # fmt: skip
    assert facts(describe(producer)) == (AT + 32, (2, 3), (16, 2), 2, True, kind, ordinal, None)
    # A producer that is asked for nothing would order its stream before the default one.
    expected = {"stream": -1} if device[0] == CUDA else {}
    assert [{**one, "max_version": 0} for one in producer.asked] == [
        {**expected, "max_version": 0}
    ] * (1 if is_versioned else 2)


def test_dlpack_without_strides_is_contiguous() -> None:
    assert describe(Producer(shape=(2, 3, 4), bits=32)).strides_bytes == (48, 16, 4)
    assert describe(Producer(shape=(0, 4))).strides_bytes == (4, 1)
    assert describe(Producer(shape=())).strides_bytes == ()


def test_dlpack_of_vectors() -> None:
    assert describe(Producer(bits=4, lanes=2)).item_bytes == 1


def test_dlpack_that_may_not_be_written() -> None:
    found = describe(Producer(flags=READ_ONLY))
    assert not found.is_writable
    with pytest.raises(UsageError, match="read-only"):
        describe(Producer(flags=READ_ONLY), is_writable_needed=True)


@pytest.mark.parametrize(
    ("producer", "part"),
    [
        (Producer(device=(MANAGED, 0)), "DLPack type 13"),
        (Producer(device=(10, 0)), "DLPack type 10"),
        (Producer(flags=COPIED), "hands over a copy"),
        (Producer(bits=4), "elements of 4 bits"),
        (Producer(major=2), "DLPack version 2"),
    ],
)
def test_dlpack_that_is_refused(producer: Producer, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        describe(producer)
    gc.collect()
    # What was refused before it was taken belongs to its capsule; ours have no destructor.
    assert producer.returned == (part not in {"elements of 4 bits", "DLPack version 2"})


def test_a_capsule_is_consumed_once() -> None:
    capsule = Producer().__dlpack__()
    first = _core.DlpackTensor(capsule)
    with pytest.raises(UsageError, match="consumed before"):
        _core.DlpackTensor(capsule)
    with pytest.raises(UsageError, match="not a DLPack capsule"):
        _core.DlpackTensor(b"")
    assert first.device == (CUDA, 0)


def test_a_producer_that_refuses() -> None:
    class Grad(Producer):
        def __dlpack__(self, **arguments: object) -> object:
            raise BufferError(f"requires grad {len(arguments)}")

    with pytest.raises(UsageError, match="requires grad"):
        describe(Grad())


@pytest.mark.parametrize(
    ("changes", "strides", "is_writable", "stream"),
    [
        ({}, (64, 1), True, None),
        ({"strides": None, "stream": None}, (64, 1), True, None),
        ({"strides": (128, 1), "stream": 1}, (128, 1), True, LEGACY_STREAM),
        ({"data": (AT, True), "stream": 2}, (64, 1), False, PER_THREAD_STREAM),
        ({"version": 2, "descr": []}, (64, 1), True, None),
        ({"stream": 0x5555_0000}, (64, 1), True, 0x5555_0000),
    ],
)
def test_cuda_arrays(
    changes: dict[str, object], strides: tuple[int, ...], is_writable: bool, stream: int | None
) -> None:
    owner = CudaArray(**changes)
    found = describe(owner)
    assert facts(found) == (AT, (4, 64), strides, 1, is_writable, KIND.DEVICE, 0, stream)
    assert found.owner is owner


def test_a_cuda_array_tells_its_device() -> None:
    array_on = CudaArray()
    array_on.device = SimpleNamespace(id=2)
    assert describe(array_on).device_ordinal == 2
    array_on.device = SimpleNamespace(index=1)
    assert describe(array_on).device_ordinal == 1


def test_a_cuda_array_without_elements() -> None:
    assert describe(CudaArray(shape=(0, 64), data=(None, False))).address == 0


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"stream": 0}, "stream is 0"),
        ({"strides": (1,)}, "2 dimensions but 1 strides"),
        ({"version": 1}, "version 1"),
        ({"typestr": "what"}, "what"),
        ({"data": None}, "TypeError"),
        ({"mask": object()}, "mask"),
    ],
)
def test_cuda_arrays_that_are_malformed(changes: dict[str, object], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        describe(CudaArray(**changes))


@pytest.mark.parametrize("value", [None, 7, "text", [[1, 2]], np.array([None]), Producer])
def test_what_is_no_memory(value: object) -> None:
    with pytest.raises(UsageError):
        describe(value)


def test_streams() -> None:
    handle = 0x5555_0000
    for stream in (
        handle,
        SimpleNamespace(__cuda_stream__=lambda: (0, handle)),
        SimpleNamespace(__cuda_stream__=(0, handle)),
        SimpleNamespace(ptr=handle),
        SimpleNamespace(cuda_stream=handle),
    ):
        assert stream_handle(stream) == handle


@pytest.mark.parametrize(
    ("stream", "part"),
    [
        (0, "legacy default stream"),
        (1, "legacy default stream"),
        (2, "per-thread default stream"),
        (SimpleNamespace(ptr=0), "legacy default stream"),
        (SimpleNamespace(__cuda_stream__=lambda: (7, 99)), "version 7"),
        (-1, "no stream handle"),
        (True, "no CUDA stream"),
        (None, "no CUDA stream"),
        (SimpleNamespace(ptr="x"), "no CUDA stream"),
    ],
)
def test_streams_that_are_refused(stream: object, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        stream_handle(stream)


@given(st.data())
def test_contiguous_rows_against_numpy(data: st.DataObject) -> None:
    """By what numpy says of every row."""
    memory = np.zeros((3, 4, 5), np.uint16)
    axes = data.draw(st.permutations(range(3)))
    steps = [slice(None, None, data.draw(st.sampled_from([1, 2, 3]))) for _ in range(3)]
    rows = memory.transpose(axes)[tuple(steps)]
    assert describe(rows).has_contiguous_rows == all(row.flags.c_contiguous for row in rows)
    assert describe(rows).row_bytes == rows[0].nbytes
    assert describe(rows).part(1 % len(rows)).address == rows[1 % len(rows)].ctypes.data


TWO = KVLayout("layer_first", 128, num_layers=1)


def test_a_view_of_device_memory() -> None:
    planes = [Producer(AT, device=(CUDA, 1)), Producer(AT + 4096, device=(CUDA, 1))]
    view = BlockView(TWO, planes)
    assert (view.kind, view.device_ordinal, view.num_blocks) == (KIND.DEVICE, 1, 4)
    assert view.planes.tolist() == [[AT, 64, 64], [AT + 4096, 64, 64]]
    assert view.is_writable
    assert view.overlapping is None
    del view
    assert [plane.returned for plane in planes] == [1, 1]
    assert BlockView(TWO, [Producer(AT), Producer(AT + 64)]).overlapping == (0, 1)


def test_a_view_lies_in_one_place() -> None:
    host = np.zeros((4, 64), np.uint8)
    for other in (Producer(), replace(Producer(), device=(CUDA, 1))):
        with pytest.raises(UsageError, match="on one device"):
            BlockView(TWO, [host, other])
    with pytest.raises(UsageError, match="on one device"):
        BlockView(TWO, [Producer(), Producer(device=(CUDA, 1))])


def test_a_cache_without_a_device_refuses_device_memory() -> None:
    config = {"tiers": [{"kind": "dram", "capacity": "1MiB"}], "gpu": {"driver": "libnowhere.so"}}
    with kvx.TieredCache.open(config) as cache:
        space = cache.namespace(model="m", dtype="f", block_bytes=4096)
        with pytest.raises(UnavailableError, match=r"libnowhere\.so"):
            space.offload(make_hashes(4), Producer(shape=(4, 4096)))


def test_a_single_block_has_any_stride() -> None:
    view = BlockView.of_blocks(Producer(shape=(1, 64), strides=(1, 1), device=(CPU, 0)))
    assert view.planes.tolist() == [[AT, 64, 64]]
