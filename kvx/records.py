"""Plain mappings to frozen dataclasses and back, with errors that name the dotted key.

A record is a frozen dataclass whose fields are built with `setting`. A field called `x_bytes` may
be written as `x` or `x_bytes` and takes sizes such as "8GiB". Errors are raised with a key relative
to the record and get their prefix on the way up, so that every message starts with the whole path.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kvx import sizes
from kvx.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MASK = "***"

RecordT = TypeVar("RecordT", bound="DataclassInstance")
Decoder = Callable[[object], object]


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """What a field accepts beyond its type.

    Attributes:
        minimum: Smallest number accepted, None for no bound.
        maximum: Largest number accepted, None for no bound.
        is_secret: The value is masked by `encode`.
        decode: Replaces the conversion by type; raises ConfigError with a relative key.
    """

    minimum: float | None = None
    maximum: float | None = None
    is_secret: bool = False
    decode: Decoder | None = None


def setting(
    default: object = dataclasses.MISSING,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    is_secret: bool = False,
) -> typing.Any:
    """Return the field of a record with bounds; `Any` because it stands where a value would."""
    kept = Setting(minimum=minimum, maximum=maximum, is_secret=is_secret)
    return dataclasses.field(default=default, metadata={"setting": kept}, repr=not is_secret)


def rejected(key: str, value: object, accepted: str) -> ConfigError:
    """Return the error for a malformed value; the message starts with `key`."""
    return ConfigError(f"{key} = {value!r}: accepted is {accepted}", key=key)


def prefixed(error: ConfigError, prefix: str) -> ConfigError:
    """Return `error` seen from one level up."""
    joint = "" if not prefix or not error.key or error.key.startswith("[") else "."
    return ConfigError(f"{prefix}{joint}{error}", key=f"{prefix}{joint}{error.key}")


def setting_of(field: "dataclasses.Field[object]") -> Setting:
    """Return the `Setting` of a field; an unrestricted one where none was given."""
    found = field.metadata.get("setting")
    return found if isinstance(found, Setting) else Setting()


def spellings(name: str) -> tuple[str, ...]:
    """Return the keys a field may be written under, the documented one first."""
    return (name.removesuffix("_bytes"), name) if name.endswith("_bytes") else (name,)


def decode(record: type[RecordT], source: object) -> RecordT:
    """Build a `record` from a mapping.

    Args:
        record: Frozen dataclass; its `__post_init__` calls `validate`.
        source: Mapping of key to plain value, or a `record` already.

    Raises:
        ConfigError: An unknown, missing or twice-given key, or a malformed value.
    """
    if isinstance(source, record):
        return source
    if not isinstance(source, Mapping):
        raise ConfigError(f" is {source!r}, but a mapping is needed")
    fields = {field.name: field for field in dataclasses.fields(record)}
    by_key = {key: name for name in fields for key in spellings(name)}
    hints = typing.get_type_hints(record)
    values: dict[str, object] = {}
    for key, value in source.items():
        name = by_key.get(key)
        if name is None:
            raise unknown_key(str(key), by_key)
        if name in values:
            raise ConfigError(f"{key}: given twice, as {' and '.join(spellings(name))}", key=key)
        values[name] = _convert(key, value, hints[name], fields[name])
    for field in fields.values():
        has_default = field.default is not dataclasses.MISSING
        has_default |= field.default_factory is not dataclasses.MISSING
        if field.name not in values and field.init and not has_default:
            key = spellings(field.name)[0]
            raise ConfigError(f"{key}: missing, it has no default", key=key)
    return record(**values)


def unknown_key(key: str, known: typing.Iterable[str]) -> ConfigError:
    """Return the error for a key nobody knows, naming the nearest one."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
    return ConfigError(f"{key}: unknown key; {hint}", key=key)


def validate(record: "DataclassInstance") -> None:
    """Check types and bounds of a record built in code, as `decode` would.

    Raises:
        ConfigError: Names the field, its value and what is accepted.
    """
    hints = typing.get_type_hints(type(record))
    for field in dataclasses.fields(record):
        value, setting = getattr(record, field.name), setting_of(field)
        hint, is_optional = _without_none(hints[field.name])
        if setting.decode is not None:
            _check_decoded(field.name, value, setting.decode)
            continue
        if value is None and is_optional:
            continue
        if not isinstance(hint, type) or isinstance(hint, types.GenericAlias):
            continue
        is_number = hint is float and isinstance(value, int)
        is_wrong_bool = isinstance(value, bool) and hint is not bool
        if is_wrong_bool or not (is_number or isinstance(value, hint)):
            shown = MASK if setting.is_secret else value
            raise rejected(field.name, shown, f"a value of type {hint.__name__}")
        if isinstance(value, int | float) and hint is not bool:
            _check_bounds(field.name, value, value, setting)


