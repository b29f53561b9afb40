"""Entry point of the `kvx` command.

A verb is a module with `add_arguments(parser)` and `run(options) -> int`. Those of this package are
listed here; other packages add theirs through the entry point group `kvx.commands`, so that `kvx`
itself imports neither the benchmarks nor the server.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import sys
from typing import TYPE_CHECKING, Protocol

import kvx
from kvx.errors import KvxError

if TYPE_CHECKING:
    from collections.abc import Sequence

_OWN_VERBS = {
    "doctor": "kvx.cli.doctor",
    "gc": "kvx.cli.gc",
    "inspect": "kvx.cli.inspect",
}
_GROUP = "kvx.commands"
_EXIT_FAILED = 1
_EXIT_INTERRUPTED = 130


class Verb(Protocol):
    """What a module of a verb offers."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options of the verb."""

    def run(self, options: argparse.Namespace) -> int:
        """Do it; returns the exit code."""


def verbs() -> dict[str, Verb]:
    """Return every verb by name; one whose package is not complete is left out with a note."""
    found: dict[str, Verb] = {
        name: importlib.import_module(module) for name, module in _OWN_VERBS.items()
    }
    for entry in importlib.metadata.entry_points(group=_GROUP):
        try:
            found[entry.name] = entry.load()
        except ImportError as error:
            sys.stderr.write(f"kvx: the verb {entry.name!r} is not available: {error}\n")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="kvx", description="Moves and tiers the KV cache of language models."
    )
    parser.add_argument("--version", action="version", version=f"kvx {kvx.__version__}")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    known = verbs()
    for name, verb in sorted(known.items()):
        verb.add_arguments(commands.add_parser(name, help=verb.HELP, description=verb.HELP))
    options = parser.parse_args(arguments)
    try:
        return known[options.verb].run(options)
    except KvxError as error:
        sys.stderr.write(f"kvx {options.verb}: {error}\n")
        return _EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write(f"kvx {options.verb}: interrupted\n")
        return _EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
