"""What holds for all tests."""

from __future__ import annotations

import gc

import pytest

from tests.s3.servers import moto_bucket as moto_bucket
from tests.s3.servers import moto_endpoint as moto_endpoint
from tests.s3.servers import needs_rgw as needs_rgw
from tests.s3.servers import rgw_or_none as rgw_or_none
from tests.s3.servers import s3_bucket as s3_bucket
from tests.s3.servers import s3_endpoint as s3_endpoint
from tests.s3.servers import what_answered


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through all that test modules imported.

    With torch and transformers loaded a full collection takes more than 100 ms, which deadline
    tests would take for lateness.
    """
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say which S3 server the tests have been run against."""
    if answered := what_answered(config):
        terminalreporter.write_line(f"S3 server of these tests: {answered}")
