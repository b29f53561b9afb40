"""How objects are named, so that any machine computes the name: `kvx/v1/<public id>/8/<last key>`.

Sealed objects have the id of their key in their names, so that who has another key neither finds
nor hinders them. A name that `parse_name` refuses is not kvx's, and nothing of kvx touches it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from kvx.errors import UsageError

FORMAT_VERSION: Final = 1
KEY_BYTES: Final = 16
SEAL_ID_BYTES: Final = 8
# Public id, blocks in decimal, seal id if there is one, last key.
_NAME: Final = re.compile(r"v1/([0-9a-f]{32})/([1-9][0-9]{0,8})(?:-([0-9a-f]{16}))?/([0-9a-f]{32})")
_VERSION: Final = re.compile(r"v([1-9][0-9]{0,8})/.")
_PARTS: Final = 4


@dataclass(frozen=True, slots=True)
class ObjectName:
    """What the name of an object says.

    Attributes:
        public_id: (16 bytes) of its namespace.
        num_blocks: Blocks in it.
        last_key: (16 bytes) key of its last block.
        seal_id: (8 bytes) `Sealer.id` of the key it is sealed with; empty where it is not sealed.
    """

    public_id: bytes
    num_blocks: int
    last_key: bytes
    seal_id: bytes = b""


def object_name(
    prefix: str, public_id: bytes, num_blocks: int, last_key: bytes, *, seal_id: bytes = b""
) -> str:
    """Return the name of the object that ends with the block `last_key`."""
    if len(last_key) != KEY_BYTES or num_blocks < 1:
        raise UsageError(f"{num_blocks} blocks up to a key of {len(last_key)} bytes have no name")
    if len(seal_id) not in (0, SEAL_ID_BYTES):
        raise UsageError(f"the id of a seal has {SEAL_ID_BYTES} bytes, not {len(seal_id)}")
    seal = f"-{seal_id.hex()}" if seal_id else ""
    return f"{namespace_prefix(prefix, public_id)}{num_blocks}{seal}/{last_key.hex()}"


def namespace_prefix(prefix: str, public_id: bytes) -> str:
    """Return what the names of all objects of a namespace begin with."""
    if len(public_id) != KEY_BYTES:
        raise UsageError(f"a public id has {KEY_BYTES} bytes, not {len(public_id)}")
    return f"{root(prefix)}v{FORMAT_VERSION}/{public_id.hex()}/"


def root(prefix: str) -> str:
    """Return what the names of all objects under `prefix` begin with; nothing for no prefix."""
    stripped = prefix.strip("/")
    return f"{stripped}/" if stripped else ""


def parse_name(prefix: str, name: str) -> ObjectName | None:
    """Return what a name says; None where it is not one of this version's."""
    found = _NAME.fullmatch(name.removeprefix(root(prefix))) if _is_below(prefix, name) else None
    if found is None:
        return None
    public_id, num_blocks, seal_id, last_key = found.groups()
    return ObjectName(
        bytes.fromhex(public_id),
        int(num_blocks),
        bytes.fromhex(last_key),
        bytes.fromhex(seal_id or ""),
    )


def version_of(prefix: str, name: str) -> int | None:
    """Return the format version that a name claims, as later kvx may name objects otherwise."""
    found = _VERSION.match(name.removeprefix(root(prefix))) if _is_below(prefix, name) else None
    return int(found[1]) if found else None


def relative_name(name: str) -> str:
    """Return a name without its prefix: what a sealed object is bound to."""
    return "/".join(name.rsplit("/", _PARTS)[-_PARTS:])


def _is_below(prefix: str, name: str) -> bool:
    return name.startswith(root(prefix))
