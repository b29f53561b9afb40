"""References: what is written is read, and nothing that was not signed."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

import kvx
from kvx_vllm.pd import messages
from kvx_vllm.pd.messages import Claim, Done, Verdict, Word
from kvx_vllm.pd.reference import (
    FIELD,
    GroupBlocks,
    Outcome,
    Reference,
    has_reference,
    wants_prefill,
)

FORMAT = (Path(__file__).parents[4] / "docs/formats/references.md").read_text()
KEY = kvx.SharedKey(b"k" * 32)
REFERENCE = Reference(
    id=bytes(range(16)), agent="prefill-0", incarnation="6a0f", card=b"card",
    groups=[GroupBlocks(b"n" * 16, 9, b"h" * 32), GroupBlocks(b"m" * 16, 0, b"")],
    expires_at_ms=1_800_000_000_000,
).signed(KEY)  # fmt: skip
CHANGES: dict[str, object] = {
    "id": base64.b64encode(b"x" * 16).decode(),
    "agent": "prefill-1",
    "incarnation": "6a10",
    "card": base64.b64encode(b"bard").decode(),
    "expires_at_ms": 1_900_000_000_000,
    "mac": base64.b64encode(b"m" * 32).decode(),
}


def through_json(params: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(params))
    return found


def test_a_reference_survives_json() -> None:
    params = through_json(REFERENCE.to_params())
    assert has_reference(params)
    assert not wants_prefill(params)
    found = Reference.of_params(params)
    assert found == REFERENCE
    assert found.is_signed(KEY)
    assert not found.is_signed(kvx.SharedKey(b"o" * 32))


def test_what_is_signed_stays_what_it_is() -> None:
    # Another one would make engines of different versions refuse each other.
    assert REFERENCE.mac.hex()[:32] == "ab378383f5294f7869286269fa715fdd"
    documented = re.findall(r"^\| `(\w+)` \|", FORMAT.partition("## What")[0], re.MULTILINE)
    assert list(REFERENCE.to_params()[FIELD]) == documented


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_reference_is_not_signed(field: str) -> None:
    params = through_json(REFERENCE.to_params())
    params[FIELD][field] = CHANGES[field]
    assert not Reference.of_params(params).is_signed(KEY)


@pytest.mark.parametrize("change", [{"num_blocks": 10}, {"last_hash": "eHh4"}])
def test_a_changed_group_is_not_signed(change: dict[str, object]) -> None:
    params = through_json(REFERENCE.to_params())
    params[FIELD]["groups"][0] |= change
    assert not Reference.of_params(params).is_signed(KEY)


@pytest.mark.parametrize(
    "value",
    [
        None, "reference", 7, [], {}, {**REFERENCE.to_params()[FIELD], "id": "AAAA"},
        {**REFERENCE.to_params()[FIELD], "id": "no base64!"},
        {**REFERENCE.to_params()[FIELD], "groups": []},
        {**REFERENCE.to_params()[FIELD], "more": 1},
        {**REFERENCE.to_params()[FIELD], "expires_at_ms": -1},
        {**REFERENCE.to_params()[FIELD], "agent": "a" * 300},
    ],
)  # fmt: skip
def test_what_is_no_reference_is_refused(value: object) -> None:
    with pytest.raises(kvx.UsageError, match="is no reference"):
        Reference.of_params({"do_remote_prefill": True, FIELD: value})


@pytest.mark.parametrize(
    ("params", "prefill", "reference"),
    [
        (None, False, False),
        ({}, False, False),
        ({"do_remote_decode": True, "do_remote_prefill": False}, True, False),
        ({"do_remote_decode": False, "do_remote_prefill": True}, False, True),
        ({"do_remote_decode": "yes", "do_remote_prefill": 1}, False, False),
    ],
)
def test_what_a_request_asks_for(
    params: dict[str, object] | None, prefill: bool, reference: bool
) -> None:
    assert (wants_prefill(params), has_reference(params)) == (prefill, reference)


def test_messages_survive_the_wire() -> None:
    said = [
        Claim(7, b"i" * 16, [3, 0]), Word(7, Verdict.READY, [b"\xe0", b""]), Done(b"i" * 16),
    ]  # fmt: skip
    assert [messages.decode(messages.encode(one)) for one in said] == said
    for wrong in (b"", b"\x00", msgspec.msgpack.encode({"type": "claim", "number": 0})):
        with pytest.raises(kvx.UsageError, match="malformed"):
            messages.decode(wrong)


def test_every_refusal_is_an_outcome() -> None:
    assert {one.value for one in Verdict} - {"ready"} <= {one.value for one in Outcome}
