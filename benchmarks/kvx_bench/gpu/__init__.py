"""What the benchmark of GPUs is made of; `cases/gpu.py` puts it together."""
