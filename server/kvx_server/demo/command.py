"""`kvx demo`: the parent process: starts the children, kills one, damages a file, shows a table."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live

from kvx_server.demo.board import Board
from kvx_server.demo.child import Report
from kvx_server.demo.damage import flip_one_bit_of_every_block

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

_LEGEND = (
    "recomp.: without a cache; growing: as the conversation goes on; DRAM, NVMe: the same prompt "
    "again, served from there; kill -9: by a new process after the old one was killed; damaged: "
    "after one bit of every block on disk was flipped"
)

HELP = "conversations over long text: KV from DRAM, from NVMe, after kill -9, and damaged"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--path", type=Path, help="directory on the disk to use")


def run(options: argparse.Namespace) -> int:
    """Run the demo; 1 if any token differs, or a way did not do what it is there to show."""
    console = Console()
    board = Board()
    with (
        tempfile.TemporaryDirectory(prefix="kvx-demo-", dir=options.path) as directory,
        Live(board.render(), console=console, refresh_per_second=8) as live,
    ):
        store = str(Path(directory) / "tier")

        def show(child: subprocess.Popen[str]) -> Iterator[str]:
            for message in _messages(child):
                if "stage" in message:
                    yield str(message["stage"])
                else:
                    board.add(Report(**message))  # type: ignore[arg-type]
                    live.update(board.render())

        with _child("first", store) as child:
            for _stage in show(child):
                # Ready: everything is on disk, the cache is open, nothing was closed in order.
                child.send_signal(signal.SIGKILL)
        with _child("restart", store) as child:
            list(show(child))
        flip_one_bit_of_every_block(Path(store))
        with _child("damaged", store) as child:
            list(show(child))
    problems = board.problems()
    for problem in problems:
        console.print(f"[red]{problem}[/]")
    answer, scrambled = board.samples()
    console.print()
    console.print(f"the last answer, from verified KV:      {answer!r}")
    console.print(f"from the same KV, damaged and unverified: {scrambled!r}")
    console.print(f"[dim]{_LEGEND}[/]")
    console.print(board.verdict(is_good=not problems))
    return 1 if problems else 0


def _child(stage: str, store: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kvx_server.demo.child", stage, store]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _messages(child: subprocess.Popen[str]) -> Iterator[dict[str, object]]:
    assert child.stdout is not None, "it was started with a pipe"
    for line in child.stdout:
        yield json.loads(line)
