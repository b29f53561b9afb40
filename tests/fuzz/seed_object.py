"""Writes the corpus of the target `object`: `python -m tests.fuzz.seed_object`.

Parts of objects that are right, or nearly. The first byte says which part it is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvx.cache.s3.format import GroupFacts, GroupShape, encode
from kvx_ext import _core
from tests.fuzz.targets import OBJECT_KEYS, PUBLIC_ID, SEALER

_TARGET = Path(__file__).parent / "corpus" / "object"
_HEADER, _FOOTER, _PLAIN, _SEALED = (bytes([kind]) for kind in range(4))


def _body(*, is_sealed: bool) -> tuple[GroupShape, bytes]:
    blocks = np.zeros((2, 4096), np.uint8)
    addresses = blocks.ctypes.data + np.arange(2, dtype=np.int64) * 4096
    shape = GroupShape(2, 4096, is_sealed)
    body = encode(
        shape, GroupFacts(PUBLIC_ID, 4, 1_700_000_000, 1_800_000_000), OBJECT_KEYS,
        _core.block_checksums(blocks, OBJECT_KEYS), addresses, sealer=SEALER if is_sealed else None,
    )  # fmt: skip
    return shape, body.tobytes()


def main() -> None:
    """Write every sample."""
    _TARGET.mkdir(parents=True, exist_ok=True)
    samples = {"nothing": b""}
    for name, frames, is_sealed in (("plain", _PLAIN, False), ("sealed", _SEALED, True)):
        shape, body = _body(is_sealed=is_sealed)
        samples[f"{name}_header"] = _HEADER + body[:128]
        samples[f"{name}_footer"] = _FOOTER + body[shape.footer_span[0] :]
        start, size_bytes = shape.span(0, 1)
        samples[f"{name}_mended"] = bytes([4]) + samples[f"{name}_header"][1:]
        samples[f"{name}_frame"] = frames + body[start : start + size_bytes]
    for name, data in samples.items():
        (_TARGET / name).write_bytes(data)


if __name__ == "__main__":
    main()
