"""Transfers between two agents, beside what else could have moved the same bytes."""
