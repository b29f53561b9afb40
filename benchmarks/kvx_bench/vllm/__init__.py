"""vLLM with kvx below it, beside vLLM alone: what a hit saves, and what the connector costs."""
