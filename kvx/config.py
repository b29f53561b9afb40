"""Configuration of a cache: frozen dataclasses, from code, a mapping, or a YAML or TOML file.

The only module that reads the environment, once per `CacheConfig.load`:

    KVX_IO_BACKEND          overrides `io_backend`
    KVX_COPY_THREADS        overrides `copy_threads`
    KVX_DEADLINE_S          overrides `deadline_s`
    KVX_GPU_DRIVER          overrides `driver` of `gpu`
    KVX_HBM_CAPACITY        overrides `capacity` of the HBM tier
    KVX_DRAM_CAPACITY       overrides `capacity` of the DRAM tier
    KVX_NVME_CAPACITY       overrides `capacity` of the NVMe tier
    KVX_NVME_PATH           overrides `path` of the NVMe tier
    KVX_PEER_KEY            overrides `key` of the peer tier, so that no secret has to stand in a
                            file; stronger than `key_file`
    KVX_TENANT_SALT_<NAME>  the salt of a tenant (upper case, other characters as _), so that no
                            secret has to stand in a file

`seal_keys` reads the variables that the S3 tier's `seal_keys` and `seal_key_env` name,
`cache_directory` XDG_CACHE_HOME, `runtime_directory` XDG_RUNTIME_DIR, `aws_environment` what AWS's
own tools read; the S3 client reads the secrets among it itself, and its threads where
`environment_default` says.
"""

import contextlib
import dataclasses
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import yaml

from kvx.errors import ConfigError, UsageError
from kvx.key_source import KeySource
from kvx.namespace import Namespace
from kvx.records import Setting, decode, encode, prefixed, rejected, setting, unknown_key, validate
from kvx.tier_config import DramTierConfig, S3TierConfig, TierConfig, decode_tiers, tier_of_rank

TierT = TypeVar("TierT", bound=TierConfig)


class IoBackend(StrEnum):
    """How files are read and written."""

    AUTO = "auto"
    IO_URING = "io_uring"
    POSIX = "posix"


class SmUse(StrEnum):
    """Whether kvx may launch kernels to gather and scatter small fragments."""

    AUTO = "auto"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class BreakerConfig:
    """When a failing tier is left alone.

    Attributes:
        failures: Failures in a row that open the breaker.
        reset_s: Seconds until a probe is let through.
    """

    failures: int = setting(3, minimum=1)
    reset_s: float = setting(5.0, minimum=0.001)

    def __post_init__(self) -> None:
        """Check every value."""
        validate(self)


@dataclass(frozen=True, slots=True)
class GpuConfig:
    """How the cache uses a GPU: opened for an HBM tier, or when it first meets device memory.

    Attributes:
        ordinal: Number of the device, as the driver counts.
        driver: The driver's library.
        sm: Whether small fragments may be moved by kernels; `never` leaves all to copy engines.
        ctas: Thread blocks of such a kernel.
        staging_bytes: Device memory for such kernels, a direction; 0 for none.
        calibrate: Whether copies are timed once a device, to plan by; else published numbers are
            taken.
    """

    ordinal: int = setting(0, minimum=0, maximum=1023)
    driver: str = "libcuda.so.1"
    sm: SmUse = SmUse.AUTO
    ctas: int = setting(4, minimum=1, maximum=1024)
    staging_bytes: int = setting(32 << 20, minimum=0)
    calibrate: bool = True

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
        hbm_quota_bytes: The same in HBM.
    """

    name: str
    salt: str = setting("", is_secret=True)
    dram_quota_bytes: int | None = setting(None, minimum=0)
    nvme_quota_bytes: int | None = setting(None, minimum=0)
    hbm_quota_bytes: int | None = setting(None, minimum=0)

    def __post_init__(self) -> None:
        """Check every value."""
        validate(self)


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
        tiers: From the top down: HBM if there is one, DRAM, NVMe and peers if there are.
        tenants: Tenants with a salt or a quota; others need no entry.
        deadline_s: Seconds a transfer may take unless the call says otherwise.
        copy_threads: Threads that copy; 0 for one a CPU.
        io_backend: How files are read and written.
        gpu: How a GPU is used.
        breaker: When a failing tier is left alone.
        events_capacity: Events kept for replay.
    """

    tiers: tuple[TierConfig, ...] = field(metadata={"setting": Setting(decode=decode_tiers)})
    tenants: tuple[TenantConfig, ...] = field(
        default=(), metadata={"setting": Setting(decode=_tenants)}
    )
    deadline_s: float = setting(10.0, minimum=0.001)
    copy_threads: int = setting(0, minimum=0, maximum=256)
    io_backend: IoBackend = IoBackend.AUTO
    gpu: GpuConfig = GpuConfig()
    breaker: BreakerConfig = BreakerConfig()
    events_capacity: int = setting(65_536, minimum=1)

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

    def of_rank(self, label: str, num_ranks: int) -> "CacheConfig":
        """Return what one of several ranks opens: its share, under names that end with `label`."""
        tiers = tuple(tier_of_rank(tier, label, num_ranks) for tier in self.tiers)
        return dataclasses.replace(self, tiers=tiers)

    def to_dict(self) -> dict[str, object]:
        """Return plain values for printing; secrets are masked."""
        return encode(self)


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where kvx keeps what it can make again, such as calibrations; made by who writes.

    Source: XDG Base Directory Specification.
    """
    base = Path(environment.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "kvx"


def runtime_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where sockets of this user lie; made, for this user alone, by who needs it.

    Source: XDG Base Directory Specification.
    """
    base = Path(environment.get("XDG_RUNTIME_DIR", ""))
    return base / "kvx" if base.is_absolute() else Path(f"/tmp/kvx-{os.getuid()}")  # noqa: S108 - checked by its user


