"""What needs a GPU: the same tests on a real one and on the simulated driver."""
