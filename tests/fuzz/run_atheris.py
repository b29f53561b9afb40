"""Fuzzes the targets of `targets.py` with atheris; needs `pip install atheris`.

    python tests/fuzz/run_atheris.py lease -runs=1000000
    python tests/fuzz/run_atheris.py lease -max_total_time=600 found/

Takes libFuzzer's options. The committed corpus is read first; what is new goes into the folder that
is given, else into a temporary one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))

with atheris.instrument_imports(include=["kvx.transfer.agents", "kvx.cache.s3", "tests.fuzz"]):
    from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


def main() -> None:
    """Run the target that the first argument names."""
    name, *options = sys.argv[1:] or [""]
    if name not in TARGETS:
        raise SystemExit(f"a target is needed, one of {', '.join(TARGETS)}")
    flags = [option for option in options if option.startswith("-")]
    folders = [option for option in options if not option.startswith("-")]
    # libFuzzer writes into the first folder, so that is never the committed one.
    found = folders or [tempfile.mkdtemp(prefix=f"kvx-fuzz-{name}-")]
    # The decoder is compiled: seeds that differ for it look alike to the fuzzer, so all are kept.
    atheris.Setup([sys.argv[0], "-keep_seed=1", *flags, *found, str(CORPUS / name)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
