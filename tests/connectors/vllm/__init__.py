"""The connector in the real engine, on CPU; in a venv of its own: see `make test-vllm`."""
