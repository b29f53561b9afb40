"""Native core of kvx. Use `kvx`; this package only carries the compiled module and its headers."""
