"""docs/guides/configuration.md names every option with its default and its bounds."""

from __future__ import annotations

import dataclasses
import json
import re
from enum import StrEnum
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from kvx import config, records, sizes, tier_config
from kvx.transfer.agents.config import AgentConfig

GUIDE = (Path(__file__).parents[2] / "docs/guides/configuration.md").read_text()
SECTIONS: dict[str, type] = {
    "The cache": config.CacheConfig,
    "`gpu`": config.GpuConfig,
    "`kind: hbm`": tier_config.HbmTierConfig,
    "`kind: dram`": tier_config.DramTierConfig,
    "`kind: nvme`": tier_config.NvmeTierConfig,
    "`kind: s3`": tier_config.S3TierConfig,
    "`kind: peer`": tier_config.PeerTierConfig,
    "`admission`": tier_config.AdmissionConfig,
    "`admission` of `s3`": tier_config.S3AdmissionConfig,
    "`breaker`": config.BreakerConfig,
    "`tenants`": config.TenantConfig,
    "Agents": AgentConfig,
}


def rows(heading: str) -> dict[str, list[str]]:
    """Return the cells of a section's table by option."""
    section = re.split(r"^#+ ", GUIDE.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)
    found = re.findall(r"^\| `(\w+)` \|(.*)\|$", section[0], re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in found}


def shown_default(field: dataclasses.Field[object]) -> str:
    has_factory = field.default_factory is not dataclasses.MISSING
    value = field.default_factory() if has_factory else field.default  # type: ignore[misc]
    if field.name == "kind" or value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "none"
    if dataclasses.is_dataclass(value):
        return "below"
    if isinstance(value, StrEnum):
        return f"`{value}`"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


@pytest.mark.parametrize("heading", SECTIONS)
def test_options_and_defaults(heading: str) -> None:
    documented = {name: cells[0] for name, cells in rows(heading).items()}
    assert documented == {
        records.spellings(field.name)[0]: shown_default(field)
        for field in dataclasses.fields(SECTIONS[heading])
    }


@pytest.mark.parametrize("heading", SECTIONS)
def test_what_is_accepted(heading: str) -> None:
    record = SECTIONS[heading]
    table, hints = rows(heading), get_type_hints(record)
    for field in dataclasses.fields(record):
        accepted = table[records.spellings(field.name)[0]][1]
        setting, hint = records.setting_of(field), hints[field.name]
        is_choice = isinstance(hint, type) and issubclass(hint, StrEnum)
        if is_choice and hint is not tier_config.Eviction:
            assert accepted == ", ".join(f"`{member}`" for member in hint)
        elif setting.minimum and setting.maximum is None:
            is_size = field.name.endswith("_bytes")
            least = sizes.format_bytes(int(setting.minimum)) if is_size else f"{setting.minimum:g}"
            assert accepted == f"from {least}"
        elif setting.maximum is not None:
            assert accepted == f"{setting.minimum:g} to {setting.maximum:g}"


def test_every_eviction_is_explained() -> None:
    section = GUIDE.split("## Eviction\n")[1].split("##")[0]
    assert re.findall(r"`(\w+)`", section) == [str(one) for one in tier_config.Eviction]


def test_every_variable_is_there() -> None:
    names = r"KVX_[A-Z_]*[A-Z](?:_<NAME>)?"
    documented = re.findall(rf"^\| `({names})`", GUIDE, re.MULTILINE)
    assert documented == re.findall(rf"^    ({names})", config.__doc__ or "", re.MULTILINE)
    assert len(documented) == 10


def test_the_example_loads() -> None:
    example = GUIDE.split("```yaml\n")[1].split("```")[0]
    loaded = config.CacheConfig.load(yaml.safe_load(example))
    assert loaded.deadline_s == 2.0
    assert len(loaded.tiers) == 2
