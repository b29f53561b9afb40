"""`kvx doctor`: what this machine offers, what it does not, why, and how to get it."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvx.cli.finding import Finding
from kvx.cli.gpu import gpu_findings
from kvx.cli.peers import peer_findings
from kvx.cli.s3 import s3_findings
from kvx.config import CacheConfig, cache_directory
from kvx_ext import _core

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

HELP = "tell what this machine offers, why not more, and how to get it"

_REGISTERED_BYTES_WANTED = 64 << 20
# A name of its own, so that tests can put other devices here.
list_devices = _core.list_cuda_devices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--path", default=".", help="directory an NVMe tier would live in")
    parser.add_argument(
        "--config",
        help="configuration of a cache (YAML or TOML): its peers and its bucket are tried",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """Print the findings; 0 whatever they are, because kvx works with fewer of them."""
    config = None if options.config is None else CacheConfig.load(options.config)
    findings = list(examine(_nearest_there(Path(options.path).absolute()), config))
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
        return 0
    table = Table(title="kvx doctor", title_justify="left")
    for column in ("", "what", "found", "to get more"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = "[green]ok[/]" if finding.is_good else "[yellow]--[/]"
        table.add_row(mark, *map(escape, (finding.subject, finding.found, finding.remedy)))
    Console().print(table)
    return 0


def examine(path: Path, config: CacheConfig | None = None) -> Iterator[Finding]:
    """Look at everything kvx can make use of."""
    yield _checksum()
    yield _cpus()
    yield _huge_pages()
    yield _io_uring()
    yield _locked_memory()
    yield _direct_io(path)
    yield _disk(path)
    yield from gpu_findings(list_devices, cache_directory())
    yield from peer_findings(config)
    yield from s3_findings(config)
    for package, purpose in _EXTRAS.items():
        yield _extra(package, purpose)


_EXTRAS = {
    "tokenizers": "models with their own tokenizer in the reference engine (kvx[server])",
    "aiofiles": "the aiofiles row of the NVMe benchmark (kvx[bench])",
}


def _nearest_there(path: Path) -> Path:
    """Return the directory, or where it would be made: a tier makes its own when it is opened."""
    return next(one for one in (path, *path.parents) if one.is_dir())


def _checksum() -> Finding:
    kernels = _core.checksum_kernels()
    if kernels[0] == "portable":
        return Finding(
            "checksums",
            is_good=False,
            found=f"portable code on {platform.machine()}",
            remedy="a CPU with carry-less multiplication (x86-64 from 2010 on)",
        )
    return Finding("checksums", is_good=True, found=f"{kernels[0]}, of {', '.join(kernels)}")


def _cpus() -> Finding:
    nodes = _core.numa_node_count()
    return Finding(
        "CPUs", is_good=True, found=f"{len(os.sched_getaffinity(0))} usable, {nodes} NUMA node(s)"
    )


def _huge_pages() -> Finding:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    mode = setting.read_text().split("[")[1].split("]")[0] if setting.exists() else "absent"
    is_good = mode in ("always", "madvise")
    remedy = "" if is_good else f"echo madvise > {setting}: faster copies and cheaper disk I/O"
    return Finding("huge pages", is_good=is_good, found=mode, remedy=remedy)


def _io_uring() -> Finding:
    reason = _core.probe_io_uring()
    if not reason:
        return Finding("io_uring", is_good=True, found="works")
    return Finding(
        "io_uring",
        is_good=False,
        found=f"no: {reason}; a thread pool takes over",
        remedy="allow the io_uring system calls (containers: the seccomp profile)",
    )


def _locked_memory() -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    is_privileged = os.geteuid() == 0
    unlimited = limit == resource.RLIM_INFINITY or is_privileged
    found = "no limit" if unlimited else f"{limit} bytes"
    is_good = unlimited or limit >= _REGISTERED_BYTES_WANTED
    remedy = "" if is_good else "ulimit -l unlimited: lets io_uring keep buffers registered"
    return Finding("locked memory", is_good=is_good, found=found, remedy=remedy)


def _direct_io(path: Path) -> Finding:
    probe = path / f".kvx-doctor-{os.getpid()}"
    try:
        fd = os.open(probe, os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600)
    except OSError as error:
        return Finding(
            "direct I/O",
            is_good=False,
            found=f"not in {path}: {error.strerror}",
            remedy="put the NVMe tier on ext4 or xfs; buffered I/O costs far more CPU",
        )
    os.close(fd)
    probe.unlink()
    return Finding("direct I/O", is_good=True, found=f"works in {path}")


def _disk(path: Path) -> Finding:
    usage = shutil.disk_usage(path)
    return Finding(
        "disk space", is_good=usage.free > 0, found=f"{usage.free / 2**30:.1f} GiB free in {path}"
    )


def _extra(package: str, purpose: str) -> Finding:
    is_here = find_spec(package) is not None
    remedy = "" if is_here else f"pip install {package}: {purpose}"
    return Finding(package, is_good=is_here, found="installed" if is_here else "no", remedy=remedy)
