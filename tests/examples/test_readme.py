"""The examples of README.md and of the guides run as they stand and print what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROMISED = {
    "README.md": ["8 NEVER_STORED", "8 True", "2 True"],
    "docs/guides/gpu.md": ["24 24", "24 True"],
    "docs/guides/agents.md": ["3 True", "local: chosen", "b'ok'", "the lease has ended"],
}


@pytest.mark.parametrize("name", PROMISED)
def test_the_example_prints_what_it_says(tmp_path: Path, name: str) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert examples, "the page shows some"
    example = "\n".join(examples)
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", example, re.MULTILINE)
    assert promised == PROMISED[name]
    script = tmp_path / "example.py"
    script.write_text(example)
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == promised


@pytest.mark.parametrize("name", PROMISED)
def test_every_link_leads_somewhere(name: str) -> None:
    path = ROOT / name
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert missing == []
