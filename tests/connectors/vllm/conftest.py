"""Where vLLM is not installed, nothing here is collected: `make test-vllm` has a venv with it."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py", "*/test_*.py"]
else:
    from tests.connectors.vllm.below import one_engine as one_engine
    from tests.connectors.vllm.engine import tiny_llama as tiny_llama
