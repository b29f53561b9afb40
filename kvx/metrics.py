"""Counters, gauges and histograms that render as Prometheus text (format 0.0.4).

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import bisect
import threading
from typing import TYPE_CHECKING, TypeVar

from kvx.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# 10 us to 100 s, four a decade.
LATENCY_BUCKETS_S = tuple(round(10 ** (power / 4), 10) for power in range(-20, 9))

Labels = tuple[str, ...]
MetricT = TypeVar("MetricT", bound="_Metric")


class _Metric:
    """Name, help and labels; a value for each combination of label values."""

    kind = ""

    def __init__(self, name: str, explanation: str, labels: Sequence[str]) -> None:
        self.name = name
        self.explanation = explanation
        self.labels = tuple(labels)
        self._lock = threading.Lock()

    def lines(self) -> list[str]:
        """Return the samples as text."""
        raise AssertionError("a metric renders its samples")

    def _check(self, values: Labels) -> None:
        if len(values) != len(self.labels):
            raise UsageError(f"{self.name} has labels {self.labels}, not values {values}")

    def _labelled(self, values: Labels, suffix: str = "", extra: str = "") -> str:
        pairs = [
            f'{label}="{_escaped(value)}"' for label, value in zip(self.labels, values, strict=True)
        ]
        inside = ",".join([*pairs, *([extra] if extra else [])])
        return f"{self.name}{suffix}" + (f"{{{inside}}}" if inside else "")


class Counter(_Metric):
    """A number that only grows."""

    kind = "counter"

    def __init__(self, name: str, explanation: str, labels: Sequence[str]) -> None:
        """Start empty."""
        super().__init__(name, explanation, labels)
        self._values: dict[Labels, float] = {}

    def add(self, amount: float, values: Labels = ()) -> None:
        """Add to the counter of these label values."""
        with self._lock:
            if values not in self._values:
                self._check(values)
            self._values[values] = self._values.get(values, 0.0) + amount

    def value(self, values: Labels = ()) -> float:
        """Return the count of these label values."""
        return self._values.get(values, 0.0)

    def lines(self) -> list[str]:
        """Return the samples as text."""
        with self._lock:
            return [f"{self._labelled(key)} {_shown(value)}" for key, value in self._values.items()]


class Gauge(_Metric):
    """A number read when the metrics are rendered."""

    kind = "gauge"

    def __init__(self, name: str, explanation: str, read: Callable[[], float]) -> None:
        """Read the value with `read`."""
        super().__init__(name, explanation, ())
        self._read = read

    def lines(self) -> list[str]:
        """Return the sample as text."""
        return [f"{self.name} {_shown(self._read())}"]


class Histogram(_Metric):
    """How often a time fell into which range."""

    kind = "histogram"

    def __init__(self, name: str, explanation: str, labels: Sequence[str]) -> None:
        """Start empty, with `LATENCY_BUCKETS_S`."""
        super().__init__(name, explanation, labels)
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def observe(self, seconds: float, values: Labels = ()) -> None:
        """Count one time."""
        with self._lock:
            if values not in self._counts:
                self._check(values)
                self._counts[values] = [0] * (len(LATENCY_BUCKETS_S) + 1)
                self._sums[values] = 0.0
            self._counts[values][bisect.bisect_left(LATENCY_BUCKETS_S, seconds)] += 1
            self._sums[values] += seconds

    def lines(self) -> list[str]:
        """Return the samples as text."""
        found = []
        with self._lock:
            for values, counts in self._counts.items():
                total = 0
                for bound, count in zip((*LATENCY_BUCKETS_S, None), counts, strict=True):
                    total += count
                    edge = "+Inf" if bound is None else f"{bound:g}"
                    name = self._labelled(values, "_bucket", f'le="{edge}"')
                    found.append(f"{name} {total}")
                found.append(f"{self._labelled(values, '_sum')} {_shown(self._sums[values])}")
                found.append(f"{self._labelled(values, '_count')} {total}")
        return found


class Registry:
    """The metrics of one cache. Thread-safe."""

    def __init__(self) -> None:
        """Start empty."""
        self._metrics: dict[str, _Metric] = {}

    def counter(self, name: str, explanation: str, labels: Sequence[str] = ()) -> Counter:
        """Register a counter; its name ends in ``_total``."""
        return self._add(Counter(name, explanation, labels))

    def gauge(self, name: str, explanation: str, read: Callable[[], float]) -> Gauge:
        """Register a gauge that is read with `read`."""
        return self._add(Gauge(name, explanation, read))

    def histogram(self, name: str, explanation: str, labels: Sequence[str] = ()) -> Histogram:
        """Register a histogram of seconds."""
        return self._add(Histogram(name, explanation, labels))

    def render(self) -> str:
        """Return everything as Prometheus text."""
        lines = []
        for metric in self._metrics.values():
            lines.append(f"# HELP {metric.name} {_escaped_help(metric.explanation)}")
            lines.append(f"# TYPE {metric.name} {metric.kind}")
            lines += metric.lines()
        return "\n".join(lines) + "\n"

    def _add(self, metric: MetricT) -> MetricT:
        if metric.name in self._metrics:
            raise UsageError(f"{metric.name} is registered already")
        self._metrics[metric.name] = metric
        return metric


def _shown(value: float) -> str:
    """Return the shortest text that reads back as the same number: counters of bytes are large."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _escaped_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _escaped(text: str) -> str:
    return _escaped_help(text).replace('"', '\\"')
