"""What the checksum costs when it is folded into the copy, beside other checksums."""

from __future__ import annotations

import zlib
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kvx_bench.copying import prefaulted
from kvx_bench.row import Row, paired, throughput_row, timed
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    import numpy.typing as npt

    from kvx_bench.case import Options
    from kvx_bench.row import Sample

_BLOCK_BYTES = 2 << 20


class ChecksumCase:
    """One thread, 2 MiB blocks between prefaulted arenas."""

    name = "checksum"
    description = "the fused checksum and its share of the copy"

    def why_not(self, _options: Options) -> str:
        """It runs everywhere."""
        return ""

    def run(self, options: Options) -> Iterator[Row]:
        """Every kernel against a copy with the same stores; then two-pass alternatives."""
        num_bytes = (64 if options.is_quick else 256) * _BLOCK_BYTES
        source = prefaulted(num_bytes, fill=7)
        target = prefaulted(num_bytes, fill=0)

        def each_block(work: Callable[[slice], object]) -> Sample:
            spans = [slice(at, at + _BLOCK_BYTES) for at in range(0, num_bytes, _BLOCK_BYTES)]
            return timed(lambda: [work(span) for span in spans])

        def copy_only() -> Sample:
            return each_block(lambda span: _core.copy_only(target[span], source[span]))

        for place, kernel in enumerate(_core.checksum_kernels()):

            def fused(name: str = kernel) -> Sample:
                return each_block(
                    lambda span: _core.copy_with_crc64(target[span], source[span], kernel=name)
                )

            suffix = "" if place == 0 else f".{kernel}"
            yield throughput_row(
                f"checksum.fused.2MiB{suffix}",
                num_bytes,
                paired(fused, copy_only, repeats=options.repeats),
                note=f"CRC-64/NVME, {kernel}; limit: copy alone, same stores",
            )
        for name, digest in _second_pass_digests().items():

            def two_passes(digest: Callable[[npt.NDArray[np.uint8]], object] = digest) -> Sample:
                def work(span: slice) -> None:
                    _core.copy_only(target[span], source[span])
                    digest(source[span])

                return each_block(work)

            yield throughput_row(
                f"checksum.two-pass.2MiB.{name}",
                num_bytes,
                paired(two_passes, copy_only, repeats=3),
                note="copy, then checksum: what folding it in avoids",
            )


def _second_pass_digests() -> dict[str, Callable[[npt.NDArray[np.uint8]], object]]:
    """Return checksums that need a pass of their own; those of other packages where installed."""
    found: dict[str, Callable[[npt.NDArray[np.uint8]], object]] = {
        "crc64-nvme": _core.crc64,
        "zlib-crc32": lambda block: zlib.crc32(block.data),
    }
    if find_spec("xxhash"):
        found["xxh3-64"] = import_module("xxhash").xxh3_64_intdigest
    return found
