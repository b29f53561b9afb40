"""Configuration of the tiers: one frozen dataclass a kind, and the list of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kvx.errors import ConfigError
from kvx.records import decode, prefixed, rejected, setting, validate

_LATER_KINDS = ("s3", "peer")


class Eviction(StrEnum):
    """Which block goes first when a tier is full."""

    LRU = "lru"
    LFU = "lfu"
    FIFO = "fifo"
    LFU_WITH_RECENCY = "lfu_with_recency"
    S3FIFO = "s3fifo"


class WriteMode(StrEnum):
    """When blocks are written to NVMe: at once, or when DRAM needs room."""

    THROUGH = "through"
    BACK = "back"


class Durability(StrEnum):
    """What has happened when a block counts as on NVMe.

    NONE: written; survives kill -9. BATCH: payloads and records synced, a group at a time; survives
    a power cut. EACH: as BATCH, and an offload is not done before that.
    """

    NONE = "none"
    BATCH = "batch"
    EACH = "each"


class Prefault(StrEnum):
    """When the pages of the DRAM tier are populated."""

    BACKGROUND = "background"
    EAGER = "eager"
    NEVER = "never"


class Emulation(StrEnum):
    """When host memory plays the device: where there is no GPU, always, or never."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class HbmTierConfig:
    """The HBM tier: blocks that stay in device memory.

    Attributes:
        capacity_bytes: Device memory it takes, no more.
        eviction: Which block goes first.
        promote: Whether blocks that are onboarded from lower tiers are kept here, too.
        emulation: When host memory plays the device.
        extent_bytes: Unit in which block sizes share the memory; None chooses.
    """

    capacity_bytes: int = setting(minimum=64 << 10)
    kind: str = "hbm"
    eviction: Eviction = Eviction.LRU
    promote: bool = True
    emulation: Emulation = Emulation.AUTO
    extent_bytes: int | None = setting(None, minimum=4096)

    def __post_init__(self) -> None:
        """Check every value."""
        validate(self)


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """Which blocks are worth writing to NVMe.

    Attributes:
        min_frequency: Times a block must have been offered before it is written; 1 for at once.
        bytes_per_day: Most bytes written a day; None for no limit.
    """

    min_frequency: int = setting(1, minimum=1, maximum=15)
    bytes_per_day: int | None = setting(None, minimum=1)

    def __post_init__(self) -> None:
        """Check every value."""
        validate(self)


@dataclass(frozen=True, slots=True)
class DramTierConfig:
    """The DRAM tier.

    Attributes:
        capacity_bytes: Memory it takes, no more.
        eviction: Which block goes first.
        prefault: When pages are populated; untouched ones make first copies many times slower.
        numa_node: Where the memory should lie; -1 leaves it to the kernel.
        extent_bytes: Unit in which block sizes share the memory; None chooses.
    """

    capacity_bytes: int = setting(minimum=64 << 10)
    kind: str = "dram"
    eviction: Eviction = Eviction.LRU
    prefault: Prefault = Prefault.BACKGROUND
    numa_node: int = setting(-1, minimum=-1, maximum=63)
    extent_bytes: int | None = setting(None, minimum=4096)

    def __post_init__(self) -> None:
        """Check every value."""
        validate(self)


@dataclass(frozen=True, slots=True)
class NvmeTierConfig:
    """The NVMe tier.

    Attributes:
        path: Its directory, for this cache alone.
        capacity_bytes: Most bytes its files take together.
        eviction: Which block goes first.
        write: When blocks are written.
        durability: What has happened when a block counts as written.
        admission: Which blocks are worth writing.
        rewarm: Whether the hottest blocks are brought into DRAM after opening.
        recreate: Whether a directory that cannot be used is rebuilt as empty.
        deadline_s: Most seconds a batch of writes may take.
        extent_bytes: Size of its files; None takes what the directory has, or chooses.
        queue_depth: Operations in the device at once.
    """

    path: Path
    capacity_bytes: int = setting(minimum=64 << 10)
    kind: str = "nvme"
    eviction: Eviction = Eviction.LFU_WITH_RECENCY
    write: WriteMode = WriteMode.THROUGH
    durability: Durability = Durability.BATCH
    admission: AdmissionConfig = AdmissionConfig()
    rewarm: bool = True
    recreate: bool = False
    deadline_s: float = setting(30.0, minimum=0.001)
    extent_bytes: int | None = setting(None, minimum=64 << 10)
    queue_depth: int = setting(64, minimum=1, maximum=4096)

    def __post_init__(self) -> None:
        """Check every value."""
        validate(self)


TierConfig = HbmTierConfig | DramTierConfig | NvmeTierConfig
_KINDS = {"hbm": HbmTierConfig, "dram": DramTierConfig, "nvme": NvmeTierConfig}


def decode_tiers(source: object) -> tuple[TierConfig, ...]:
    """Decode the list of tiers by their kind: from the top down, each at most once, one of DRAM.

    Raises:
        ConfigError: Names the entry, the key, and what is accepted.
    """
    if not isinstance(source, Sequence) or isinstance(source, str | bytes) or not source:
        raise ConfigError(f" is {source!r}, but a list of tiers is needed, one of kind dram")
    found = tuple(_tier(place, one) for place, one in enumerate(source))
    kinds = [tier.kind for tier in found]
    if "dram" not in kinds or kinds != [kind for kind in _KINDS if kind in kinds]:
        raise rejected("", kinds, "hbm, dram, nvme in this order, each at most once, with dram")
    return found


def _tier(place: int, source: object) -> TierConfig:
    if isinstance(source, TierConfig):
        return source
    try:
        kind = source.get("kind") if isinstance(source, Mapping) else None
        if kind in _LATER_KINDS:
            raise rejected("kind", kind, "hbm, dram or nvme; the others are not in this version")
        if not isinstance(kind, str) or kind not in _KINDS:
            raise rejected("kind", kind, "hbm, dram or nvme")
        return decode(_KINDS[kind], source)
    except ConfigError as error:
        raise prefixed(error, f"[{place}]") from None
