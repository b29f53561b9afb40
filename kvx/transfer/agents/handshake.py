"""How two agents make sure of each other: pure, bytes in and bytes out.

    dialler                                   accepter
      HELLO     who I am, nonce        ->
                                       <-     CHALLENGE  who I am, nonce
      PROOF     HMAC(transcript)       ->
                                       <-     WELCOME    HMAC(transcript)

Both HMACs cover both first messages as they were sent, names, incarnations, nonces, version and
all, under labels of their own: a proof that is replayed, reflected or moved to another connection
is wrong. Without a key the HMACs are empty, and only connections that never leave the host are
accepted. A refusal says what does not fit, never anything about the key.
"""

from __future__ import annotations

import enum
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec

from kvx.transfer.agents.identity import Identity, Name

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.transfer.agents.key import SharedKey

VERSION = 1
MAGIC = b"kvxh"
HANDSHAKE_BYTES_MAX = 4096
NONCE_BYTES = 32
LANES_MAX = 4
_TEXT_MAX = 512
_DIALLER, _ACCEPTER = b"kvx handshake 1 dialler", b"kvx handshake 1 accepter"

_Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
_Mac = Annotated[bytes, msgspec.Meta(max_length=32)]


class Why(enum.StrEnum):
    """Why a connection is refused."""

    VERSION = "version"
    PROTOCOL = "protocol"
    KEY = "key"
    NAME = "name"
    SELF = "self"
    DUPLICATE = "duplicate"
    FENCED = "fenced"
    CAPACITY = "capacity"


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hello"):
    """First word of the dialler; `lane` numbers its connections to one peer."""

    identity: Identity
    nonce: _Nonce
    has_key: bool
    lane: Annotated[int, msgspec.Meta(ge=0, lt=LANES_MAX)]
    expected: Name | None


class Challenge(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="challenge"):
    """Answer of the accepter."""

    identity: Identity
    nonce: _Nonce
    has_key: bool


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="proof"):
    """The dialler knows the key."""

    mac: _Mac


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="welcome"):
    """So does the accepter, and it takes the connection."""

    mac: _Mac


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refused"):
    """The connection is not taken."""

    why: Why
    text: Annotated[str, msgspec.Meta(max_length=_TEXT_MAX)]


