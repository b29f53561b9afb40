"""Prefill on one engine, decode on another: the KV of a prompt is handed over by kvx peers.

A reference says where to look, never what is true: the decode engine computes the keys of blocks
from its own prompt, so whatever a reference says, no other prompt's KV can be served under it.

handoff     what the connector sees      producer   references that this engine gave out
reference   what travels with a request  consumer   references that it was given
messages    what the two engines say     proxy, command   `kvx pd-proxy`
"""
