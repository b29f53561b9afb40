"""Agents over TLS: both show a certificate of the same authority, and prove the key besides."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvx

KEY = "a key for the tests"
TCP_ONLY = {"backends": ["tcp"], "unix": False, "greeting_s": 1.0}

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="the openssl program, which makes the certificates"
)


def openssl(*arguments: str, cwd: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=cwd, check=True, capture_output=True, timeout=60)


def make_authority(path: Path) -> kvx.TlsFiles:
    """Make an authority and one certificate of it, for localhost."""
    path.mkdir()
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(
        "req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj",
        "/CN=authority", "-addext", "basicConstraints=critical,CA:TRUE", cwd=path,
    )  # fmt: skip
    openssl(
        "req", *curve, "-keyout", "agent.key", "-out", "agent.csr", "-subj", "/CN=127.0.0.1",
        cwd=path,
    )  # fmt: skip
    (path / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    openssl(
        "x509", "-req", "-in", "agent.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
        "-out", "agent.pem", "-days", "2", "-extfile", "names", cwd=path,
    )  # fmt: skip
    return kvx.TlsFiles(path / "agent.pem", path / "agent.key", path / "ca.pem")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> kvx.TlsFiles:
    return make_authority(tmp_path_factory.mktemp("tls") / "one")


@pytest.fixture
def server(files: kvx.TlsFiles) -> Iterator[kvx.Agent]:
    with kvx.Agent("s", key=KEY, tls=files, listen="tcp://127.0.0.1:0", config=TCP_ONLY) as agent:
        yield agent


def test_blocks_go_over_tls(server: kvx.Agent, files: kvx.TlsFiles) -> None:
    blocks = np.random.default_rng(1).integers(0, 256, (8, 1 << 18), dtype=np.uint8)
    token = server.register(blocks).lease(rights=kvx.Rights.READ | kvx.Rights.WRITE).token
    with kvx.Agent("c", key=KEY, tls=files, config=TCP_ONLY) as client:
        peer = client.connect(server.addresses[0])
        target = np.zeros_like(blocks)
        registration = client.register(target)
        remote = peer.descriptors([0], [blocks.nbytes], lease=token)
        local = registration.descriptors([0], [blocks.nbytes])
        client.read(local, remote).wait()
        assert (target == blocks).all()
        target[:] = 5
        client.write(local, remote).wait()
        assert (blocks == 5).all()
        assert all(one["is_encrypted"] for one in peer.connections())


def test_strangers_are_kept_out(server: kvx.Agent, tmp_path: Path) -> None:
    other = make_authority(tmp_path / "other")
    for tls in (None, other):
        with (
            kvx.Agent("c", key=KEY, tls=tls, config=TCP_ONLY) as client,
            pytest.raises(kvx.TransferTimeout),
        ):
            client.connect(server.addresses[0], timeout_s=0.7)
    assert server.peers == {}


def test_wrong_files_are_named(files: kvx.TlsFiles, tmp_path: Path) -> None:
    missing = kvx.TlsFiles(tmp_path / "no.pem", files.private_key, files.authority)
    with pytest.raises(kvx.UsageError, match=r"no\.pem"):
        kvx.Agent("c", key=KEY, tls=missing)
