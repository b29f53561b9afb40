"""Bytes that move: regions, transfers and their handles."""