def encode(record: "DataclassInstance", *, is_masked: bool = True) -> dict[str, object]:
    """Return a record as plain values that `decode` reads back; secrets become `MASK`."""
    plain: dict[str, object] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if setting_of(field).is_secret and is_masked:
            plain[field.name] = MASK if value else ""
        else:
            plain[spellings(field.name)[0]] = _plain(field.name, value, is_masked=is_masked)
    return plain


def without_records(source: object) -> object:
    """Return `source` with every record in it replaced by its plain, unmasked mapping."""
    if dataclasses.is_dataclass(source) and not isinstance(source, type):
        return encode(source, is_masked=False)
    if isinstance(source, Mapping):
        return {key: without_records(value) for key, value in source.items()}
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        return [without_records(value) for value in source]
    return source


def _plain(name: str, value: object, *, is_masked: bool) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return encode(value, is_masked=is_masked)
    if isinstance(value, tuple):
        return [_plain(name, item, is_masked=is_masked) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(name, item, is_masked=is_masked) for key, item in value.items()}
    if isinstance(value, StrEnum | Path):
        return str(value)
    if name.endswith("_bytes") and isinstance(value, int):
        return sizes.format_bytes(value)
    return value


def _convert(key: str, value: object, hint: object, field: "dataclasses.Field[object]") -> object:
    setting = setting_of(field)
    hint, is_optional = _without_none(hint)
    if value is None and is_optional:
        return None
    try:
        if setting.decode is not None:
            return setting.decode(value)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return decode(hint, value)
    except ConfigError as error:
        raise prefixed(error, key) from None
    return _convert_scalar(key, value, hint, field)


def _convert_scalar(
    key: str, value: object, hint: object, field: "dataclasses.Field[object]"
) -> object:
    setting = setting_of(field)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _convert_enum(key, value, hint)
    if hint is int and "bytes" in field.name.split("_"):
        return _convert_size(key, value, setting)
    if hint in (int, float):
        return _convert_number(key, value, is_float=hint is float, setting=setting)
    if hint is Path and isinstance(value, str | Path) and str(value):
        return Path(value)
    if hint in (bool, str) and isinstance(value, bool | str) and type(value) is hint:
        return value
    shown = MASK if setting.is_secret else value
    raise rejected(key, shown, f"a value of type {getattr(hint, '__name__', hint)}")


def _check_decoded(key: str, value: object, decode_value: Decoder) -> None:
    """Accept what the field's own decoder accepts and would leave as it is."""
    try:
        decoded = decode_value(value)
    except ConfigError as error:
        raise prefixed(error, key) from None
    if decoded != value:
        raise rejected(key, value, f"{type(decoded).__name__} of records, or plain values to load")


def _convert_enum(key: str, value: object, hint: type[StrEnum]) -> StrEnum:
    names = [member.value for member in hint]
    if value not in names:
        raise rejected(key, value, "one of " + ", ".join(names))
    return hint(str(value))


def _convert_number(key: str, value: object, *, is_float: bool, setting: Setting) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise rejected(key, value, "a number")
    if not is_float and not isinstance(value, int):
        raise rejected(key, value, "a whole number")
    number = float(value) if is_float else value
    _check_bounds(key, value, number, setting)
    return number


def _convert_size(key: str, value: object, setting: Setting) -> int:
    try:
        number = sizes.parse_bytes(typing.cast("int | str", value))
    except UsageError:
        raise rejected(key, value, sizes.ACCEPTED) from None
    _check_bounds(key, value, number, setting)
    return number


def _check_bounds(key: str, shown: object, number: float, setting: Setting) -> None:
    low, high = setting.minimum, setting.maximum
    is_low = low is not None and number < low
    is_high = high is not None and number > high
    if not math.isfinite(number) or is_low or is_high:
        bound = f"at least {low:g}" if low is not None else ""
        bound += " and " if low is not None and high is not None else ""
        bound += f"at most {high:g}" if high is not None else ""
        raise rejected(key, shown, f"a number {bound}".rstrip())


def _without_none(hint: object) -> tuple[object, bool]:
    arguments = typing.get_args(hint)
    if types.NoneType not in arguments:
        return hint, False
    rest = [argument for argument in arguments if argument is not types.NoneType]
    return (rest[0] if len(rest) == 1 else hint), True
