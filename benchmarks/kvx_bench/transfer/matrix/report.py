"""A matrix as a table, as CSV and as JSON."""

from __future__ import annotations

import csv
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kvx_bench.transfer.matrix.figures import Figures
from kvx_bench.transfer.sizes import size_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path


def _number(digits: int) -> Callable[[float | None], str]:
    return lambda value: "" if value is None else f"{value:.{digits}f}"


# As nixlbench names them, and behind them what it has not got: heading, field, text.
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("op", "op", str),
    ("block", "block_bytes", size_name),
    ("batch", "batch", str),
    ("B/W GB/s", "gb_per_s", _number(2)),
    ("avg us", "avg_us", _number(1)),
    ("p50 us", "p50_us", _number(1)),
    ("p99 us", "p99_us", _number(1)),
    ("prep us", "prep_us", _number(0)),
    ("post us", "post_us", _number(1)),
    ("CPU s/GB", "cpu_s_per_gb", _number(3)),
    ("target's", "target_cpu_s_per_gb", _number(3)),
    ("limit", "limit_gb_per_s", _number(2)),
    ("ratio", "ratio", _number(2)),
    ("limit is", "limit_name", str),
)


def table_of(lines: Sequence[Figures]) -> Table:
    """Return the lines that have figures."""
    table = Table(box=None, pad_edge=False)
    table.add_column("backend", no_wrap=True)
    table.add_column("memory", no_wrap=True)
    for heading, _, _ in _COLUMNS:
        table.add_column(
            heading, justify="left" if heading == "limit is" else "right", no_wrap=True
        )
    for line in lines:
        if not line.absent:
            texts = [text(getattr(line, field)) for _, field, text in _COLUMNS]
            table.add_row(line.backend, line.memory, *texts)
    return table


def absences(lines: Iterable[Figures]) -> list[str]:
    """Return why lines have no figures, each reason once."""
    return list(
        dict.fromkeys(
            f"{line.backend}, {line.memory} memory: not here because {line.absent}"
            for line in lines
            if line.absent
        )
    )


def write_csv(path: Path, lines: Iterable[Figures]) -> None:
    """Write every line, those without figures included."""
    names = [field.name for field in dataclasses.fields(Figures)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(dataclasses.asdict(line) for line in lines)


def write_json(path: Path, machine: dict[str, object], lines: Iterable[Figures]) -> None:
    """Write every line, and what they were measured on."""
    report = {"machine": machine, "matrix": [dataclasses.asdict(line) for line in lines]}
    path.write_text(json.dumps(report, indent=1) + "\n")
