"""`kvx bench transfer` with options of a matrix: measures it, or is the target of another host."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import kvx
from kvx.errors import CorruptBlock, KvxError, UsageError
from kvx_bench.machine import describe_machine
from kvx_bench.transfer.baselines.limits import Limits, limits_of
from kvx_bench.transfer.links import link_lines
from kvx_bench.transfer.matrix import options as settings
from kvx_bench.transfer.matrix.figures import Figures, absent
from kvx_bench.transfer.matrix.measure import measure
from kvx_bench.transfer.matrix.plot import check_possible, draw
from kvx_bench.transfer.matrix.report import absences, table_of, write_csv, write_json
from kvx_bench.transfer.pair.opening import PairOptions, connect_pair, open_pair
from kvx_bench.transfer.pair.target import Target

if TYPE_CHECKING:
    import argparse

    from rich.console import Console

    from kvx_bench.transfer.baselines.work import Baseline, Work
    from kvx_bench.transfer.matrix.options import Cell, MatrixOptions
    from kvx_bench.transfer.pair.pair import Pair

_REFRESHES_PER_S = 4


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure a matrix or listen; 1 when a byte was wrong or nothing could be measured."""
    if options.listen is not None:
        return _listen(options, console)
    wanted = settings.parse(options)
    if wanted.plot is not None:
        check_possible(wanted.plot)
    lines: list[Figures] = []
    wrong = ""
    try:
        _measure_all(wanted, console, lines)
    except CorruptBlock as error:
        wrong = str(error)
    console.print(table_of(lines))
    for text in [*absences(lines), *link_lines(wanted.driver)]:
        console.print(f"[dim]{text}[/]", soft_wrap=True)
    _write(wanted, lines, console)
    if wrong:
        console.print(f"[red]wrong bytes:[/] {wrong}", soft_wrap=True)
    return 1 if wrong or not any(not line.absent for line in lines) else 0


def _measure_all(wanted: MatrixOptions, console: Console, lines: list[Figures]) -> None:
    """Append a line for each cell, also of those before a byte was wrong."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        # Drawing takes CPU from what is measured.
        refresh_per_second=_REFRESHES_PER_S,
    )
    with Bench(wanted) as bench, bar:
        task = bar.add_task("", total=len(wanted.cells))
        for cell in wanted.cells:
            bar.update(task, description=f"{cell.backend}, {cell.work}{_latest(lines)}")
            lines.append(bench.line(cell))
            bar.advance(task)


def _latest(lines: list[Figures]) -> str:
    rate = lines[-1].gb_per_s if lines else None
    return "" if rate is None else f" (the last one: {rate:.2f} GB/s)"


class Bench:
    """Pairs that are opened when the first cell needs them, and baselines beside them."""

    def __init__(self, wanted: MatrixOptions) -> None:
        self._wanted = wanted
        self._made = contextlib.ExitStack()
        self._pairs: dict[str, Pair | str] = {}
        self._mapped: dict[str, str] = {}
        self._baselines: dict[str, Baseline] = {}

    def __enter__(self) -> Self:
        """Start what limits are measured with; between two hosts there are none."""
        wanted = self._wanted
        if not wanted.connect and not wanted.is_checking:
            limits = self._made.enter_context(
                Limits(wanted.num_bytes, nixl_python=wanted.nixl_python)
            )
            self._baselines = {one.name: one for one in limits.baselines}
        return self

    def __exit__(self, *exception: object) -> None:
        """End every process."""
        self._made.close()

    def line(self, cell: Cell) -> Figures:
        """Return the figures of a cell, or why it has none.

        Raises:
            CorruptBlock: Bytes are wrong.
        """
        pair = self._pair(cell.backend)
        if isinstance(pair, str):
            return absent(cell, pair)
        try:
            if self._mapped.get(cell.backend) != cell.memory:
                self._mapped.pop(cell.backend, None)
                pair.map(self._wanted.num_bytes, *cell.kinds)
                self._mapped[cell.backend] = cell.memory
            return measure(pair, cell, self._limit(cell.backend, cell.work), self._wanted)
        except CorruptBlock:
            raise
        except KvxError as error:
            return absent(cell, str(error))

    def _pair(self, backend: str) -> Pair | str:
        """Return the pair of a backend, or why there is none."""
        wanted = self._wanted
        name = "" if wanted.connect else backend
        if backend == "local":
            return "it moves memory within one process: nothing to measure between two"
        if name not in self._pairs:
            options = PairOptions(
                wanted.copy_threads, wanted.driver, wanted.key,
                wanted.nixl_python if backend == "nixl" else None,
            )  # fmt: skip
            try:
                opened = (
                    connect_pair(wanted.connect, options)
                    if wanted.connect
                    else open_pair(backend, options)
                )
                self._pairs[name] = self._made.enter_context(opened)
            except KvxError as error:
                self._pairs[name] = str(error)
        return self._pairs[name]

    def _limit(self, backend: str, work: Work) -> Baseline | None:
        for name in limits_of(backend, work.block_bytes):
            baseline = self._baselines.get(name)
            if baseline is not None and not baseline.why_not(work):
                return baseline
        return None


def _write(wanted: MatrixOptions, lines: list[Figures], console: Console) -> None:
    if wanted.json is not None:
        write_json(wanted.json, describe_machine(wanted.driver), lines)
    if wanted.csv is not None:
        write_csv(wanted.csv, lines)
    if wanted.plot is not None:
        draw(wanted.plot, lines)
    for path in filter(None, (wanted.json, wanted.csv, wanted.plot)):
        console.print(f"wrote {path}")


def _listen(options: argparse.Namespace, console: Console) -> int:
    address = settings.with_scheme(options.listen)
    key = settings.read_key(options.key_file)
    try:
        agent = kvx.Agent("bench-target", listen=address, key=key, config={"unix": False})
    except UsageError as error:
        raise UsageError(f"{error} (here: --key-file FILE, or --listen 127.0.0.1:PORT)") from error
    target = Target(
        agent, driver=options.driver, bytes_max=settings.listener_bytes(options.memory_max)
    )
    console.print(f"listening at {', '.join(agent.addresses)}; end it with Ctrl-C")
    with contextlib.closing(target):
        target.serve(lambda text: console.print(text, soft_wrap=True))
    return 0
