"""The servers that other tests rely on: they answer, stand apart, and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kvx.errors import UnavailableError, UsageError
from kvx_bench.s3.ceph import PACKAGES
from kvx_bench.s3.rgw import Rgw
from kvx_bench.s3.service import Keys, Service
from tests.s3.servers import Bucket, open_client

GONE_S = 10.0
SMALL_BYTES = 256 << 20


def test_what_is_put_is_there(s3_bucket: Bucket) -> None:
    s3_bucket.put("a/b", b"some bytes")
    assert s3_bucket.get("a/b") == b"some bytes"
    assert s3_bucket.names("a/") == ["a/b"]


def test_moto_answers_as_well(moto_bucket: Bucket) -> None:
    moto_bucket.put("a", bytes(100))
    assert moto_bucket.names() == ["a"]


def test_a_second_one_of_a_name_is_refused(s3_bucket: Bucket) -> None:
    s3_bucket.put("once", b"first")
    with s3_bucket.client() as client, pytest.raises(client.exceptions.ClientError) as refused:
        client.put_object(Bucket=s3_bucket.name, Key="once", Body=b"second", IfNoneMatch="*")
    assert refused.value.response["Error"]["Code"] == "PreconditionFailed"
    assert s3_bucket.get("once") == b"first"


def test_rgw_knows_who_asks(needs_rgw: Service) -> None:
    assert needs_rgw.keys is not None
    stranger = Service(needs_rgw.url, keys=Keys(needs_rgw.keys.access_key, "guessed"))
    with open_client(stranger) as client, pytest.raises(client.exceptions.ClientError) as refused:
        client.list_buckets()
    assert refused.value.response["Error"]["Code"] == "SignatureDoesNotMatch"


def test_two_run_beside_each_other(needs_rgw: Service) -> None:
    with Rgw(memory_bytes=SMALL_BYTES) as second, open_client(second.service) as client:
        assert second.service.url != needs_rgw.url
        assert client.list_buckets()["Buckets"] == []


PROGRAM = """
import sys
from kvx_bench.s3.rgw import Rgw
rgw = Rgw(memory_bytes=256 << 20)
print(rgw.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.usefixtures("needs_rgw")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_when_its_owner_ends(number: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=environment, text=True,
    ) as owner:  # fmt: skip
        assert owner.stdout is not None
        keeper = int(owner.stdout.readline())
        daemons = children(keeper)
        assert len(daemons) == 3
        assert len(list(tmp_path.iterdir())) == 1
        owner.send_signal(number)
        owner.wait()
    wait_until_gone([keeper, *daemons])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("needs_rgw")
def test_no_daemon_outlives_its_keeper() -> None:
    with Rgw(memory_bytes=SMALL_BYTES) as rgw:
        daemons = children(rgw.pid)
        os.kill(rgw.pid, signal.SIGKILL)
        wait_until_gone(daemons)
        shutil.rmtree(folder_of(rgw))


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "radosgw" in Rgw.why_not()
    assert f"apt-get install {' '.join(PACKAGES)}" in Rgw.why_not()


@pytest.mark.usefixtures("needs_rgw")
def test_one_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    radosgw = tmp_path / "radosgw"
    radosgw.write_text("#!/bin/sh\necho no such luck\nexit 3\n")
    radosgw.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UnavailableError, match=r"radosgw ended with 3.*no such luck"):
        Rgw(memory_bytes=SMALL_BYTES)


@pytest.mark.parametrize("url", ["localhost:80", "ftp://host", "http://", "http://host/bucket"])
def test_what_is_no_endpoint_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is no endpoint"):
        Service(url)


def test_no_secret_is_shown() -> None:
    service = Service("http://host:80", keys=Keys("public", "hidden", "hidden too"))
    assert "hidden" not in repr(service)
    assert service.address == ("host", 80)
    assert service.authority == "host:80"


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return list(map(int, found.split()))


def folder_of(rgw: Rgw) -> Path:
    host = rgw.service.address[0]
    settings = Path(tempfile.gettempdir()).glob("kvx-rgw-*/ceph.conf")
    return next(path.parent for path in settings if host in path.read_text())


def wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + GONE_S
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < end, f"{alive} are still there"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
