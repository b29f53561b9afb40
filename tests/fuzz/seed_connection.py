"""Writes the corpus of fuzz_connection: `python -m tests.fuzz.seed_connection`.

Streams that are right, or nearly, so that the fuzzer begins behind the first header. An input is
a byte of how many choices follow (128 and more: the headers are mended), the choices, and the
stream.
"""

from __future__ import annotations

from pathlib import Path

from tests.transfer.faults import frames
from tests.transfer.faults.frames import Type

_TARGET = Path(__file__).parent / "corpus" / "connection"
# Bytes of the blocks of each sink, as fuzz_connection.cpp has them.
_SINKS = ((64, 1, 300), (128, 150), (2048,), (200, 7, 7, 7))
_CHOICES = {
    "plain": b"",
    "slow": bytes([0] + [5] * 30),
    "known": bytes([15]),
    "meddled": bytes([0] + [21, 0x80, 33, 0x40, 200] * 8)[:40],
}


def _blocks(sink: int) -> list[bytes]:
    return [bytes((place * 7 + sink) & 255 for place in range(size)) for size in _SINKS[sink]]


def _whole(sink: int) -> bytes:
    blocks = _blocks(sink)
    return frames.piece(sink, 0, b"".join(blocks), [frames.trailer(block) for block in blocks])


def _interleaved() -> bytes:
    """Return two transfers in two pieces each, cut within blocks."""
    ours, theirs = b"".join(_blocks(0)), b"".join(_blocks(3))
    first = [frames.trailer(block) for block in _blocks(0)]
    second = [frames.trailer(block) for block in _blocks(3)]
    return (
        frames.piece(0, 0, ours[:70], first[:2])
        + frames.piece(3, 0, theirs[:100], [])
        + frames.piece(0, 70, ours[70:], first[2:])
        + frames.piece(3, 100, theirs[100:], second)
    )


def _past_the_end() -> bytes:
    blocks = _blocks(0)
    trailers = [frames.trailer(block) for block in blocks]
    return frames.piece(0, 0, b"".join(blocks) + b"more than there is room for", trailers)


def _requests() -> bytes:
    lease = (1, 1, 1)
    return (
        frames.request(Type.READ, 1, lease, indices=[0, 1])
        + frames.frame(Type.MESSAGE, b"x" * 200)
        + frames.request(Type.WRITE, 2, lease, rows=[(0, 0, 1, 5)])
    )


def main() -> None:
    """Write every sample."""
    _TARGET.mkdir(parents=True, exist_ok=True)
    answers = frames.frame(Type.PING, number=3) + frames.done(9, 7)
    streams = {f"sink_{sink}": _whole(sink) + answers for sink in range(len(_SINKS))}
    streams |= {"interleaved": _interleaved(), "requests": _requests()}
    streams["past_the_end"] = _past_the_end()
    for name, stream in streams.items():
        for way, choices in _CHOICES.items():
            (_TARGET / f"{name}_{way}").write_bytes(bytes([len(choices)]) + choices + stream)
    (_TARGET / "mended").write_bytes(bytes([128]) + _interleaved())


if __name__ == "__main__":
    main()
