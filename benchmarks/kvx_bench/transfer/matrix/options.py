"""The options of a matrix, as they are typed and as they are meant."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

from kvx.errors import UsageError
from kvx_bench.transfer.baselines.work import Work
from kvx_bench.transfer.pair.memory import KINDS
from kvx_bench.transfer.sizes import parse_size, parse_sizes

if TYPE_CHECKING:
    import argparse

_OPS = ("read", "write")
_MEMORIES = (*KINDS, *(f"{ours}:{theirs}" for ours, theirs in permutations(KINDS, 2)))
_LISTEN = "0.0.0.0:7411"
_DEFAULT_SIZES = "4KiB..64MiB"
_BATCH_BYTES = 128 << 20
_BATCH_MAX = 1024
_DURATION_S = 1.0
_WARM_UP = 3
# Any of these asks for a matrix instead of the standard rows.
_ASKING = (
    "backends", "block_sizes", "batch", "ops", "memory", "check", "csv", "plot", "listen",
    "connect", "duration", "iterations", "warmup",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of a matrix.

    Attributes:
        backend: The way.
        memory: Where both sides' memory is, or INITIATOR:TARGET.
        work: What is moved.
    """

    backend: str
    memory: str
    work: Work

    @property
    def kinds(self) -> tuple[str, str]:
        """Where the initiator's and the target's memory is."""
        ours, _, theirs = self.memory.partition(":")
        return ours, theirs or ours


@dataclass(frozen=True, slots=True)
class MatrixOptions:
    """What to measure and where to tell it.

    Attributes:
        cells: In the order in which they are measured.
        copy_threads: Of each agent; 0 for its default.
        is_checking: Whether every byte of every iteration is looked at.
        duration_s: Seconds a cell takes, where `iterations` does not count.
        iterations: Runs of a cell; None for as many as fit.
        warmup: Runs before those that count.
        connect: Address of a target elsewhere; empty for one that is started here.
        key: Secret of both agents; None for none.
        driver: Library of CUDA's.
        nixl_python: A Python that has NIXL; None for this one.
        json: File for the figures, with the machine they are of.
        csv: File for the figures as a table.
        plot: File for a picture of them.
    """

    cells: tuple[Cell, ...]
    copy_threads: int
    is_checking: bool
    duration_s: float
    iterations: int | None
    warmup: int
    connect: str
    key: bytes | None
    driver: str
    nixl_python: Path | None
    json: Path | None
    csv: Path | None
    plot: Path | None

    @property
    def num_bytes(self) -> int:
        """Memory that the largest cell needs on each side."""
        return max(cell.work.num_bytes for cell in self.cells)

    @property
    def backends(self) -> tuple[str, ...]:
        """The ways, each once."""
        return tuple(dict.fromkeys(cell.backend for cell in self.cells))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    group = parser.add_argument_group(
        "transfer", "with any of these, `transfer` measures a matrix instead of its standard rows"
    )
    group.add_argument("--backends", metavar="A,B", help="ways to measure: shm,tcp,nixl")
    group.add_argument(
        "--block-sizes", metavar="SIZES", help=f"such as 4KiB,2MiB or {_DEFAULT_SIZES} (default)"
    )
    group.add_argument("--batch", metavar="N,M", help="blocks of one transfer")
    group.add_argument("--ops", metavar="OPS", help="read,write")
    group.add_argument(
        "--memory", metavar="KINDS", help="host,device, or device:host for each side"
    )
    group.add_argument(
        "--check", action="store_true", help="look at every byte of every iteration; exit 1 if one"
        " is wrong"
    )  # fmt: skip
    group.add_argument("--duration", type=float, metavar="S", help="seconds for each line")
    group.add_argument("--iterations", type=int, metavar="N", help="transfers for each line")
    group.add_argument("--warmup", type=int, metavar="N", help="transfers before those that count")
    group.add_argument("--csv", type=Path, metavar="FILE", help="write the lines there")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw them: .png, .svg or .pdf")
    group.add_argument(
        "--listen", nargs="?", const=_LISTEN, metavar="HOST:PORT",
        help=f"be the target of a --connect on another host (default {_LISTEN})",
    )  # fmt: skip
    group.add_argument("--connect", metavar="HOST:PORT", help="measure against a --listen there")
    group.add_argument(
        "--key-file", type=Path, metavar="FILE", help="secret that both sides share, 16 bytes or"
        " more"
    )  # fmt: skip
    group.add_argument(
        "--memory-max", default="4GiB", metavar="SIZE", help="most memory that --listen lends"
    )


