"""The guide names what there is: every metric, every setting, every tier of events."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from vllm.v1.kv_offload.base import OffloadingCounterMetadata

from kvx_vllm.events import RESIDENCES
from kvx_vllm.metrics import definitions
from kvx_vllm.settings import _OF_VLLM, Settings

GUIDE = (Path(__file__).parents[3] / "docs/guides/vllm.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Return the cells of a section's first table, without the marks of code."""
    section = GUIDE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [[cell.strip().replace("`", "") for cell in line.split("|")[1:-1]] for line in lines]
    return cells[2:] if set(cells[1][0]) == {"-"} else cells[1:]


def test_every_metric_is_explained_with_its_labels() -> None:
    explained = {
        name: [label for label in labels.split(", ") if label]
        for names, labels, _ in rows("What each metric says")
        for name in names.split(", ")
    }
    defined = {
        name + "_total" * isinstance(one, OffloadingCounterMetadata): list(one.labelnames)
        for name, one in definitions().items()
    }
    assert explained == defined


def test_every_setting_is_explained_with_its_default() -> None:
    explained = {key: default for key, default, _ in rows("Settings")}
    own = {
        one.name: "empty" if one.default == "" else str(one.default)
        for one in dataclasses.fields(Settings)
        if one.name != "cache"
    }
    of_vllm = dict.fromkeys(_OF_VLLM - {"spec_name", "spec_module_path"})
    assert explained.keys() == own.keys() | of_vllm.keys() | {"config"}
    assert {key: explained[key] for key in own} == own


def test_every_tier_of_events_is_explained() -> None:
    assert rows("Events") == [
        [{"s3": "S3", "nvme": "NVMe", "dram": "DRAM"}[tier], one.medium.value, one.locality.value,
         one.ownership or "none"]
        for tier, one in RESIDENCES.items()
    ]  # fmt: skip


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", GUIDE)
    root = Path(__file__).parents[3] / "docs/guides"
    assert [link for link in links if "://" not in link and not (root / link).exists()] == []
