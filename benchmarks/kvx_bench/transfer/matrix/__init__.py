"""`kvx bench transfer` with options: any way, size and direction, on one host or between two."""
