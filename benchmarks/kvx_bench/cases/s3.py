"""Blocks to and from a bucket, beside every other client of the same server in the same run."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kvx_bench.row import Row
from kvx_bench.s3.bucket import Bucket
from kvx_bench.s3.contests import contest_rows
from kvx_bench.s3.lines import first_block_rows, line_rows
from kvx_bench.s3.outage import frozen_rows
from kvx_bench.s3.rgw import Rgw
from kvx_bench.s3.rig import Rig
from kvx_bench.s3.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvx_bench.case import Options

_BLOCK_BYTES = 2 << 20
_BLOCKS, _BLOCKS_QUICK = 256, 24
_LONG_PROMPT, _LONG_PROMPT_QUICK = 512, 32
_ROUNDS, _ROUNDS_QUICK = 5, 2
_SERVER_BYTES = 8 << 30


class S3Case:
    """Gets and puts, through a line that takes longer, and beside a server that stands still."""

    name = "s3"
    description = "blocks to and from a bucket"

    def why_not(self, options: Options) -> str:
        """Say when there is no server, or nothing to look after the bucket with."""
        if find_spec("boto3") is None:
            return "boto3 is not installed; pip install 'kvx[bench,s3]'"
        if options.endpoint or not Rgw.why_not():
            return ""
        return f"no --endpoint is named, and there is no server to start: {Rgw.why_not()}"

    def run(self, options: Options) -> Iterator[Row]:
        """256 x 2 MiB each way by everybody, then what kvx alone has to show."""
        is_quick = options.is_quick
        with contextlib.ExitStack() as made:
            service = (
                Service(options.endpoint, region=options.region)
                if options.endpoint
                else made.enter_context(Rgw(memory_bytes=_SERVER_BYTES)).service
            )
            rig = Rig(
                made.enter_context(Bucket(service, options.bucket)),
                options.concurrency,
                _BLOCKS_QUICK if is_quick else _BLOCKS,
                _BLOCK_BYTES,
                _ROUNDS_QUICK if is_quick else _ROUNDS,
                is_quick,
            )
            yield Row("s3.server", note=f"{service.software} at {service.url}")
            yield from contest_rows(rig)
            if service.is_tls:
                yield Row("s3.line", note="not here because TLS allows nobody in between")
                return
            yield from line_rows(rig)
            yield from first_block_rows(rig, _LONG_PROMPT_QUICK if is_quick else _LONG_PROMPT)
            yield from frozen_rows(rig, options.path)