def is_asked(options: argparse.Namespace) -> bool:
    """Return whether a matrix is asked for."""
    values = (getattr(options, name) for name in _ASKING)
    # 0 warm-ups ask for a matrix, too: not what equals False, but what was left out.
    return any(value is not None and value is not False for value in values)


def parse(options: argparse.Namespace) -> MatrixOptions:
    """Return what was typed.

    Raises:
        UsageError: A value is malformed; says what is accepted.
    """
    sizes = parse_sizes(options.block_sizes or _DEFAULT_SIZES)
    default = "tcp" if options.connect else "shm,tcp"
    backends = _names(options.backends or default, "--backends")
    ops = _chosen(options.ops or "read,write", _OPS, "--ops")
    memories = _chosen(options.memory or "host", _MEMORIES, "--memory")
    batches = _counts(options.batch)
    cells = tuple(
        Cell(backend, memory, Work(op == "write", size, batch))
        for backend in backends
        for memory in memories
        for op in ops
        for size in sizes
        for batch in batches or (_batch_of(size),)
    )
    if options.warmup is not None and options.warmup < 0:
        raise UsageError(f"--warmup {options.warmup}: 0 or more")
    return MatrixOptions(
        cells,
        copy_threads=options.threads or 0,
        is_checking=options.check,
        duration_s=_positive(options.duration, "--duration", _DURATION_S),
        iterations=None
        if options.iterations is None
        else int(_positive(options.iterations, "--iterations", 1)),
        warmup=_WARM_UP if options.warmup is None else options.warmup,
        connect=with_scheme(options.connect) if options.connect else "",
        key=read_key(options.key_file),
        driver=options.driver,
        nixl_python=options.nixl_python,
        json=options.json,
        csv=options.csv,
        plot=options.plot,
    )


def with_scheme(address: str) -> str:
    """Return an address as agents take it."""
    return address if "://" in address or address.startswith("unix:") else f"tcp://{address}"


def read_key(path: Path | None) -> bytes | None:
    """Return the secret in a file, without the line's end.

    Raises:
        UsageError: It cannot be read.
    """
    if path is None:
        return None
    try:
        return path.read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise UsageError(
            f"--key-file {path}: {error.strerror}; make one with `openssl rand -hex 32 > {path}` "
            "and copy it to the other host"
        ) from error


def listener_bytes(text: str) -> int:
    """Return what --memory-max says."""
    return parse_size(text)


def _batch_of(size: int) -> int:
    return max(1, min(_BATCH_MAX, _BATCH_BYTES // size))


def _names(text: str, option: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(names):
        raise UsageError(f"{option} {text!r}: names, separated by commas")
    return names


def _chosen(text: str, accepted: tuple[str, ...], option: str) -> tuple[str, ...]:
    names = _names(text, option)
    wrong = [name for name in names if name not in accepted]
    if wrong:
        raise UsageError(f"{option} {wrong[0]!r}; accepted: {', '.join(accepted)}")
    return names


def _counts(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    names = _names(text, "--batch")
    if not all(name.isascii() and name.isdigit() and int(name) > 0 for name in names):
        raise UsageError(f"--batch {text!r}: numbers of blocks, separated by commas")
    return tuple(int(name) for name in names)


def _positive(value: float | None, option: str, default: float) -> float:
    found = default if value is None else value
    if not found > 0:
        raise UsageError(f"{option} {value}: above 0")
    return found
