"""The example of docs/guides/gpu.md runs as it stands and prints what its comments say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs" / "guides" / "gpu.md"
GUIDE = PATH.read_text()


def test_the_example_prints_what_it_says(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", example, re.MULTILINE)
    assert promised == ["24 24", "24 True"]
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


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", GUIDE)
    assert [link for link in links if not (PATH.parent / link).exists()] == []
