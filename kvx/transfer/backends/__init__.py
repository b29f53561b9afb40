"""The backends of kvx itself: thin ways over the native core."""
