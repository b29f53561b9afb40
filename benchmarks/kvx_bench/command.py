"""`kvx bench NAME`: run benchmarks, show a table, write JSON."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kvx.errors import UsageError
from kvx_bench.case import DRIVER, Options
from kvx_bench.cases.checksum import ChecksumCase
from kvx_bench.cases.dram import DramCase
from kvx_bench.cases.gpu import GpuCase
from kvx_bench.cases.index import IndexCase
from kvx_bench.cases.nvme import NvmeCase
from kvx_bench.cases.peer import PeerCase
from kvx_bench.cases.plan import PlanCase
from kvx_bench.cases.s3 import S3Case
from kvx_bench.cases.transfer import TransferCase
from kvx_bench.cases.vllm import VllmCase
from kvx_bench.machine import describe_machine
from kvx_bench.transfer.matrix import command as matrix_command
from kvx_bench.transfer.matrix import options as matrix

if TYPE_CHECKING:
    import argparse

    from kvx_bench.case import Case
    from kvx_bench.row import Row

_WIDTH_MIN = 170

HELP = "measure this machine and kvx on it; every row beside its limit"

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        ChecksumCase(),
        IndexCase(),
        PlanCase(),
        DramCase(),
        TransferCase(),
        PeerCase(),
        NvmeCase(),
        S3Case(),
        GpuCase(),
        VllmCase(),
    )
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("name", choices=[*CASES, "all"], help="which benchmark")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--quick", action="store_true", help="smaller sizes: within 20 s, s3 40 s")
    parser.add_argument("--path", type=Path, help="directory on the disk to measure")
    parser.add_argument("--threads", type=int, help="copy threads; one a CPU by default")
    parser.add_argument(
        "--nixl-python", type=Path, metavar="PYTHON", help="one that imports nixl_cu13: transfers"
    )
    parser.add_argument(
        "--vllm-python", type=Path, metavar="PYTHON", help="one that imports vLLM: vllm"
    )
    parser.add_argument("--driver", default=DRIVER, help="library of the CUDA driver to measure")
    group = parser.add_argument_group("s3", "against which service; keys come from AWS_* variables")
    group.add_argument("--endpoint", default="", metavar="URL", help="one that runs; else Ceph RGW")
    group.add_argument("--region", default="us-east-1", help="as the service calls it")
    group.add_argument("--bucket", default="", help="one that exists there; else one is made")
    group.add_argument("--concurrency", type=int, default=16, metavar="N", help="requests")
    matrix.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Run what was asked for; 1 if a benchmark asked for by its name could not run."""
    console = Console()
    # A table that is cut off is worth less than one that wraps in a narrow window.
    console.width = max(console.width, _WIDTH_MIN)
    if matrix.is_asked(options):
        if options.name != TransferCase.name:
            raise UsageError(f"{options.name} takes no options of `kvx bench transfer`")
        return matrix_command.run(options, console)
    names = list(CASES) if options.name == "all" else [options.name]
    load_before = os.getloadavg()[0]
    rows: list[Row] = []
    skipped = 0
    with tempfile.TemporaryDirectory(prefix="kvx-bench-", dir=options.path or ".") as directory:
        threads = options.threads or os.cpu_count() or 1
        settings = Options(
            options.quick, Path(directory), threads, options.driver, options.nixl_python,
            options.endpoint, options.region, options.bucket, options.concurrency,
            options.vllm_python,
        )  # fmt: skip
        for name in names:
            case = CASES[name]
            reason = case.why_not(settings)
            if reason:
                console.print(f"[yellow]{name} not here because[/] {reason}")
                skipped += 1
                continue
            with console.status(f"{name}: {case.description}") as status:
                for row in case.run(settings):
                    rows.append(row)
                    status.update(f"{name}: {row.key} done")
    console.print(_table(rows))
    for row in rows:
        remarks = [*(f"{ratio:.2f} x {name}" for name, ratio in row.ratios.items()), row.note]
        if any(remarks):
            told = "; ".join(filter(None, remarks))
            console.print(f"[dim]{row.key}: {told}[/]", soft_wrap=True)
    if options.json is not None:
        machine = describe_machine(options.driver) | {"load_before": load_before}
        report = {"machine": machine, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"wrote {options.json}")
    return 1 if skipped and options.name != "all" else 0


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("key", no_wrap=True)
    for heading in ("GB/s", "M/s", "limit", "ratio", "CPU s/GB", "p50 us", "p99 us"):
        table.add_column(heading, justify="right", no_wrap=True)
    # What few benchmarks have.
    has_shares = any(row.cpu_share is not None for row in rows)
    has_names = any(row.limit_name for row in rows)
    if has_shares:
        table.add_column("CPU %", justify="right", no_wrap=True)
    if has_names:
        table.add_column("limit is", no_wrap=True)
    for row in rows:
        limit = row.limit if row.per_s is None or row.limit is None else row.limit / 1e6
        table.add_row(
            row.key,
            _number(row.gb_per_s),
            _number(None if row.per_s is None else row.per_s / 1e6),
            _number(limit),
            _number(row.ratio),
            _number(row.cpu_s_per_gb, 3),
            _number(row.p50_us, 1),
            _number(row.p99_us, 1),
            *([_number(None if row.cpu_share is None else row.cpu_share * 100)] * has_shares),
            *([row.limit_name] * has_names),
        )
    return table


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
