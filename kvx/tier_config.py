"""Configuration of the tiers: one frozen dataclass a kind, and the list of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from kvx.errors import ConfigError
from kvx.key_source import KeySource, check_variable, decode_key_sources, refuse_key
from kvx.records import Setting, decode, prefixed, rejected, setting, validate


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


def _texts(source: object) -> tuple[str, ...]:
    """Decode a text, or a list of them."""
    found = (source,) if isinstance(source, str) else source
    if not isinstance(found, Sequence) or isinstance(found, bytes):
        raise ConfigError(f" is {source!r}, but a list of texts is needed")
    for place, one in enumerate(found):
        if not isinstance(one, str) or not one:
            raise rejected(f"[{place}]", one, "an address, or the name of an agent")
    return tuple(found)


def _list_of_texts() -> tuple[str, ...]:
    empty: tuple[str, ...] = ()
    return field(default=empty, metadata={"setting": Setting(decode=_texts)})


@dataclass(frozen=True, slots=True)
class PeerTierConfig:
    """The peer tier: blocks that caches of other processes hold.

    Attributes:
        peers: Whom to be connected with: addresses, or names of agents whose cards come by the
            `directory` or by hearsay. Whoever connects to us is read from, too.
        deadline_s: Most seconds one peer is given for a window of blocks, before the next is asked.
        max_in_flight_bytes: Most bytes on their way from peers at a time, and most bytes of ours
            that are held for them.
        serve: Whether peers may read what this cache holds.
        known_blocks_max: Most blocks remembered of each tier of each peer.
        publish_s: How long changes are gathered before peers are told.
        name: Of our agent; empty for one made of the host's name.
        listen: Addresses to listen on besides a socket file for this host.
        key: Secret that all agents share; never shown. Better given by KVX_PEER_KEY.
        key_file: File with the key instead, for its owner alone.
        directory: Shared directory in which agents find each other's cards; None for none.
    """

    peers: tuple[str, ...] = _list_of_texts()
    kind: str = "peer"
    deadline_s: float = setting(0.5, minimum=0.001, maximum=3600)
    max_in_flight_bytes: int = setting(256 << 20, minimum=64 << 10)
    serve: bool = True
    known_blocks_max: int = setting(1 << 20, minimum=1024, maximum=100_000_000)
    publish_s: float = setting(0.05, minimum=0.001, maximum=60)
    name: str = ""
    listen: tuple[str, ...] = _list_of_texts()
    key: str = setting("", is_secret=True)
    key_file: Path | None = None
    directory: Path | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        validate(self)
        if self.key and self.key_file is not None:
            raise ConfigError(
                "key_file: the key is given already; one of them is enough", key="key_file"
            )

    @property
    def has_agent(self) -> bool:
        """Whether it says anything of the agent itself."""
        return bool(self.name or self.listen or self.key or self.key_file or self.directory)


@dataclass(frozen=True, slots=True)
class S3AdmissionConfig:
    """Which groups of blocks are worth storing as objects.

    Attributes:
        min_frequency: Times a group must have been offered before it is stored; 1 for at once.
        min_prefix_blocks: Blocks of the prompt that must end with the group: shorter prefixes are
            computed sooner than they are fetched.
    """

    min_frequency: int = setting(1, minimum=1, maximum=15)
    min_prefix_blocks: int = setting(0, minimum=0)

    def __post_init__(self) -> None:
        """Check every value."""
        validate(self)


@dataclass(frozen=True, slots=True)
class S3TierConfig:
    """The S3 tier: groups of blocks as objects, shared by all machines that use the bucket.

    Attributes:
        bucket: It has to exist.
        prefix: What names of objects begin with.
        endpoint: URL of the service; empty for AWS.
        region: As the service calls it.
        profile: Of the AWS configuration files; empty for the default chain of credentials.
        is_anonymous: Whether requests are not signed.
        ca_file: Certificates to trust besides the system's.
        blocks_per_object: Consecutive blocks of a prompt in one object; the same everywhere.
        max_in_flight: Most requests at a time; fewer when the service is slow.
        deadline_s: Most seconds any call takes, retries included.
        connect_timeout_s: Most seconds until a connection stands.
        capacity_bytes: Most bytes of objects under the prefix, as far as this cache knows; None for
            no limit.
        ttl_s: Seconds after which objects expire; 0 for never.
        eviction: Which object goes first.
        is_read_only: Whether nothing is stored.
        max_pending_bytes: Most bytes of blocks that wait in DRAM to be stored; more are not stored.
        known_objects_max: Most objects remembered as present or absent.
        absent_s: Seconds for which an absent object is not looked for again.
        admission: Which groups are worth storing.
        seal_key_file: File with 32 bytes, raw or as hex, that objects are encrypted with, for its
            owner alone.
        seal_key_env: Environment variable with the same as hex.
        seal_keys: By tenant, where its own key is; the one above is for all others. Where any is
            named and there is none above, a namespace of another tenant is refused.
    """

    bucket: str
    kind: str = "s3"
    prefix: str = "kvx"
    endpoint: str = ""
    region: str = "us-east-1"
    profile: str = ""
    is_anonymous: bool = False
    ca_file: Path | None = None
    blocks_per_object: int = setting(8, minimum=1, maximum=4096)
    max_in_flight: int = setting(16, minimum=1, maximum=1024)
    deadline_s: float = setting(5.0, minimum=0.001, maximum=3600)
    connect_timeout_s: float = setting(2.0, minimum=0.001, maximum=3600)
    capacity_bytes: int | None = setting(None, minimum=64 << 10)
    ttl_s: int = setting(0, minimum=0)
    eviction: Eviction = Eviction.LRU
    is_read_only: bool = False
    max_pending_bytes: int = setting(512 << 20, minimum=64 << 10)
    known_objects_max: int = setting(1 << 20, minimum=1024, maximum=100_000_000)
    absent_s: float = setting(10.0, minimum=0.0)
    admission: S3AdmissionConfig = S3AdmissionConfig()
    seal_key_file: Path | None = None
    seal_key_env: str = ""
    # Not hashed, as a mapping cannot be.
    seal_keys: Mapping[str, KeySource] = field(
        default_factory=dict, hash=False, metadata={"setting": Setting(decode=decode_key_sources)}
    )

    def __post_init__(self) -> None:
        """Check every value."""
        validate(self)
        if self.eviction not in (Eviction.LRU, Eviction.FIFO):
            raise rejected("eviction", self.eviction.value, "lru or fifo")
        refuse_key("seal_key_file", str(self.seal_key_file or ""))
        check_variable("seal_key_env", self.seal_key_env)
        if self.seal_key_file is not None and self.seal_key_env:
            raise ConfigError(
                "seal_key_env: seal_key_file is given already; one of them is enough",
                key="seal_key_env",
            )


TierConfig = HbmTierConfig | DramTierConfig | NvmeTierConfig | S3TierConfig | PeerTierConfig
_KINDS = {
    "hbm": HbmTierConfig,
    "dram": DramTierConfig,
    "nvme": NvmeTierConfig,
    "s3": S3TierConfig,
    "peer": PeerTierConfig,
}


def tier_of_rank(tier: TierConfig, label: str, num_ranks: int) -> TierConfig:
    """Return the tier of one of several ranks: its share of memory and disk, names of its own."""
    match tier:
        case NvmeTierConfig():
            share = tier.capacity_bytes // num_ranks
            return replace(tier, path=tier.path / label, capacity_bytes=share)
        case HbmTierConfig() | S3TierConfig():  # each has a device; objects have a namespace each
            return tier
        case DramTierConfig():
            return replace(tier, capacity_bytes=tier.capacity_bytes // num_ranks)
        case PeerTierConfig():
            return replace(tier, name=f"{tier.name}-{label}") if tier.name else tier


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
        accepted = "hbm, dram, nvme, s3, peer in this order, each at most once, with dram"
        raise rejected("", kinds, accepted)
    return found


def _tier(place: int, source: object) -> TierConfig:
    if isinstance(source, TierConfig):
        return source
    try:
        kind = source.get("kind") if isinstance(source, Mapping) else None
        if not isinstance(kind, str) or kind not in _KINDS:
            raise rejected("kind", kind, "hbm, dram, nvme, s3 or peer")
        return decode(_KINDS[kind], source)
    except ConfigError as error:
        raise prefixed(error, f"[{place}]") from None
