"""Benchmarks of kvx: every row states its limit, measured in the same run."""
