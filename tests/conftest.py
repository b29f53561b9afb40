"""What holds for all tests."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through all that test modules imported.

    With torch and transformers loaded a full collection takes more than 100 ms, which deadline
    tests would take for lateness.
    """
    gc.collect()
    gc.freeze()
