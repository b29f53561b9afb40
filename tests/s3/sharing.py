"""A machine of its own, as far as a test goes: a process with DRAM and NVMe that nobody shares.

python -m tests.s3.sharing CONFIG_JSON FIRST COUNT
"""

from __future__ import annotations

import json
import sys

import kvx
from tests.cache.conftest import BLOCK_BYTES, make_blocks, make_hashes


def open_space(config: object) -> tuple[kvx.TieredCache, kvx.CacheSpace]:
    """Open a cache and the namespace that all machines use."""
    cache = kvx.TieredCache.open(config)
    return cache, cache.namespace(model="m", dtype="bf16", block_bytes=BLOCK_BYTES, tenant="a")


def say(word: str) -> None:
    """Tell the test."""
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def main() -> None:
    """Store a prompt of `COUNT` blocks, say so, and go on storing until killed or told to end."""
    config, first, count = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    cache, space = open_space(config)
    with cache:
        space.offload(make_hashes(count, first=first), make_blocks(count, first=first)).wait()
        say("stored" if cache.flush(30.0) else "not stored")
        for line in sys.stdin:
            begin = int(line)
            space.offload(make_hashes(count, first=begin), make_blocks(count, first=begin)).wait()
            say("offloaded")


if __name__ == "__main__":
    main()
