"""What `kvx inspect s3://BUCKET/PREFIX` shows: namespaces, objects, and all blocks if asked."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from kvx.cache.s3.census import Census, Holding, Verification, header_of, verify
from kvx.cache.s3.inventory import Inventory, Verdict
from kvx.cache.s3.keyring import Keyring
from kvx.cache.s3.opening import open_keyring
from kvx.cache.s3.store import ObjectError
from kvx.cli.bucket import bucket_config, with_inventory
from kvx.cli.figures import printable, size, when
from kvx.errors import CorruptBlock, IncompatibleError

if TYPE_CHECKING:
    import argparse

    from kvx.cache.s3.store import ObjectFacts

# A header is read of each that is shown.
_NAMESPACES_SHOWN: Final = 100
_DAMAGE_SHOWN: Final = 20


@dataclass(slots=True)
class _Verified:
    """What became of reading everything: sums, and the first damaged objects with the reasons."""

    num_right: int = 0
    num_damaged: int = 0
    num_sealed: int = 0
    num_objects_damaged: int = 0
    reasons: list[str] = field(default_factory=list)

    def damage(self, facts: ObjectFacts, why: str) -> None:
        """Note a damaged object."""
        self.num_objects_damaged += 1
        if len(self.reasons) < _DAMAGE_SHOWN:
            self.reasons.append(printable(f"{facts.name}: {why}"))

    def add(self, facts: ObjectFacts, found: Verification) -> None:
        """Note an object whose header is right."""
        self.num_right += found.num_right
        self.num_damaged += found.num_damaged
        self.num_sealed += found.num_sealed
        if found.num_damaged:
            self.damage(facts, f"{found.num_damaged} of its blocks are damaged")


def inspect_bucket(options: argparse.Namespace) -> int:
    """Describe a bucket; with --verify, 1 if anything in it is damaged."""
    config = bucket_config(options.path, options)
    # Only who verifies needs keys.
    keyring = open_keyring(config) if options.verify else Keyring({})
    census, verified = Census(config.prefix), _Verified()
    console = Console()

    async def work(inventory: Inventory) -> None:
        await _count(inventory, census, verified if options.verify else None, keyring)
        console.print(f"[bold]s3://{escape(config.bucket)}/{escape(config.prefix)}[/]")
        console.print(await _namespaces(inventory, census))

    with_inventory(config, work)
    _print_others(console, census)
    if not options.verify:
        return 0
    for reason in verified.reasons:
        console.print(f"[red]{escape(reason)}[/]")
    console.print(
        f"{verified.num_right + verified.num_damaged} blocks read, {verified.num_damaged} damaged; "
        f"{verified.num_objects_damaged} objects damaged"
    )
    if verified.num_sealed:
        console.print(
            f"{verified.num_sealed} blocks are sealed with a key that is not here: they were not "
            "read; --seal-key-file or --seal-key-env gives it"
        )
    return 1 if verified.num_objects_damaged else 0


async def _count(
    inventory: Inventory, census: Census, verified: _Verified | None, keyring: Keyring
) -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    now_s = time.time()

    async def read_whole(facts: ObjectFacts) -> None:
        assert verified is not None
        finding = await inventory.judge(facts, now_s=now_s)
        if finding.header is not None:
            verified.add(facts, await verify(inventory, facts, finding.header, keyring))
        elif finding.verdict is Verdict.DAMAGED:
            verified.damage(facts, finding.why)

    # On the other stream, so that what is printed can be read by programs.
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task, num_seen = progress.add_task("listing"), 0
        async for page in inventory.pages():
            ours = [facts for facts in page if census.add(facts)]
            num_seen += len(page)
            progress.update(task, description=f"{num_seen} objects")
            if verified is not None:
                await inventory.over(ours, read_whole)


async def _namespaces(inventory: Inventory, census: Census) -> Table:
    # An id is what `kvx gc --namespace` takes: it has to be there whole.
    id_column = Column("namespace", no_wrap=True, min_width=32)
    table = Table(id_column, "objects", "blocks", "bytes", "a block", "oldest", "newest")
    ranked = sorted(census.holdings.items(), key=lambda one: -one[1].objects.size_bytes)
    for public_id, holding in ranked[:_NAMESPACES_SHOWN]:
        table.add_row(
            public_id.hex(),
            str(holding.objects.num_objects),
            str(holding.num_blocks),
            size(holding.objects.size_bytes),
            await _block_of(inventory, holding),
            when(holding.oldest_s),
            when(holding.newest_s),
        )
    return table


async def _block_of(inventory: Inventory, holding: Holding) -> str:
    """Return what a block of a namespace is, by the header of one object."""
    try:
        shape = (await header_of(inventory, holding.sample)).shape
    except (CorruptBlock, IncompatibleError, ObjectError) as error:
        return f"[red]{escape(type(error).__name__)}[/]"
    return size(shape.block_bytes) + (", sealed" if shape.is_sealed else "")


def _print_others(console: Console, census: Census) -> None:
    further = len(census.holdings) - _NAMESPACES_SHOWN
    if further > 0:
        console.print(f"and {further} namespaces that hold less")
    for tally, what in (
        (census.other_namespaces, "of further namespaces, not counted one by one"),
        (census.other_versions, "of other format versions"),
        (census.foreign, "that are not kvx's"),
    ):
        if tally.num_objects:
            console.print(f"{tally.num_objects} objects {what}, {size(tally.size_bytes)}")
