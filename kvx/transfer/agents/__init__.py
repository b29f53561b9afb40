"""Agents: the endpoints that read and write each other's leased memory."""
