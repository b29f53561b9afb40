"""Ways to move bytes between agents; each is one module or folder behind `kvx.transfer.backend`."""