@dataclass(frozen=True, slots=True)
class AwsEnvironment:
    """What AWS's variables decide besides the secrets.

    Attributes:
        endpoint: URL of the service; empty for AWS.
        has_credentials: Whether keys or a web identity are named; they come before files.
    """

    endpoint: str
    has_credentials: bool


def aws_environment(environment: Mapping[str, str] = os.environ) -> AwsEnvironment:
    """Return what the variables of AWS's tools say.

    Source: AWS SDKs and Tools Reference Guide, "Environment variables".
    """
    endpoints = (environment.get(f"AWS_ENDPOINT_URL{end}", "") for end in ("_S3", ""))
    names = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE")
    return AwsEnvironment(
        endpoint=next(filter(None, endpoints), ""),
        has_credentials=any(environment.get(name) for name in names),
    )


@contextlib.contextmanager
def environment_default(name: str, text: str) -> Iterator[None]:
    """Have a variable that nobody has set say `text` meanwhile, to what has no other setting."""
    if name in os.environ:
        yield
        return
    os.environ[name] = text
    try:
        yield
    finally:
        del os.environ[name]


def seal_keys(
    tier: S3TierConfig, environment: Mapping[str, str] = os.environ
) -> dict[str | None, bytes]:
    """Return the 32 bytes that objects are sealed with, by tenant; None stands for all others.

    Raises:
        ConfigError: There is no such file or variable, others than its owner may read the file, or
            what it holds is no key. Shows no key.
    """
    found: dict[str | None, bytes] = {
        tenant: source.read(f"seal_keys.{tenant}.", environment)
        for tenant, source in tier.seal_keys.items()
    }
    if tier.seal_key_file is not None or tier.seal_key_env:
        default = KeySource(tier.seal_key_file, tier.seal_key_env)
        found[None] = default.read("seal_key_", environment)
    return found


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
    if "KVX_GPU_DRIVER" in environment:
        plain["gpu"] = dataclasses.replace(config.gpu, driver=environment["KVX_GPU_DRIVER"])
    tiers = []
    for tier in config.tiers:
        values: dict[str, object] = {
            one.name: getattr(tier, one.name) for one in dataclasses.fields(tier)
        }
        for name in ("capacity", "path", "key"):
            value = environment.get(f"KVX_{tier.kind.upper()}_{name.upper()}")
            if value is not None and not {name, f"{name}_bytes"}.isdisjoint(values):
                values.pop(f"{name}_bytes", None)
                values[name] = value
                if name == "key":
                    values["key_file"] = None
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
