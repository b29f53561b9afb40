"""`kvx inspect s3://...` and `kvx gc s3://...`, as a person or a script calls them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvx.cli.figures import printable, seconds
from kvx.cli.main import main
from tests.cache.s3.groups import SEALER, Group
from tests.cache.s3.stocking import of_version
from tests.s3.servers import Bucket

KEY = bytes(range(100, 132))


@pytest.fixture(params=["moto", "real"])
def stocked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Return a bucket with two good objects, an expired, a damaged, a later and a strange one."""
    fixture = "moto_bucket" if request.param == "moto" else "s3_bucket"
    bucket: Bucket = request.getfixturevalue(fixture)
    keys = bucket.service.keys
    assert keys is not None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_key)
    for group in (Group(), Group(seed=1, sealer=SEALER), Group(seed=2, expiry_s=1)):
        bucket.put(group.name(), group.encode().tobytes())
    damaged = Group(seed=3)
    bucket.put(damaged.name(), damaged.encode().tobytes()[:-1])
    bucket.put("kvx/v2/later", of_version(2))
    bucket.put("kvx/notes", b"precious")
    return bucket


def kvx(verb: str, bucket: Bucket, *options: str, path: str = "/kvx") -> int:
    return main([verb, bucket.address + path, "--endpoint", bucket.service.url, *options])


def unwrapped(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_inspect_shows_what_is_there(stocked: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvx("inspect", stocked) == 0
    shown = unwrapped(capsys.readouterr().out)
    assert Group().public_id.hex() in shown
    assert "1 objects of other format versions" in shown
    assert "1 objects that are not kvx's, 8.0 B" in shown
    assert f"s3://{stocked.name}/kvx" in shown


def test_inspect_verifies_every_block(
    stocked: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kvx("inspect", stocked, "--verify") == 1
    shown = unwrapped(capsys.readouterr().out)
    assert "8 blocks read, 0 damaged; 1 objects damaged" in shown
    assert "4 blocks are sealed with a key that is not here" in shown
    body = bytearray(Group().encode().tobytes())
    body[3000] ^= 1
    stocked.put(Group().name(), bytes(body))
    file = tmp_path / "key"
    file.write_bytes(KEY)
    file.chmod(0o600)
    assert kvx("inspect", stocked, "--verify", "--seal-key-file", str(file)) == 1
    shown = unwrapped(capsys.readouterr().out)
    assert "12 blocks read, 1 damaged; 2 objects damaged" in shown
    assert Group().name() in shown.replace(" ", "")
    assert "sealed with" not in shown


def test_a_dry_run_changes_nothing(stocked: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    before = stocked.names()
    assert kvx("gc", stocked, "--other-versions", "--names") == 0
    shown = capsys.readouterr().out
    assert "3 objects are garbage" in unwrapped(shown)
    assert "nothing was deleted: --delete does it" in unwrapped(shown)
    listed = [line.split("\t")[0] for line in shown.splitlines() if "\t" in line]
    assert sorted(listed) == sorted([Group(seed=2).name(), Group(seed=3).name(), "kvx/v2/later"])
    assert stocked.names() == before


def test_garbage_is_deleted(stocked: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    assert kvx("gc", stocked, "--delete") == 0
    shown = unwrapped(capsys.readouterr().out)
    assert "2 objects deleted" in shown
    assert "expired" in shown
    assert "damaged" in shown
    good = [Group().name(), Group(seed=1, sealer=SEALER).name()]
    assert stocked.names() == sorted([*good, "kvx/v2/later", "kvx/notes"])
    assert kvx("gc", stocked, "--delete", "--other-versions", "--older-than", "0s") == 0
    assert stocked.names() == ["kvx/notes"]


def test_the_configuration_says_the_rest(
    stocked: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cache.yaml"
    path.write_text(
        "tiers: [{kind: dram, capacity: 2MiB}, {kind: s3, bucket: other, prefix: kvx, "
        f"endpoint: '{stocked.service.url}'}}]"
    )
    assert main(["gc", stocked.address, "--config", str(path)]) == 0
    assert "2 objects are garbage" in unwrapped(capsys.readouterr().out)
    assert main(["gc", stocked.address + "/", "--config", str(path)]) == 0
    assert "0 objects are garbage" in unwrapped(capsys.readouterr().out), "no prefix is another one"


def test_keys_of_tenants_are_those_of_the_configuration(
    stocked: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, path = tmp_path / "key", tmp_path / "cache.yaml"
    path.write_text(
        "tiers: [{kind: dram, capacity: 2MiB}, {kind: s3, bucket: other, prefix: kvx, "
        f"endpoint: '{stocked.service.url}', seal_keys: {{a: {{file: {key}}}}}}}]"
    )
    # No key is needed to count and to clean.
    for verb, *options in (["inspect"], ["gc"]):
        assert main([verb, stocked.address, "--config", str(path), *options]) == 0
    verify = ["inspect", stocked.address, "--config", str(path), "--verify"]
    assert main(verify) == 1
    assert f"seal_keys.a.file: {key}: the key cannot be read" in capsys.readouterr().err
    for content, what in ((bytes(31) + b"!", "8 blocks read"), (KEY, "12 blocks read")):
        key.write_bytes(content)
        key.chmod(0o600)
        assert main(verify) == 1, "the damaged one"
        assert f"{what}, 0 damaged" in unwrapped(capsys.readouterr().out)
    other = tmp_path / "other"
    other.write_bytes(KEY)
    other.chmod(0o600)
    key.unlink()
    assert main([*verify, "--seal-key-file", str(other)]) == 1
    assert "12 blocks read, 0 damaged" in unwrapped(capsys.readouterr().out)


def test_a_bucket_that_is_not_there(stocked: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["s3://no-such-bucket/kvx", "--endpoint", stocked.service.url]
    for verb in ("gc", "inspect"):
        assert main([verb, *arguments]) == 1
        message = capsys.readouterr().err
        assert f"kvx {verb}: " in message
        assert "no-such-bucket" in message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["gc", "/a/directory"], "s3://BUCKET"), (["gc", "s3:///kvx"], "s3://BUCKET"),
     (["inspect", "s3://"], "s3://BUCKET"), (["gc", "s3://b", "--namespace", "ab"], "namespace"),
     (["gc", "s3://b", "--max-in-flight", "0"], "max_in_flight"),
     (["gc", "s3://b", "--endpoint", "nowhere"], "endpoint")],
)  # fmt: skip
def test_mistakes_are_told(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert part in capsys.readouterr().err


def test_an_endpoint_where_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["gc", "s3://b", "--endpoint", "http://127.0.0.1:9", "--deadline", "0.2"]
    assert main([*arguments, "--anonymous"]) == 1
    # That nobody listens, or that time was up between two tries.
    assert "kvx gc: list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"), [("45", 45), ("45s", 45), ("1.5h", 5400), ("90m", 5400), ("30d", 2592000)]
)
def test_spans_of_time(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "d", "-1d", "3 d", "1y", "1d2h"])
def test_no_spans_of_time(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["gc", "s3://b", f"--older-than={text}"])
    assert ended.value.code == 2
    assert "no span of time" in capsys.readouterr().err


def test_names_do_not_steer_the_terminal() -> None:
    assert printable("kvx/v2/\x1b[2J\n\u202eok é") == "kvx/v2/\\x1b[2J\\n\\u202eok é"
