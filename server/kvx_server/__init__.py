"""Reference server of kvx: frontend, router, workers and a small inference engine."""
