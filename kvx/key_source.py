"""Where a secret key is kept, so that no configuration holds it: in a file, or in a variable.

No message and no record here shows a key. What stands where a file or a variable should be named
and may be a key itself is refused without being shown.
"""

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvx.errors import ConfigError
from kvx.records import decode, prefixed, validate

SEAL_KEY_BYTES = 32
_KEY_FILE_BYTES_MAX = 4096
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY_DIGITS = re.compile(rf"[0-9A-Fa-f]{{{2 * SEAL_KEY_BYTES}}}")


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where one key is kept: a file or a variable, one of them.

    Attributes:
        file: With 32 bytes, raw or as hex, for its owner alone.
        env: Environment variable with the same as hex.
    """

    file: Path | None = None
    env: str = ""

    def __post_init__(self) -> None:
        """Check every value."""
        validate(self)
        if (self.file is None) == (not self.env):
            raise ConfigError("file: it or env says where the key is, one of them", key="file")
        refuse_key("file", str(self.file or ""))
        check_variable("env", self.env)

    def read(self, where: str, environment: Mapping[str, str]) -> bytes:
        """Return the 32 bytes of a key for sealing.

        Args:
            where: What the keys of this record are called by errors, without `file` and `env`.
            environment: Variables by name.

        Raises:
            ConfigError: There is no such file or variable, others than its owner may read the file,
                or what it holds is no key.
        """
        if self.file is not None:
            return _read_seal_key(self.file, f"{where}file")
        if self.env not in environment:
            raise ConfigError(f"{where}env: {self.env} is not set in the environment")
        return _from_digits(environment[self.env].encode(), f"{where}env: {self.env}")


def decode_key_sources(source: object) -> dict[str, KeySource]:
    """Decode where the keys of tenants are, by the tenant's name.

    Raises:
        ConfigError: Names the tenant and what is accepted, and no value.
    """
    if not isinstance(source, Mapping):
        raise ConfigError(f" is of type {type(source).__name__}, but tenants by name are needed")
    found = {}
    for tenant, one in source.items():
        if not isinstance(tenant, str):
            raise ConfigError(f"[{tenant!r}]: a tenant's name is a text", key=f"[{tenant!r}]")
        if not isinstance(one, Mapping | KeySource):
            raise ConfigError(f"{tenant}: needed is file or env, where the key is", key=tenant)
        try:
            found[tenant] = decode(KeySource, one)
        except ConfigError as error:
            raise prefixed(error, tenant) from None
    return found


def check_variable(key: str, name: str) -> None:
    """Refuse what is no name of a variable, or may be a key; nothing is fine."""
    refuse_key(key, name)
    if name and not _VARIABLE.fullmatch(name):
        raise ConfigError(
            f"{key}: {len(name)} characters are no name of a variable: letters, digits and _ are",
            key=key,
        )


def refuse_key(key: str, text: str) -> None:
    """Refuse a key where its place should be named."""
    if _KEY_DIGITS.search(text):
        raise ConfigError(
            f"{key}: that looks like a key itself, which has no place in a configuration; put it "
            "into a file or a variable, and name that here",
            key=key,
        )


def read_key(path: Path) -> bytes:
    """Return the key in a file, without white space around it.

    Raises:
        ConfigError: It cannot be read, or others than its owner may.
    """
    return _key_file(path).strip()


def _read_seal_key(path: Path, where: str) -> bytes:
    try:
        found = _key_file(path)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    # Random bytes may look like white space at their ends, but never like digits throughout.
    if len(found) == SEAL_KEY_BYTES and not found.isalnum():
        return found
    return _from_digits(found, f"{where}: {path}")


def _from_digits(found: bytes, where: str) -> bytes:
    try:
        key = bytes.fromhex(found.decode())
    except ValueError:
        key = b""
    if len(key) != SEAL_KEY_BYTES:
        raise ConfigError(
            f"{where}: {len(found)} bytes are no key for sealing; {2 * SEAL_KEY_BYTES} "
            f"hexadecimal digits are, as `openssl rand -hex {SEAL_KEY_BYTES}` makes them"
        )
    return key


def _key_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            key = file.read(_KEY_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path}: the key cannot be read: {error.strerror}") from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path}: others may read the key; chmod 600 {path}")
    if len(key) > _KEY_FILE_BYTES_MAX:
        raise ConfigError(f"{path}: more than {_KEY_FILE_BYTES_MAX} bytes are no key")
    return key
