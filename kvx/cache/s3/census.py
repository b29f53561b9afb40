"""What a bucket holds, counted by namespace, and whether every block of it is right.

What `kvx inspect s3://...` shows. Counting needs names alone, so a listing is all it costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from kvx.cache.s3.format import HEADER_BYTES, decode_frames, read_footer, read_header
from kvx.cache.s3.names import FORMAT_VERSION, parse_name, version_of
from kvx.cache.s3.sweep import Tally
from kvx.errors import CorruptBlock
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.cache.s3.header import Header
    from kvx.cache.s3.inventory import Inventory
    from kvx.cache.s3.keyring import Keyring
    from kvx.cache.s3.store import ObjectFacts

# Names are made up by whoever may write to the bucket: memory is bounded all the same.
NAMESPACES_MAX: Final = 10_000
_WINDOW_BYTES: Final = 8 << 20


@dataclass(slots=True)
class Holding:
    """The objects of one namespace.

    Attributes:
        sample: One of them.
        objects: How many, and their bytes.
        num_blocks: Blocks in them, by their names.
        oldest_s: Unix time of the oldest.
        newest_s: Unix time of the newest.
    """

    sample: ObjectFacts
    objects: Tally = field(default_factory=Tally)
    num_blocks: int = 0
    oldest_s: float = float("inf")
    newest_s: float = 0.0


@dataclass(slots=True)
class Census:
    """What was listed so far.

    Attributes:
        prefix: Below which.
        holdings: By public id, NAMESPACES_MAX of them.
        other_namespaces: Objects of further namespaces.
        other_versions: Objects that are named as of other format versions.
        foreign: Objects that kvx has no part in.
    """

    prefix: str
    holdings: dict[bytes, Holding] = field(default_factory=dict)
    other_namespaces: Tally = field(default_factory=Tally)
    other_versions: Tally = field(default_factory=Tally)
    foreign: Tally = field(default_factory=Tally)

    def add(self, facts: ObjectFacts) -> bool:
        """Count one object; returns whether it is one of this version's."""
        name = parse_name(self.prefix, facts.name)
        if name is None:
            version = version_of(self.prefix, facts.name)
            is_other = version not in (None, FORMAT_VERSION)
            (self.other_versions if is_other else self.foreign).add(facts.size_bytes)
            return False
        holding = self.holdings.get(name.public_id)
        if holding is None:
            if len(self.holdings) >= NAMESPACES_MAX:
                self.other_namespaces.add(facts.size_bytes)
                return True
            holding = self.holdings[name.public_id] = Holding(facts)
        holding.objects.add(facts.size_bytes)
        holding.num_blocks += name.num_blocks
        holding.oldest_s = min(holding.oldest_s, facts.modified_s)
        holding.newest_s = max(holding.newest_s, facts.modified_s)
        return True


@dataclass(frozen=True, slots=True)
class Verification:
    """What became of reading an object whole.

    Attributes:
        num_right: Blocks that are what they should be.
        num_damaged: Blocks that are not.
        num_sealed: Blocks that cannot be judged, for want of the key they are sealed with.
    """

    num_right: int = 0
    num_damaged: int = 0
    num_sealed: int = 0


async def verify(
    inventory: Inventory, facts: ObjectFacts, header: Header, keyring: Keyring
) -> Verification:
    """Read every block of an object and verify it; holds 8 MiB of it, or one block, at a time.

    Args:
        inventory: The bucket.
        facts: The object, which `Inventory.judge` found good or expired.
        header: Its header.
        keyring: For sealed objects; without the right key they cannot be judged.

    Raises:
        ObjectError: It could not be read.
    """
    shape = header.shape
    sealer = keyring.by_id(header.seal_id) if shape.is_sealed else None
    if shape.is_sealed and sealer is None:
        return Verification(num_sealed=shape.num_blocks)
    try:
        footer = read_footer(await inventory.read(facts, *shape.footer_span), facts.name)
    except CorruptBlock:
        return Verification(num_damaged=shape.num_blocks)
    window = min(shape.num_blocks, max(1, _WINDOW_BYTES // shape.frame_bytes))
    memory = np.empty((window, shape.block_bytes), np.uint8)
    num_right = 0
    for first in range(0, shape.num_blocks, window):
        count = min(window, shape.num_blocks - first)
        found = await inventory.read(facts, *shape.span(first, count))
        codes, _ = decode_frames(
            shape, found, first=first, keys=footer.keys[first : first + count],
            addresses=_addresses(memory[:count]), sealer=sealer,
            name=facts.name,
        )  # fmt: skip
        num_right += int((codes == Code.OK).sum())
    return Verification(num_right=num_right, num_damaged=shape.num_blocks - num_right)


async def header_of(inventory: Inventory, facts: ObjectFacts) -> Header:
    """Return the header of an object, as `read_header`.

    Raises:
        ObjectError: It could not be read.
        CorruptBlock: It is damaged.
        IncompatibleError: Another version of the format wrote it.
    """
    size_bytes = min(HEADER_BYTES, facts.size_bytes)
    return read_header(await inventory.read(facts, 0, size_bytes), facts.name)


def _addresses(memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    return memory.ctypes.data + np.arange(len(memory), dtype=np.int64) * memory.strides[0]
