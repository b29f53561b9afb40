"""What else moves bytes from one process to another; each brings its own second process."""
