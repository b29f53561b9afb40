"""The exceptions of kvx; a cache miss is a value, never one of these.

    KvxError                      facts as attributes, .retryable, a remedy in the text
    |- UsageError(ValueError)      the caller's arguments are wrong; nothing was done
    |- ConfigError(UsageError)     unknown key or malformed value
    |- CapacityError               needed_bytes, available_bytes
    |- UnavailableError            a backend, device or service is not here
    |- IncompatibleError           two sides disagree; both values
    |- StaleReference              the block was evicted, reused or fenced since
    |- TransferError               bytes_done, peer
    |  |- TransferTimeout(TimeoutError)
    |  |- TransferCancelled
    |  `- PeerLost
    `- StorageError(OSError)       errno or HTTP status, key, offset
       `- CorruptBlock

Every exception takes one message and its facts by keyword.
"""


class KvxError(Exception):
    """Base of everything kvx raises.

    Attributes:
        retryable: Whether the same call may succeed later without any change.
    """

    retryable: bool = False


class UsageError(KvxError, ValueError):
    """The caller's arguments are wrong; nothing was done."""


class ConfigError(UsageError):
    """A configuration key is unknown or its value malformed; names key, value and what fits.

    Attributes:
        key: Dotted path of the offending key, such as ``tiers[0].capacity``.
    """

    def __init__(self, message: str, *, key: str = "") -> None:
        """Keep `key` beside the message."""
        super().__init__(message)
        self.key = key


class CapacityError(KvxError):
    """Something does not fit.

    Attributes:
        needed_bytes: What was asked for.
        available_bytes: What there is.
    """

    retryable = True

    def __init__(self, message: str, *, needed_bytes: int = 0, available_bytes: int = 0) -> None:
        """Keep both sizes beside the message."""
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class UnavailableError(KvxError):
    """A backend, device or service is not here: the message says why and how to get it."""


class IncompatibleError(KvxError):
    """Two sides disagree about layout, dtype, model, hash seed or format version.

    Attributes:
        ours: The value on this side.
        theirs: The value found on the other side.
    """

    def __init__(self, message: str, *, ours: object = None, theirs: object = None) -> None:
        """Keep both values beside the message."""
        super().__init__(message)
        self.ours = ours
        self.theirs = theirs


class StaleReference(KvxError):
    """The block was evicted, reused or fenced since the reference was made."""


class TransferError(KvxError):
    """A transfer ended without moving everything.

    Attributes:
        bytes_done: Bytes that did arrive and were verified.
        peer: Name of the other side; empty for local transfers.
    """

    retryable = True

    def __init__(self, message: str, *, bytes_done: int = 0, peer: str = "") -> None:
        """Keep the facts beside the message."""
        super().__init__(message)
        self.bytes_done = bytes_done
        self.peer = peer


class TransferTimeout(TransferError, TimeoutError):
    """The deadline passed; the memory is quarantined until the bytes have stopped."""


class TransferCancelled(TransferError):
    """Cancelled by the caller, or because its cache or agent was closed."""


class PeerLost(TransferError):
    """The peer died, froze or was fenced off."""


class StorageError(KvxError, OSError):
    """A file or object operation failed.

    Attributes:
        errno: Errno or HTTP status, None where there is none.
        key: File or object it happened on.
        offset: Byte offset in it, -1 where that means nothing.
    """

    retryable = True

    def __init__(
        self, message: str, *, errno: int | None = None, key: str = "", offset: int = -1
    ) -> None:
        """Keep the facts beside the message."""
        super().__init__(message)
        self.errno = errno
        self.key = key
        self.offset = offset


class CorruptBlock(StorageError):
    """Bytes do not match their checksum."""

    retryable = False