_Message = Hello | Challenge | Proof | Welcome | Refused
_decoder: msgspec.msgpack.Decoder[_Message] = msgspec.msgpack.Decoder(_Message)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a handshake ended without a connection, and who says so."""

    why: Why
    text: str
    is_theirs: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """What a message led to.

    Attributes:
        reply: To be sent.
        peer: Who it is, proven; set when the handshake is over.
        refusal: Set when it failed; the connection is to be dropped after the reply.
    """

    reply: bytes | None = None
    peer: Identity | None = None
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Introduction:
    """Who the other side claims to be; nothing is proven yet."""

    identity: Identity
    lane: int
    is_dialler: bool


class _Stage(enum.Enum):
    NEW = enum.auto()
    HELLO_SENT = enum.auto()
    CHALLENGE_SENT = enum.auto()
    PROOF_SENT = enum.auto()
    OVER = enum.auto()


class Handshake:
    """One side of one handshake."""

    def __init__(
        self,
        me: Identity,
        key: SharedKey | None,
        *,
        is_dialler: bool,
        is_local: bool,
        lane: int = 0,
        expected: str | None = None,
        judge: Callable[[Introduction], Refusal | None] = lambda _: None,
        nonce: bytes | None = None,
    ) -> None:
        """Begin.

        Args:
            me: This agent.
            key: What both must know; None without one.
            is_dialler: Which side this is.
            is_local: Whether the connection never leaves this host; only then may both be without
                a key.
            lane: Number of this connection among those to the same peer.
            expected: Name that the other side must have; None for any.
            judge: Asked about the other side's claim before anything is answered; may only refuse.
            nonce: For tests.
        """
        self._me = me
        self._key = key
        self._is_dialler = is_dialler
        self._is_local = is_local
        self.lane = lane
        self._expected = expected
        self._judge = judge
        self._nonce = nonce if nonce is not None else secrets.token_bytes(NONCE_BYTES)
        self._stage = _Stage.NEW
        self._hello = b""
        self._challenge = b""
        self._peer: Identity | None = None

    @property
    def claimed(self) -> Identity | None:
        """Who the other side says it is; None before it has said so."""
        return self._peer

    @property
    def is_over(self) -> bool:
        """Whether it has succeeded or failed."""
        return self._stage is _Stage.OVER

    def begin(self) -> bytes:
        """Return the dialler's first message."""
        assert self._is_dialler, "the dialler begins"
        assert self._stage is _Stage.NEW, "it begins once"
        self._hello = _encode(
            Hello(self._me, self._nonce, self._key is not None, self.lane, self._expected)
        )
        self._stage = _Stage.HELLO_SENT
        return self._hello

    def receive(self, payload: bytes) -> Step:
        """Take a message of the other side; safe for any bytes."""
        if self._stage is _Stage.OVER:
            return self._refuse(Why.PROTOCOL, "a greeting after the end of the handshake")
        message = _decode(payload)
        if isinstance(message, Refusal):
            return self._refuse(message.why, message.text)
        if isinstance(message, Refused):
            self._stage = _Stage.OVER
            return Step(refusal=Refusal(message.why, _printable(message.text), is_theirs=True))
        match message, self._stage, self._is_dialler:
            case Hello(), _Stage.NEW, False:
                return self._on_hello(message, payload)
            case Challenge(), _Stage.HELLO_SENT, True:
                return self._on_challenge(message, payload)
            case Proof(), _Stage.CHALLENGE_SENT, False:
                return self._on_proof(message)
            case Welcome(), _Stage.PROOF_SENT, True:
                return self._on_welcome(message)
        return self._refuse(
            Why.PROTOCOL, f"{type(message).__name__.lower()} is out of turn in the handshake"
        )

    def refuse(self, refusal: Refusal) -> Step:
        """End it for a reason of the caller's."""
        self._stage = _Stage.OVER
        return Step(_encode(Refused(refusal.why, refusal.text[:_TEXT_MAX])), refusal=refusal)

    def _refuse(self, why: Why, text: str) -> Step:
        return self.refuse(Refusal(why, text))

    def _on_hello(self, hello: Hello, payload: bytes) -> Step:
        self.lane = hello.lane
        if hello.expected is not None and hello.expected != self._me.name:
            return self._refuse(
                Why.NAME, f"{hello.expected} was dialled, and this is {self._me.name}"
            )
        refusal = self._introduced(hello.identity, hello.nonce, has_key=hello.has_key)
        if refusal is not None:
            return self.refuse(refusal)
        self._hello = payload
        self._challenge = _encode(Challenge(self._me, self._nonce, self._key is not None))
        self._stage = _Stage.CHALLENGE_SENT
        return Step(self._challenge)

    def _on_challenge(self, challenge: Challenge, payload: bytes) -> Step:
        name = challenge.identity.name
        if self._expected is not None and name != self._expected:
            return self._refuse(Why.NAME, f"{self._expected} was dialled, and {name} answers")
        refusal = self._introduced(challenge.identity, challenge.nonce, has_key=challenge.has_key)
        if refusal is not None:
            return self.refuse(refusal)
        self._challenge = payload
        self._stage = _Stage.PROOF_SENT
        return Step(_encode(Proof(self._sign(_DIALLER))))

    def _on_proof(self, proof: Proof) -> Step:
        if not self._is_right(proof.mac, _DIALLER):
            return self._refuse(Why.KEY, "the two agents have different keys")
        self._stage = _Stage.OVER
        return Step(_encode(Welcome(self._sign(_ACCEPTER))), peer=self._peer)

    def _on_welcome(self, welcome: Welcome) -> Step:
        if not self._is_right(welcome.mac, _ACCEPTER):
            return self._refuse(Why.KEY, "the two agents have different keys")
        self._stage = _Stage.OVER
        return Step(peer=self._peer)

    def _introduced(self, peer: Identity, nonce: bytes, *, has_key: bool) -> Refusal | None:
        """Return what speaks against the other side's claim."""
        if peer.incarnation == self._me.incarnation or nonce == self._nonce:
            return Refusal(Why.SELF, "an agent cannot be its own peer")
        if has_key != (self._key is not None):
            return Refusal(
                Why.KEY,
                "one of the agents has a key and the other has none: give both the same",
            )
        if self._key is None and not self._is_local:
            return Refusal(
                Why.KEY, "agents without a key talk within one host only: give both the same key"
            )
        self._peer = peer
        return self._judge(Introduction(peer, self.lane, is_dialler=not self._is_dialler))

    def _sign(self, label: bytes) -> bytes:
        return b"" if self._key is None else self._key.sign(label, self._hello, self._challenge)

    def _is_right(self, mac: bytes, label: bytes) -> bool:
        if self._key is None:
            return mac == b""
        return self._key.verify(mac, label, self._hello, self._challenge)


def _encode(message: _Message) -> bytes:
    return MAGIC + bytes([VERSION]) + msgspec.msgpack.encode(message)


def _decode(payload: bytes) -> _Message | Refusal:
    if len(payload) > HANDSHAKE_BYTES_MAX:
        return Refusal(Why.PROTOCOL, f"a greeting of {len(payload)} bytes")
    if len(payload) <= len(MAGIC) or payload[: len(MAGIC)] != MAGIC:
        return Refusal(Why.PROTOCOL, "these bytes are no greeting of a kvx agent")
    if payload[len(MAGIC)] != VERSION:
        return Refusal(
            Why.VERSION,
            f"the agents speak versions {payload[len(MAGIC)]} and {VERSION}: run the same kvx on "
            "both sides",
        )
    try:
        return _decoder.decode(payload[len(MAGIC) + 1 :])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Refusal(Why.PROTOCOL, "a greeting is malformed")


def _printable(text: str) -> str:
    """Return foreign text without anything that could play with a terminal or a log."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)
