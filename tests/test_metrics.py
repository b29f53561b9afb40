"""The metrics as Prometheus reads them, through a parser that accepts nothing else."""

from __future__ import annotations

import math
import re
import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvx
from kvx.errors import UsageError
from kvx.metrics import LATENCY_BUCKETS_S, Registry
from tests.cache.conftest import make_blocks, make_hashes, open_space

SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"(?:,|$)')
SUFFIXES = {"counter": [""], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
Labels = tuple[tuple[str, str], ...]


@dataclass
class Family:
    kind: str
    explanation: str
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)


def unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: {"n": "\n"}.get(found[1], found[1]), text)


def labels_of(text: str) -> Labels:
    found, at = [], 0
    while at < len(text):
        pair = LABEL.match(text, at)
        assert pair is not None, f"malformed labels {text!r}"
        found.append((pair[1], unescaped(pair[2])))
        at = pair.end()
    return tuple(found)


def parse(text: str) -> dict[str, Family]:
    """Read the text format 0.0.4: HELP, TYPE and the samples of one family after the other."""
    assert text.endswith("\n")
    families: dict[str, Family] = {}
    lines = iter(text.removesuffix("\n").split("\n"))
    name = ""
    for line in lines:
        if line.startswith("# HELP "):
            _, _, name, explanation = line.split(" ", 3)
            keyword, of_name, kind = next(lines).removeprefix("# ").split(" ")
            assert (keyword, of_name) == ("TYPE", name)
            assert name not in families
            families[name] = Family(kind, unescaped(explanation))
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample is not None, f"malformed line {line!r}"
        family = families[name]
        assert sample[1] in [name + suffix for suffix in SUFFIXES[family.kind]]
        key = (sample[1], labels_of(sample[2] or ""))
        assert key not in family.samples, f"{key} stands there twice"
        family.samples[key] = float(sample[3])
    return families


def test_the_parser_refuses_what_is_malformed() -> None:
    head = "# HELP a b\n# TYPE a counter\n"
    assert parse(head + 'a{x="1"} 2\n')["a"].samples == {("a", (("x", "1"),)): 2.0}
    for line in (
        "a",
        "a{x=1} 2\n",
        'a{x="1} 2\n',
        "b 1\n",
        "a 1\na 1\n",
        "a x\n",
        'a{x="\\q"} 1\n',
    ):
        with pytest.raises((AssertionError, ValueError)):
            parse(head + line)


@given(st.lists(st.tuples(st.text(max_size=8), st.floats(0, 1e18)), max_size=10), st.text())
def test_counters_survive_the_text(additions: list[tuple[str, float]], explanation: str) -> None:
    """Any label value and every digit of the number come through."""
    explanation = explanation.replace("\r", "")
    registry = Registry()
    counter = registry.counter("kvx_x_total", explanation, ("who", "what"))
    model: dict[str, float] = {}
    for who, amount in additions:
        counter.add(amount, (who, 'fixed "quoted" \\ text'))
        model[who] = model.get(who, 0.0) + amount
    family = parse(registry.render())["kvx_x_total"]
    assert (family.kind, family.explanation) == ("counter", explanation)
    found = {dict(labels)["who"]: value for (_, labels), value in family.samples.items()}
    assert found == model
    assert all(dict(labels)["what"] == 'fixed "quoted" \\ text' for _, labels in family.samples)
    assert all(counter.value((who, 'fixed "quoted" \\ text')) == n for who, n in model.items())


def test_a_counter_of_bytes_keeps_every_byte() -> None:
    registry = Registry()
    registry.counter("kvx_bytes_total", "b").add(123_456_789_012_345)
    assert "kvx_bytes_total 123456789012345\n" in registry.render()


@given(st.lists(st.floats(0, 1000) | st.sampled_from(LATENCY_BUCKETS_S), max_size=50))
def test_histograms_are_cumulative(times: list[float]) -> None:
    registry = Registry()
    histogram = registry.histogram("kvx_t_seconds", "t", ("verb",))
    for seconds in times:
        histogram.observe(seconds, ("onboard",))
    samples = parse(registry.render())["kvx_t_seconds"].samples
    if not times:
        assert samples == {}
        return
    buckets = [
        (math.inf if dict(labels)["le"] == "+Inf" else float(dict(labels)["le"]), value)
        for (name, labels), value in samples.items()
        if name.endswith("_bucket")
    ]
    assert [bound for bound, _ in buckets] == sorted(bound for bound, _ in buckets)
    assert [value for _, value in buckets] == sorted(value for _, value in buckets)
    exact = [*LATENCY_BUCKETS_S, math.inf]
    for (shown, count), bound in zip(buckets, exact, strict=True):
        assert shown == pytest.approx(bound, rel=1e-5)
        assert count == sum(seconds <= bound for seconds in times)
    labels = (("verb", "onboard"),)
    assert samples["kvx_t_seconds_count", labels] == len(times)
    assert samples["kvx_t_seconds_sum", labels] == pytest.approx(sum(times))


def test_gauges_are_read_when_rendered() -> None:
    registry = Registry()
    value = [1.5]
    registry.gauge("kvx_g", "g", lambda: value[0])
    assert parse(registry.render())["kvx_g"].samples == {("kvx_g", ()): 1.5}
    value[0] = math.inf
    assert parse(registry.render())["kvx_g"].samples == {("kvx_g", ()): math.inf}


def test_mistakes_are_refused() -> None:
    registry = Registry()
    counter = registry.counter("kvx_a_total", "a", ("verb",))
    with pytest.raises(UsageError, match="registered already"):
        registry.gauge("kvx_a_total", "a", lambda: 0.0)
    with pytest.raises(UsageError, match=r"kvx_a_total has labels \('verb',\)"):
        counter.add(1, ())
    with pytest.raises(UsageError, match="has labels"):
        registry.histogram("kvx_b", "b").observe(1, ("x",))
    assert Registry().render() == "\n"


def test_threads_lose_nothing() -> None:
    registry = Registry()
    counter = registry.counter("kvx_a_total", "a")
    histogram = registry.histogram("kvx_b", "b")

    def add() -> None:
        for _ in range(2000):
            counter.add(1)
            histogram.observe(0.1)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        parse(registry.render())
    for thread in threads:
        thread.join()
    assert counter.value() == 8000
    assert parse(registry.render())["kvx_b"].samples["kvx_b_count", ()] == 8000


def test_what_a_cache_counts_parses() -> None:
    with kvx.TieredCache.open({"tiers": [{"kind": "dram", "capacity": "2MiB"}]}) as cache:
        space = open_space(cache)
        space.offload(make_hashes(3), make_blocks(3)).wait()
        space.onboard(make_hashes(5), make_blocks(5)).wait()
        families = parse(cache.metrics.render())
    assert all(name.startswith("kvx_") for name in families)
    assert all(name.endswith("_total") for name, one in families.items() if one.kind == "counter")
    misses = families["kvx_misses_total"].samples
    assert misses["kvx_misses_total", (("verb", "onboard"), ("reason", "never_stored"))] == 2
    blocks = families["kvx_blocks_total"].samples
    assert blocks["kvx_blocks_total", (("verb", "onboard"), ("tier", "dram"))] == 3
