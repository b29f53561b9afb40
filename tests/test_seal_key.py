"""Where the key of the S3 tier's sealing comes from, and that no message shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvx.config import seal_key
from kvx.errors import ConfigError
from kvx.tier_config import S3TierConfig

KEY = b"\n" + bytes(range(200, 230)) + b" "


def in_file(path: Path, content: bytes) -> S3TierConfig:
    path.write_bytes(content)
    path.chmod(0o600)
    return S3TierConfig("bucket", seal_key_file=path)


def test_without_a_key_nothing_is_sealed() -> None:
    assert seal_key(S3TierConfig("bucket"), {}) is None


@pytest.mark.parametrize("content", [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\r\n"])
def test_a_key_in_a_file(content: bytes, tmp_path: Path) -> None:
    assert seal_key(in_file(tmp_path / "key", content), {}) == KEY


def test_a_key_in_the_environment() -> None:
    tier = S3TierConfig("bucket", seal_key_env="OUR_KEY")
    assert seal_key(tier, {"OUR_KEY": KEY.hex()}) == KEY
    with pytest.raises(ConfigError, match="OUR_KEY is not set"):
        seal_key(tier, {"YOUR_KEY": KEY.hex()})


@pytest.mark.parametrize(
    "content",
    [b"", b"secret", b"secretly" * 4, KEY[:31], KEY.hex()[:62].encode(), KEY * 2],
    ids=["none", "word", "words", "short", "few", "double"],
)
def test_what_is_no_key(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{len(content)} bytes are no key.*openssl") as caught:
        seal_key(in_file(tmp_path / "key", content), {})
    assert "secret" not in str(caught.value)
    if content.isalnum():
        tier = S3TierConfig("bucket", seal_key_env="OUR_KEY")
        with pytest.raises(ConfigError, match="OUR_KEY") as caught:
            seal_key(tier, {"OUR_KEY": content.decode()})
        assert content.decode() not in str(caught.value)


def test_a_file_that_others_may_read(tmp_path: Path) -> None:
    tier = in_file(tmp_path / "key", KEY)
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        seal_key(tier, {})
