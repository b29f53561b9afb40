"""A matrix as a picture: rate over block size, a line for each way and direction."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvx.errors import UnavailableError, UsageError
from kvx_bench.transfer.sizes import size_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvx_bench.transfer.matrix.figures import Figures

_INCHES = (9.0, 5.5)
_FORMATS = (".png", ".svg", ".pdf")


def check_possible(path: Path) -> None:
    """Find out before hours of measuring whether it can be drawn.

    Raises:
        UnavailableError: There is no matplotlib.
        UsageError: It is no picture that could be drawn.
    """
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"--plot {path}: its name ends in one of {', '.join(_FORMATS)}")
    _figure_class()


def draw(path: Path, lines: Sequence[Figures]) -> None:
    """Draw the lines that have figures, and as dashes what each is held against."""
    figure = _figure_class()(figsize=_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes of a block")
    axes.set_ylabel("GB/s")
    there = [line for line in lines if not line.absent]
    for name, series in _series(there).items():
        sizes = [line.block_bytes for line in series]
        (drawn,) = axes.plot(sizes, [line.gb_per_s for line in series], marker="o", label=name)
        limited = [line for line in series if line.limit_gb_per_s is not None]
        axes.plot(
            [line.block_bytes for line in limited],
            [line.limit_gb_per_s for line in limited],
            linestyle="--",
            alpha=0.5,
            color=drawn.get_color(),
        )
    sizes = sorted({line.block_bytes for line in there})
    axes.set_xticks(sizes, [size_name(size) for size in sizes], rotation=45)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    if there:
        axes.legend(title="dashed: what it is held against")
    figure.savefig(path)


def _series(lines: Sequence[Figures]) -> dict[str, list[Figures]]:
    """Return the lines of each way, by size; of several batches the largest rate."""
    found: dict[str, dict[int, Figures]] = {}
    for line in lines:
        memory = "" if line.memory == "host" else f" {line.memory}"
        best = found.setdefault(f"{line.backend} {line.op}{memory}", {})
        known = best.get(line.block_bytes)
        if known is None or (known.gb_per_s or 0.0) < (line.gb_per_s or 0.0):
            best[line.block_bytes] = line
    return {name: [best[size] for size in sorted(best)] for name, best in found.items()}


def _figure_class() -> Any:
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise UnavailableError(
            "--plot needs matplotlib: pip install 'kvx[bench]', or leave --plot out and draw "
            "what --csv writes"
        ) from error
