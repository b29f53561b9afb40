"""Two kvx agents that move blocks: the initiator and the target, each in a process of its own."""
