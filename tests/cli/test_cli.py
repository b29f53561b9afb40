"""The `kvx` command, as a person or a script calls it."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import kvx
from kvx.cli.main import main, verbs
from kvx.namespace import public_id
from tests.cache.conftest import make_blocks, make_hashes, open_space

if TYPE_CHECKING:
    from pathlib import Path

BLOCKS = 24


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return the directory of a closed NVMe tier with blocks of two namespaces."""
    path = tmp_path / "tier"
    config = {
        "tiers": [
            {"kind": "dram", "capacity": "2MiB"},
            {"kind": "nvme", "path": str(path), "capacity": "16MiB", "extent": "4MiB"},
        ]
    }
    with kvx.TieredCache.open(config) as cache:
        open_space(cache).offload(make_hashes(BLOCKS), make_blocks(BLOCKS)).wait()
        other = open_space(cache, block_bytes=5000, tenant="b")
        other.offload(make_hashes(3), make_blocks(3, block_bytes=5000)).wait()
    return path


def flip_bit(store: Path) -> None:
    """Damage one payload byte of one block."""
    places = next(one for one in kvx.iter_disk_blocks(store) if len(one.offsets))
    with places.path.open("r+b") as file:
        file.seek(int(places.offsets[0]) + 17)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def unwrapped(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"kvx {kvx.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["doctor", "--loud"], ["inspect"]])
def test_mistakes_end_with_2_and_a_usage_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: kvx" in capsys.readouterr().err


def test_an_unknown_verb_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fly"])
    message = capsys.readouterr().err
    assert "'fly'" in message
    assert "doctor" in message
    assert "inspect" in message


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, verb in verbs().items():
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert unwrapped(verb.HELP) in unwrapped(capsys.readouterr().out)


def test_a_verb_that_cannot_be_imported_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = importlib.metadata.EntryPoint("fly", "kvx_wings.command", "kvx.commands")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [broken])  # noqa: ARG005
    assert sorted(verbs()) == ["doctor", "gc", "inspect"]
    assert "'fly' is not available: No module named 'kvx_wings'" in capsys.readouterr().err


def test_doctor_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--path", str(tmp_path)]) == 0
    findings = json.loads(capsys.readouterr().out)
    by_subject = {finding["subject"]: finding for finding in findings}
    assert {"checksums", "CPUs", "huge pages", "io_uring", "direct I/O", "GPU"} <= set(by_subject)
    for finding in findings:
        assert set(finding) == {"subject", "is_good", "found", "remedy"}
        assert finding["found"]
        assert finding["is_good"] or finding["remedy"], finding
    assert list(tmp_path.iterdir()) == []


def test_doctor_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "checksums" in capsys.readouterr().out


def test_doctor_for_a_directory_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tier's directory is made when it is opened: doctor looks at where it would lie."""
    assert main(["doctor", "--json", "--path", str(tmp_path / "not" / "yet")]) == 0
    findings = {one["subject"]: one for one in json.loads(capsys.readouterr().out)}
    assert "disk space" in findings


def test_inspect_shows_what_is_there(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(store)]) == 0
    shown = capsys.readouterr().out
    fingerprints = {
        public_id(space.fingerprint).hex() for space in kvx.describe_disk(store, now_s=0).namespaces
    }
    assert len(fingerprints) == 2
    for fingerprint in fingerprints:
        assert fingerprint in shown
    assert f"{BLOCKS}" in shown
    assert "16.0 MiB" in shown


def test_inspect_verifies_every_block(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(store), "--verify"]) == 0
    assert f"{BLOCKS + 3} blocks read, 0 damaged" in capsys.readouterr().out


def test_a_damaged_block_ends_with_1(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_bit(store)
    assert main(["inspect", str(store)]) == 0
    assert main(["inspect", str(store), "--verify"]) == 1
    assert f"{BLOCKS + 3} blocks read, 1 damaged" in capsys.readouterr().out


def test_inspecting_changes_nothing(store: Path) -> None:
    before = {path: path.read_bytes() for path in sorted(store.iterdir())}
    main(["inspect", str(store), "--verify"])
    assert {path: path.read_bytes() for path in sorted(store.iterdir())} == before


def test_inspect_of_an_open_store_says_so(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiers = [
        {"kind": "dram", "capacity": "2MiB"},
        {"kind": "nvme", "path": str(store), "capacity": "16MiB", "extent": "4MiB"},
    ]
    with kvx.TieredCache.open({"tiers": tiers}):
        assert main(["inspect", str(store)]) == 0
    assert "the numbers are a sample" in unwrapped(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_inspect_of_no_store(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / name)]) == 1
    assert str(tmp_path / name) in capsys.readouterr().err


def test_as_a_program(store: Path) -> None:
    """From a shell: exit code, streams, and no traceback."""
    flip_bit(store)
    command = [sys.executable, "-m", "kvx.cli.main", "inspect", str(store), "--verify"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "1 damaged" in ended.stdout
    assert ended.stderr == ""
    missing = subprocess.run(
        [*command[:4], "/nowhere"], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 1
    assert missing.stderr.startswith("kvx inspect: /nowhere")
