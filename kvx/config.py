"""Configuration of a cache: frozen dataclasses, from code, a mapping, or a YAML or TOML file.

The only module that reads the environment, once per `CacheConfig.load`:

    KVX_IO_BACKEND          overrides `io_backend`
    KVX_COPY_THREADS        overrides `copy_threads`
    KVX_DEADLINE_S          overrides `deadline_s`
    KVX_DRAM_CAPACITY       overrides `capacity` of the DRAM tier
    KVX_NVME_CAPACITY       overrides `capacity` of the NVMe tier
    KVX_NVME_PATH           overrides `path` of the NVMe tier
    KVX_TENANT_SALT_<NAME>  the salt of a tenant (upper case, other characters as _), so that no
                            secret has to stand in a file

`cache_directory` reads XDG_CACHE_HOME.
"""

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import yaml

from kvx.errors import ConfigError, UsageError
from kvx.namespace import Namespace
from kvx.records import Setting, decode, encode, prefixed, rejected, unknown_key, validate

TierT = TypeVar("TierT", bound="DramTierConfig | NvmeTierConfig")
_LATER_KINDS = ("hbm", "s3", "peer")


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


class IoBackend(StrEnum):
    """How files are read and written."""

    AUTO = "auto"
    IO_URING = "io_uring"
    POSIX = "posix"


class Prefault(StrEnum):
    """When the pages of the DRAM tier are populated."""

    BACKGROUND = "background"
    EAGER = "eager"
    NEVER = "never"


def _setting(
    default: object = dataclasses.MISSING,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    is_secret: bool = False,
) -> object:
    setting = Setting(minimum=minimum, maximum=maximum, is_secret=is_secret)
    return field(default=default, metadata={"setting": setting}, repr=not is_secret)


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """Which blocks are worth writing to NVMe.

    Attributes:
        min_frequency: Times a block must have been offered before it is written; 1 for at once.
        bytes_per_day: Most bytes written a day; None for no limit.
    """

    min_frequency: int = _setting(1, minimum=1, maximum=15)  # type: ignore[assignment]
    bytes_per_day: int | None = _setting(None, minimum=1)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Check every value."""
        validate(self)


@dataclass(frozen=True, slots=True)
class BreakerConfig:
    """When a failing tier is left alone.

    Attributes:
        failures: Failures in a row that open the breaker.
        reset_s: Seconds until a probe is let through.
    """

    failures: int = _setting(3, minimum=1)  # type: ignore[assignment]
    reset_s: float = _setting(5.0, minimum=0.001)  # type: ignore[assignment]

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

    capacity_bytes: int = _setting(minimum=64 << 10)  # type: ignore[assignment]
    kind: str = "dram"
    eviction: Eviction = Eviction.LRU
    prefault: Prefault = Prefault.BACKGROUND
    numa_node: int = _setting(-1, minimum=-1, maximum=63)  # type: ignore[assignment]
    extent_bytes: int | None = _setting(None, minimum=4096)  # type: ignore[assignment]

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
    capacity_bytes: int = _setting(minimum=64 << 10)  # type: ignore[assignment]
    kind: str = "nvme"
    eviction: Eviction = Eviction.LFU_WITH_RECENCY
    write: WriteMode = WriteMode.THROUGH
    durability: Durability = Durability.BATCH
    admission: AdmissionConfig = AdmissionConfig()
    rewarm: bool = True
    recreate: bool = False
    deadline_s: float = _setting(30.0, minimum=0.001)  # type: ignore[assignment]
    extent_bytes: int | None = _setting(None, minimum=64 << 10)  # type: ignore[assignment]
    queue_depth: int = _setting(64, minimum=1, maximum=4096)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Check every value."""
        validate(self)


