"""How much slower the model's own work is while blocks are offloaded beside it."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvx_bench.gpu.fragments import batching
from kvx_bench.gpu.movers import CopiesMover, KernelMover, Mover
from kvx_bench.gpu.rig import forcing, paged, size_name
from kvx_bench.gpu.torch_peer import why_no_torch
from kvx_bench.row import GB, Row, median, timed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvx_bench.case import Options
    from kvx_bench.gpu.rig import GpuRig

_WIDTH = 8192
# A prefill and a decode: rows of the left matrix, and products a measurement, 10 ms or so of them.
_SHAPES = {"gemm": (_WIDTH, 5), "gemm-decode": (16, 200)}
_ENGINE_BYTES = 64 << 10
_SMALL_BYTES = 16 << 10
_WINDOW_S = 0.5
# Until the first copies have ended; a device that moves nothing in this time shows in the row.
_WARM_UP_S_MAX = 5.0


def interference_rows(rig: GpuRig, options: Options) -> Iterator[Row]:
    """Each product beside each way to offload, and before that alone."""
    if reason := why_no_torch(options):
        yield Row("gpu.interference", note=f"not here: {reason}")
        return
    window_s = _WINDOW_S / 4 if options.is_quick else _WINDOW_S
    plain = rig.plain_gb_per_s("d2h", rig.total_bytes, options.repeats)
    for shape, (rows, count) in _SHAPES.items():
        product = _Product(rows, count)
        for name, open_mover in _movers(rig):
            # Anew each time: clocks drift with the heat.
            alone_us = product.median_us(window_s)
            rig.prepare("d2h")
            with open_mover() as mover:
                measured = _beside(product, mover, window_s)
                mover.check()
            yield _row(f"gpu.interference.{shape}.{name}", measured, alone_us, plain)


class _Product:
    """`count` matrix products of bfloat16 in one graph, so that the CPU launches once."""

    def __init__(self, rows: int, count: int) -> None:
        torch: Any = import_module("torch")
        self._torch = torch
        self._count = count
        # Its own stream: work on torch's default one waits for all others that allow it.
        self._stream = torch.cuda.Stream()
        with torch.cuda.stream(self._stream):
            self._left, right = (
                torch.randn((height, _WIDTH), dtype=torch.bfloat16, device="cuda")
                for height in (rows, _WIDTH)
            )
            self._right = right
            self._result = torch.empty((rows, _WIDTH), dtype=torch.bfloat16, device="cuda")
            # What is made at the first call must not be made while the graph is recorded.
            for _ in range(3):
                torch.matmul(self._left, self._right, out=self._result)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            for _ in range(count):
                torch.matmul(self._left, self._right, out=self._result)

    def median_us(self, window_s: float) -> float:
        """Return what one product takes, median over a window."""
        torch = self._torch
        taken: list[float] = []
        ends = time.perf_counter() + window_s
        with torch.cuda.stream(self._stream):
            self._graph.replay()
            while time.perf_counter() < ends or not taken:
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                began.record()
                self._graph.replay()
                ended.record()
                ended.synchronize()
                taken.append(began.elapsed_time(ended) * 1e3 / self._count)
        return median(taken)


@dataclass(frozen=True, slots=True)
class _Measured:
    product_us: float
    gb_per_s: float
    cpu_s_per_gb: float


def _beside(product: _Product, mover: Mover, window_s: float) -> _Measured:
    """Measure the product while a thread keeps the mover busy."""
    stop, is_moving = threading.Event(), threading.Event()
    failures: list[BaseException] = []
    moved = [0]

    def keep_moving() -> None:
        try:
            mover.begin(0)
            half = 1
            while not stop.is_set():
                mover.begin(half)
                half = 1 - half
                moved[0] += mover.finish(half)
                is_moving.set()
            mover.finish(1 - half)
        except Exception as error:  # noqa: BLE001 - raised where the row is made
            failures.append(error)
            is_moving.set()

    thread = threading.Thread(target=keep_moving, name="kvx-bench-offload")
    thread.start()
    product_us: list[float] = []
    try:
        is_moving.wait(_WARM_UP_S_MAX)
        before = moved[0]
        sample = timed(lambda: product_us.append(product.median_us(window_s)))
        num_bytes = moved[0] - before
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]
    return _Measured(
        product_us[0], num_bytes / GB / sample.wall_s, sample.cpu_s / max(num_bytes / GB, 1e-9)
    )


def _movers(
    rig: GpuRig,
) -> Iterator[tuple[str, Callable[[], contextlib.AbstractContextManager[Mover]]]]:
    """Yield every way to offload, by name."""
    for size in (_ENGINE_BYTES, _SMALL_BYTES):
        yield f"copy-engine.{size_name(size)}", partial(_by_engine, rig, size)
    if rig.why_not("staged"):
        return
    small = paged(_SMALL_BYTES, rig.total_bytes)
    for ctas in (4, 16, int(str(rig.info["multiprocessors"]))):
        name = f"{size_name(_SMALL_BYTES)}.{ctas}-ctas"
        yield f"staged.{name}", partial(_by_staging, rig, ctas)
        yield (
            f"kernel.{name}",
            partial(KernelMover.open, rig, small, ctas),
        )


@contextlib.contextmanager
def _by_engine(rig: GpuRig, run_bytes: int) -> Iterator[Mover]:
    with batching(rig) as copies:
        yield CopiesMover(rig, copies, paged(run_bytes, rig.total_bytes))


@contextlib.contextmanager
def _by_staging(rig: GpuRig, ctas: int) -> Iterator[Mover]:
    with rig.copies(sm="auto", ctas=ctas, calibration=forcing("staged")) as copies:
        yield CopiesMover(rig, copies, paged(_SMALL_BYTES, rig.total_bytes))


def _row(key: str, measured: _Measured, alone_us: float, plain: float) -> Row:
    slower = 100 * (measured.product_us / alone_us - 1)
    return Row(
        key,
        gb_per_s=measured.gb_per_s,
        limit=plain,
        ratio=measured.gb_per_s / plain,
        cpu_s_per_gb=measured.cpu_s_per_gb,
        p50_us=measured.product_us,
        note=f"product {slower:+.1f} % ({alone_us:.1f} us alone), "
        f"{slower / max(measured.gb_per_s, 1e-9):+.3f} % per GB/s; CPU includes launching it",
    )
