"""`kvx gc s3://BUCKET/PREFIX`: what of an S3 tier's objects is garbage, and its removal."""

from __future__ import annotations

import re
import sys
import time
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvx.cache.s3.inventory import Finding, Inventory, Verdict
from kvx.cache.s3.sweep import SweepRules, SweepTotals, sweep
from kvx.cli.bucket import add_bucket_arguments, bucket_config, with_inventory
from kvx.cli.figures import printable, seconds, size
from kvx.errors import UsageError

if TYPE_CHECKING:
    import argparse

HELP = "find expired, damaged and other useless objects of an S3 tier; --delete removes them"

_ID: Final = re.compile(r"[0-9a-f]{32}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("address", help="s3://BUCKET/PREFIX")
    parser.add_argument(
        "--delete", action="store_true", help="delete what is found; else it is only counted"
    )
    parser.add_argument(
        "--other-versions", action="store_true", help="objects of other format versions, too"
    )
    parser.add_argument(
        "--older-than", type=seconds, metavar="AGE", help="objects of that age, too: 90m, 12h, 30d"
    )
    parser.add_argument(
        "--namespace", default="", metavar="ID", help="of one namespace only, as inspect shows it"
    )
    parser.add_argument("--names", action="store_true", help="print each object that is garbage")
    add_bucket_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Sweep; 0 whatever was found. Totals are printed even where a call has failed."""
    config = bucket_config(options.address, options)
    if options.namespace and not _ID.fullmatch(options.namespace):
        raise UsageError(f"{options.namespace!r} is no namespace; `kvx inspect` shows their ids")
    rules = SweepRules(
        now_s=time.time(),
        older_than_s=options.older_than,
        has_other_versions=options.other_versions,
        is_deleting=options.delete,
        public_id=bytes.fromhex(options.namespace),
    )
    totals = SweepTotals()
    try:
        with_inventory(config, lambda inventory: _sweep(inventory, rules, totals, options))
    finally:
        _print_totals(Console(), rules, totals)
    return 0


async def _sweep(
    inventory: Inventory, rules: SweepRules, totals: SweepTotals, options: argparse.Namespace
) -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # On the other stream, so that what is printed can be read by programs.
    progress = Progress(*columns, console=Console(file=sys.stderr), transient=True)
    with progress:
        task = progress.add_task("listing")

        def notify(finding: Finding) -> None:
            num_seen = sum(tally.num_objects for tally in totals.by_verdict.values())
            progress.update(
                task, description=f"{num_seen} objects, {totals.doomed.num_objects} garbage, "
                f"{totals.deleted.num_objects} deleted",
            )  # fmt: skip
            if options.names and rules.dooms(finding.verdict):
                facts, why = finding.facts, finding.why or finding.verdict
                print(printable(facts.name), facts.size_bytes, printable(why), sep="\t")

        await sweep(inventory, rules, totals, notify=notify)


def _print_totals(console: Console, rules: SweepRules, totals: SweepTotals) -> None:
    table = Table("", "objects", "bytes", "")
    for verdict, tally in totals.by_verdict.items():
        if tally.num_objects:
            is_doomed = rules.dooms(verdict)
            note = "garbage" if is_doomed else _notes(verdict)
            table.add_row(escape(verdict), str(tally.num_objects), size(tally.size_bytes), note)
    if table.row_count:
        console.print(table)
    doomed, deleted = totals.doomed, totals.deleted
    if rules.is_deleting:
        console.print(f"{deleted.num_objects} objects deleted, {size(deleted.size_bytes)}")
        return
    console.print(
        f"{doomed.num_objects} objects are garbage, {size(doomed.size_bytes)}; nothing was deleted"
        + ("" if not doomed.num_objects else ": --delete does it")
    )


def _notes(verdict: Verdict) -> str:
    return "kept; --other-versions" if verdict is Verdict.OTHER_VERSION else ""
