"""Where the key of the S3 tier's sealing comes from, and that no message shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvx.config import CacheConfig, seal_keys
from kvx.errors import ConfigError
from kvx.records import encode
from kvx.tier_config import S3TierConfig

KEY = b"\n" + bytes(range(200, 230)) + b" "
DIGITS = "ab" * 32


def load(**keys: dict[str, str]) -> S3TierConfig:
    """Return a tier with keys of tenants."""
    tier = {"kind": "s3", "bucket": "b", "seal_keys": keys}
    found = CacheConfig.load({"tiers": [{"kind": "dram", "capacity": "1MiB"}, tier]})
    return found.tier(S3TierConfig) or S3TierConfig("none")


def in_file(path: Path, content: bytes) -> S3TierConfig:
    path.write_bytes(content)
    path.chmod(0o600)
    return S3TierConfig("bucket", seal_key_file=path)


def test_without_a_key_nothing_is_sealed() -> None:
    assert seal_keys(S3TierConfig("bucket"), {}) == {}


@pytest.mark.parametrize("content", [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\r\n"])
def test_a_key_in_a_file(content: bytes, tmp_path: Path) -> None:
    assert seal_keys(in_file(tmp_path / "key", content), {}) == {None: KEY}


def test_a_key_in_the_environment() -> None:
    tier = S3TierConfig("bucket", seal_key_env="OUR_KEY")
    assert seal_keys(tier, {"OUR_KEY": KEY.hex()}) == {None: KEY}
    with pytest.raises(ConfigError, match="OUR_KEY is not set"):
        seal_keys(tier, {"YOUR_KEY": KEY.hex()})


@pytest.mark.parametrize(
    "content",
    [b"", b"secret", b"secretly" * 4, KEY[:31], KEY.hex()[:62].encode(), KEY * 2],
    ids=["none", "word", "words", "short", "few", "double"],
)
def test_what_is_no_key(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{len(content)} bytes are no key.*openssl") as caught:
        seal_keys(in_file(tmp_path / "key", content), {})
    assert "secret" not in str(caught.value)
    if content.isalnum():
        tier = S3TierConfig("bucket", seal_key_env="OUR_KEY")
        with pytest.raises(ConfigError, match="OUR_KEY") as caught:
            seal_keys(tier, {"OUR_KEY": content.decode()})
        assert content.decode() not in str(caught.value)


def test_a_file_that_others_may_read(tmp_path: Path) -> None:
    tier = in_file(tmp_path / "key", KEY)
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        seal_keys(tier, {})


def test_a_key_for_each_tenant(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(KEY.hex() + "\n")
    path.chmod(0o600)
    loaded = load(a={"file": str(path)}, b={"env": "B_KEY"})
    environment = {"B_KEY": "02" * 32}
    assert seal_keys(loaded, environment) == {"a": KEY, "b": b"\x02" * 32}
    again = CacheConfig.load({"tiers": [{"kind": "dram", "capacity": "1MiB"}, encode(loaded)]})
    assert again.tier(S3TierConfig) == loaded
    assert hash(again.tier(S3TierConfig)) == hash(loaded)


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (None, 0o600, "the key cannot be read: No such file"),
        (b"!" * 32, 0o644, "others may read the key; chmod 600"),
        (b"!" * 31, 0o600, "31 bytes are no key"),
        (b"!" * 5000, 0o600, "more than 4096 bytes"),
    ],
)
def test_a_file_that_will_not_do(
    content: bytes | None, mode: int, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(ConfigError, match=f"^seal_keys.a.file: {path}.*{message}") as caught:
        seal_keys(load(a={"file": str(path)}), {})
    assert "!!" not in str(caught.value)


def test_a_variable_that_will_not_do() -> None:
    with pytest.raises(ConfigError, match=r"seal_keys.a.env: A_KEY is not set"):
        seal_keys(load(a={"env": "A_KEY"}), {})
    with pytest.raises(ConfigError, match=r"seal_keys.a.env: A_KEY: 6 bytes") as caught:
        seal_keys(load(a={"env": "A_KEY"}), {"A_KEY": "secret"})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"seal_keys": {"a": DIGITS}}, "seal_keys.a"),
        ({"seal_keys": {"a": {"env": DIGITS}}}, "seal_keys.a.env"),
        ({"seal_keys": {"a": {"file": DIGITS}}}, "seal_keys.a.file"),
        ({"seal_keys": {"a": {"env": "ab+/" + DIGITS[:40] + "="}}}, "seal_keys.a.env"),
        ({"seal_keys": {"a": {}}}, "seal_keys.a.file"),
        ({"seal_keys": {"a": {"file": "f", "env": "E"}}}, "seal_keys.a.file"),
        ({"seal_keys": {7: {"env": "E"}}}, "seal_keys[7]"),
        ({"seal_keys": [DIGITS]}, "seal_keys"),
        ({"seal_keys": {"a": {"key": DIGITS}}}, "seal_keys.a.key"),
        ({"seal_key_env": DIGITS}, "seal_key_env"),
        ({"seal_key_file": DIGITS}, "seal_key_file"),
    ],
)
def test_keys_have_no_place_in_a_configuration(settings: dict[str, object], key: str) -> None:
    tier = {"kind": "s3", "bucket": "b", **settings}
    with pytest.raises(ConfigError) as caught:
        CacheConfig.load({"tiers": [{"kind": "dram", "capacity": "1MiB"}, tier]})
    assert caught.value.key == f"tiers[1].{key}"
    assert str(caught.value).startswith(f"tiers[1].{key}")
    assert DIGITS[:40] not in str(caught.value)
    assert caught.value.__cause__ is None