@dataclass(frozen=True, slots=True)
class TenantConfig:
    """A tenant: its salt and its share.

    Attributes:
        name: As in `Namespace.tenant`.
        salt: Secret in all its keys; never shown. Better given by KVX_TENANT_SALT_<NAME>.
        dram_quota_bytes: Most bytes of DRAM for its blocks of one size; None for no limit.
        nvme_quota_bytes: The same on NVMe.
    """

    name: str
    salt: str = _setting("", is_secret=True)  # type: ignore[assignment]
    dram_quota_bytes: int | None = _setting(None, minimum=0)  # type: ignore[assignment]
    nvme_quota_bytes: int | None = _setting(None, minimum=0)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Check every value."""
        validate(self)


def _tiers(source: object) -> tuple[DramTierConfig | NvmeTierConfig, ...]:
    """Decode the list of tiers by their kind; DRAM comes first and each kind at most once."""
    if not isinstance(source, Sequence) or isinstance(source, str | bytes) or not source:
        raise ConfigError(f" is {source!r}, but a list of tiers is needed, the first of kind dram")
    found = tuple(_tier(place, one) for place, one in enumerate(source))
    kinds = [tier.kind for tier in found]
    if kinds[0] != "dram" or len(set(kinds)) != len(kinds):
        raise rejected("", kinds, "one tier of each kind, dram first")
    return found


def _tier(place: int, source: object) -> DramTierConfig | NvmeTierConfig:
    if isinstance(source, DramTierConfig | NvmeTierConfig):
        return source
    try:
        kind = source.get("kind") if isinstance(source, Mapping) else None
        if kind in _LATER_KINDS:
            raise rejected("kind", kind, "dram or nvme; the others are not in this version")
        if kind == "dram":
            return decode(DramTierConfig, source)
        if kind == "nvme":
            return decode(NvmeTierConfig, source)
        raise rejected("kind", kind, "dram or nvme")
    except ConfigError as error:
        raise prefixed(error, f"[{place}]") from None


def _tenants(source: object) -> tuple[TenantConfig, ...]:
    if not isinstance(source, Sequence) or isinstance(source, str | bytes):
        raise ConfigError(f" is {source!r}, but a list of tenants is needed")
    found = []
    for place, one in enumerate(source):
        try:
            found.append(decode(TenantConfig, one))
        except ConfigError as error:
            raise prefixed(error, f"[{place}]") from None
    names = [tenant.name for tenant in found]
    if len(set(names)) != len(names):
        raise rejected("", names, "each tenant once")
    return tuple(found)


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Everything `TieredCache.open` wants to know.

    Attributes:
        tiers: DRAM first, then NVMe if there is one.
        tenants: Tenants with a salt or a quota; others need no entry.
        deadline_s: Seconds a transfer may take unless the call says otherwise.
        copy_threads: Threads that copy; 0 for one a CPU.
        io_backend: How files are read and written.
        breaker: When a failing tier is left alone.
        events_capacity: Events kept for replay.
    """

    tiers: tuple[DramTierConfig | NvmeTierConfig, ...] = field(
        metadata={"setting": Setting(decode=_tiers)}
    )
    tenants: tuple[TenantConfig, ...] = field(
        default=(), metadata={"setting": Setting(decode=_tenants)}
    )
    deadline_s: float = _setting(10.0, minimum=0.001)  # type: ignore[assignment]
    copy_threads: int = _setting(0, minimum=0, maximum=256)  # type: ignore[assignment]
    io_backend: IoBackend = IoBackend.AUTO
    breaker: BreakerConfig = BreakerConfig()
    events_capacity: int = _setting(65_536, minimum=1)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Check every value."""
        validate(self)

    @classmethod
    def load(cls, source: object) -> "CacheConfig":
        """Return the configuration that `source` describes, environment included.

        Args:
            source: A `CacheConfig`, a mapping, or the path of a .yaml, .yml or .toml file.

        Raises:
            ConfigError: Unknown key or malformed value; names the key, the value, what is accepted.
        """
        plain = source if isinstance(source, cls | Mapping) else _read(source)
        return decode(cls, _with_environment(decode(cls, plain), os.environ))

    @property
    def dram(self) -> DramTierConfig:
        """The DRAM tier; there always is one."""
        found = self.tier(DramTierConfig)
        assert found is not None, "decoding requires a DRAM tier"
        return found

    def tier(self, kind: type[TierT]) -> TierT | None:
        """Return the tier of a kind; None without one."""
        return next((tier for tier in self.tiers if isinstance(tier, kind)), None)

    def tenant(self, name: str) -> TenantConfig | None:
        """Return the tenant of a name; None when it has no entry."""
        return next((tenant for tenant in self.tenants if tenant.name == name), None)

    def namespace(self, facts: Mapping[str, object]) -> Namespace:
        """Return the namespace of these facts; the tenant's salt is added where none is given.

        Raises:
            UsageError: A field is missing, unknown or malformed.
        """
        known = [one.name for one in dataclasses.fields(Namespace)]
        for name in facts:
            if name not in known:
                raise unknown_key(name, known)
        tenant = self.tenant(str(facts.get("tenant", "")))
        salted = {"salt": tenant.salt, **facts} if tenant is not None else dict(facts)
        missing = {"model", "dtype", "block_bytes"} - salted.keys()
        if missing:
            raise UsageError(f"a namespace needs {', '.join(sorted(missing))}")
        return Namespace(**salted)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        """Return plain values for printing; secrets are masked."""
        return encode(self)


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where kvx keeps what it can make again, such as calibrations; made by who writes.

    Source: XDG Base Directory Specification.
    """
    base = Path(environment.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "kvx"


def _read(source: object) -> object:
    if not isinstance(source, str | Path):
        raise ConfigError(f"a configuration is a mapping or the path of a file, not {source!r}")
    path = Path(source)
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise ConfigError(f"{path}: a configuration file ends in .yaml, .yml or .toml")
    try:
        text = path.read_text()
        return tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _with_environment(config: CacheConfig, environment: Mapping[str, str]) -> CacheConfig:
    """Return the configuration with the overrides in it."""
    top = {
        name: environment[f"KVX_{name.upper()}"]
        for name in ("io_backend", "copy_threads", "deadline_s")
        if f"KVX_{name.upper()}" in environment
    }
    plain: dict[str, object] = {
        one.name: getattr(config, one.name) for one in dataclasses.fields(config)
    }
    plain |= {name: _number(value) for name, value in top.items()}
    tiers = []
    for tier in config.tiers:
        values: dict[str, object] = {
            one.name: getattr(tier, one.name) for one in dataclasses.fields(tier)
        }
        for name in ("capacity", "path"):
            value = environment.get(f"KVX_{tier.kind.upper()}_{name.upper()}")
            if value is not None:
                values.pop(f"{name}_bytes", None)
                values[name] = value
        tiers.append(values)
    plain["tiers"] = tiers
    plain["tenants"] = [
        dataclasses.replace(tenant, salt=environment.get(_salt_variable(tenant), tenant.salt))
        for tenant in config.tenants
    ]
    try:
        return decode(CacheConfig, plain)
    except ConfigError as error:
        # The rest was valid already, so a variable is to blame.
        names = ", ".join(sorted(name for name in environment if name.startswith("KVX_")))
        raise ConfigError(f"{error}; set in the environment: {names}", key=error.key) from None


def _number(text: str) -> object:
    return float(text) if re.fullmatch(r"\d+\.\d+", text) else int(text) if text.isdigit() else text


def _salt_variable(tenant: TenantConfig) -> str:
    return "KVX_TENANT_SALT_" + re.sub(r"[^A-Z0-9]", "_", tenant.name.upper())
