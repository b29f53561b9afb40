"""The worked examples of docs/formats are what the code computes."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np

from kvx.cache.events import BlockStored, decode_event, encode_event
from kvx.cache.peer import messages
from kvx.cache.s3.format import GroupFacts, GroupShape, encode, object_name
from kvx.namespace import Namespace
from kvx_ext import _core

FORMATS = Path(__file__).parents[2] / "docs/formats"
KEYS = (FORMATS / "keys.md").read_text()
EVENTS = (FORMATS / "events.md").read_text()
PEERS = (FORMATS / "peers.md").read_text()
OBJECT = (FORMATS / "object.md").read_text()


def test_the_worked_example_of_keys() -> None:
    example = dict(re.findall(r"^([a-z]+(?: [a-z]+)?)  +(.*)$", KEYS, re.MULTILINE))
    facts = dict(re.findall(r"(\w+)=(\w+)", example["namespace"]))
    namespace = Namespace(**{**facts, "block_bytes": int(facts["block_bytes"])})  # type: ignore[arg-type]
    hashes = np.frombuffer(bytes.fromhex(example["block hash"]), np.uint8)[None]
    keys = namespace.keys(hashes)
    count = int(example["block"].split()[0])
    checksum = int(_core.block_checksums(np.zeros((1, count), np.uint8), keys)[0])
    assert namespace.fingerprint.hex() == example["fingerprint"]
    assert f"{namespace.tenant_digest:016x}" == example["tenant digest"]
    assert keys.tobytes().hex() == example["key"]
    assert f"{checksum:016x}" == example["checksum"]


def test_the_order_of_fields_is_the_one_documented() -> None:
    assert "\n" + " ".join(one.name for one in fields(Namespace)) + "\n" in KEYS


def test_the_example_of_events() -> None:
    block = EVENTS.split("```\n")[1]
    wire = bytes.fromhex("".join(line.split("   ")[0] for line in block.splitlines()))
    event = decode_event(wire)
    assert isinstance(event, BlockStored)
    assert (event.sequence, event.tier, len(event.keys)) == (7, "dram", 16)
    assert encode_event(event) == wire


def test_the_example_of_peers() -> None:
    block = PEERS.split("```\n")[1]
    wire = bytes.fromhex("".join(line.split("   ")[0] for line in block.splitlines()))
    delta = messages.decode(wire)
    assert delta == messages.Delta(1234567, 8, 9, [messages.Change(1, 2, bytes(range(16)))])
    assert messages.encode(delta) == wire


def test_every_message_of_peers_is_documented() -> None:
    documented = re.findall(r"^\| `(\w+)` \| \w+ \| ([\w, ]+) \|", PEERS, re.MULTILINE)
    assert dict(documented) == {
        str(one.__struct_config__.tag): ", ".join(one.__struct_fields__)
        for one in get_args(messages.Message)
    }


def test_the_example_of_objects() -> None:
    example = OBJECT.partition("## Worked example")[2].split("```\n")[1]
    name, *rows = (line.split() for line in example.splitlines())
    namespace = Namespace(model="m", dtype="bfloat16", block_bytes=4096, tenant="a", salt="s")
    blocks = np.zeros((1, 4096), np.uint8)
    keys = namespace.keys(np.arange(32, dtype=np.uint8)[None])
    facts = GroupFacts(namespace.public_id, 8, 1_700_000_000, 1_800_000_000)
    checksums = _core.block_checksums(blocks, keys)
    body = encode(
        GroupShape(1, 4096), facts, keys, checksums, np.array([blocks.ctypes.data])
    ).tobytes()
    assert name[1] == object_name("kvx", namespace.public_id, 1, keys[0].tobytes())
    shown = b""
    for offset, row in rows:
        assert body[int(offset) :].startswith(bytes.fromhex(row)), offset
        shown += bytes.fromhex(row)
    assert len(shown) == len(body) - 4096
