"""The `kvx` command: one file a verb, thin over the library."""
