"""Where an S3 service is, and who may use it."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from kvx.errors import UsageError


@dataclass(frozen=True, slots=True)
class Keys:
    """Who one is.

    Attributes:
        access_key: Its public half.
        secret_key: The other one.
        session_token: Of temporary keys; empty for others.
    """

    access_key: str
    secret_key: str = field(repr=False)
    session_token: str = field(default="", repr=False)

    def as_environment(self) -> dict[str, str]:
        """Return the variables that every client reads."""
        plain = {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        return plain | ({"AWS_SESSION_TOKEN": self.session_token} if self.session_token else {})

    def as_arguments(self) -> dict[str, str]:
        """Return what boto3's clients are called with."""
        return {name.lower(): text for name, text in self.as_environment().items()}


@dataclass(frozen=True, slots=True)
class Service:
    """An S3 service that is addressed by path: ``url/bucket/name``.

    Attributes:
        url: ``http://host:port`` or ``https://host:port``.
        region: As requests are signed for.
        keys: Who asks; None for what every client finds by itself.
        software: What answers there, for people.
    """

    url: str
    region: str = "us-east-1"
    keys: Keys | None = None
    software: str = "S3"

    def __post_init__(self) -> None:
        """Refuse what is no such URL."""
        parts = urlsplit(self.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.path.strip("/"):
            raise UsageError(f"{self.url!r} is no endpoint; say http://host:port")

    @property
    def address(self) -> tuple[str, int]:
        """Return its host and its port."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None, "looked at when it was made"
        return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def authority(self) -> str:
        """Return ``host:port`` as the Host header has it."""
        return urlsplit(self.url).netloc

    @property
    def is_tls(self) -> bool:
        """Whether it is spoken to through TLS."""
        return self.url.startswith("https:")
