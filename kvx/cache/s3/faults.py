"""What a failure of the client was: its exception as an `ObjectError`. Pure.

obstore puts the status, the body of the answer and the chain of causes into the text of its
exceptions, and nowhere else. Of an answer only the code and the message are shown: a refused
signature is answered with the whole request, session token included.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvx.cache.s3.store import ObjectError, ObjectFault

if TYPE_CHECKING:
    from collections.abc import Mapping

_SHOWN_CHARACTERS_MAX = 200
_STATUS_MISSING = 404
_STATUS_OK = 200
_STATUS_BUSY = 503


@dataclass(frozen=True, slots=True)
class Place:
    """Where calls go.

    Attributes:
        bucket: The bucket.
        endpoint: What URLs of requests begin with.
        connect_timeout_s: Seconds within which a connection has to stand.
    """

    bucket: str
    endpoint: str
    connect_timeout_s: float


class _Finding(NamedTuple):
    """What the text of an exception says: `remedy` is empty for that of the fault."""

    fault: ObjectFault
    what: str
    status: int | None = None
    remedy: str = ""


def explain(error: Exception, *, verb: str, name: str, place: Place) -> ObjectError:
    """Return what an exception of obstore means.

    Args:
        error: As raised.
        verb: What was tried: get, head, put, list or delete.
        name: Of the object, or the prefix that was listed.
        place: Where.
    """
    text = str(error)
    found = _credentials(text, place) or _answer(text, verb) or _cause(text)
    remedy = found.remedy or _REMEDIES[found.fault]
    remedy = remedy.format(
        bucket=place.bucket, endpoint=place.endpoint, connect_timeout_s=place.connect_timeout_s
    )
    message = f"{verb} {name} at {place.endpoint}: {found.what}: {remedy}"
    return ObjectError(message, fault=found.fault, errno=found.status, key=name)


def _credentials(text: str, place: Place) -> _Finding | None:
    """Judge a failure to get credentials: it happened elsewhere than at the service."""
    asked = re.search(r"Error performing \w+ (https?://\S+) in ", text)
    if "External AWS credential provider" in text:
        what = text.partition("\n\nDebug source:")[0].partition("provider: ")[2]
    elif asked is not None and not asked[1].startswith(place.endpoint):
        what = f"{asked[1]} gave none, {(_answer(text, '') or _cause(text)).what}"
    else:
        return None
    return _Finding(ObjectFault.DENIED, f"no credentials ({_shown(what)})", None, _NO_CREDENTIALS)


def _answer(text: str, verb: str) -> _Finding | None:
    """Judge what the service answered; None where it did not."""
    found = re.search(r"returned (?:non-2xx status code: (\d{3})|error response)", text)
    deleted = re.search(r"DeleteObjects request failed for key .*?: (.*) \(code: (\w+)\)", text)
    if found is None and deleted is None:
        return None
    if deleted is not None:
        status, code, message = _STATUS_OK, deleted[2], deleted[1]
    else:
        assert found is not None
        status = int(found[1] or _STATUS_OK)
        code = _element("Code", text)
        message = _element("Message", text)
    # HEAD is answered without a code; a service that is up and says 503 wants fewer requests.
    is_mute = verb == "head" and status == _STATUS_BUSY
    fault = ObjectFault.THROTTLED if is_mute else _BY_CODE.get(code) or _by_status(status)
    what = f"HTTP {status}" + f" {code}" * bool(code) + f" ({_shown(message)})" * bool(message)
    return _Finding(fault, what, status, _REMEDIES_BY_CODE.get(code, ""))


def _by_status(status: int) -> ObjectFault:
    found = _BY_STATUS.get(status)
    if found is not None:
        return found
    is_refused = 300 <= status < 500  # noqa: PLR2004 - classes of status
    return ObjectFault.DENIED if is_refused else ObjectFault.SERVER


def _cause(text: str) -> _Finding:
    """Judge what the client itself says."""
    head = text.partition("\n\nDebug source:")[0].removeprefix("Generic S3 error: ")
    head = re.sub(r"^Error performing \w+ \S+ in \S+ - ", "", head)
    for pattern, fault, remedy in _CAUSES:
        found = re.search(pattern, text)
        if found is not None:
            detail = next(filter(None, found.groups()), "") if found.groups() else ""
            return _Finding(fault, _shown(detail or head), None, remedy)
    return _Finding(ObjectFault.PROTOCOL, _shown(head))


def _element(tag: str, text: str) -> str:
    found = re.search(rf"<{tag}>\s*([^<]*?)\s*</{tag}>", text)
    return found[1] if found is not None else ""


def _shown(text: str) -> str:
    """Return a text of others in one line that is not too long."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    is_long = len(line) > _SHOWN_CHARACTERS_MAX
    return line[:_SHOWN_CHARACTERS_MAX] + "..." if is_long else line


_BY_CODE: Mapping[str, ObjectFault] = {
    "NoSuchKey": ObjectFault.MISSING,
    "NoSuchVersion": ObjectFault.MISSING,
    "NoSuchBucket": ObjectFault.NO_BUCKET,
    "AccessDenied": ObjectFault.DENIED,
    "AllAccessDisabled": ObjectFault.DENIED,
    "QuotaExceeded": ObjectFault.DENIED,
    "ExpiredToken": ObjectFault.EXPIRED,
    "ExpiredTokenException": ObjectFault.EXPIRED,
    "TokenRefreshRequired": ObjectFault.EXPIRED,
    "RequestTimeTooSkewed": ObjectFault.SKEWED,
    "RequestExpired": ObjectFault.SKEWED,
    "PreconditionFailed": ObjectFault.CONFLICT,
    "ConditionalRequestConflict": ObjectFault.CONFLICT,
    "SlowDown": ObjectFault.THROTTLED,
    "Throttling": ObjectFault.THROTTLED,
    "ThrottlingException": ObjectFault.THROTTLED,
    "TooManyRequests": ObjectFault.THROTTLED,
    "RequestLimitExceeded": ObjectFault.THROTTLED,
    "BandwidthLimitExceeded": ObjectFault.THROTTLED,
    "InternalError": ObjectFault.SERVER,
    "ServiceUnavailable": ObjectFault.SERVER,
    "OperationAborted": ObjectFault.SERVER,
    "RequestTimeout": ObjectFault.TIMEOUT,
    "IncompleteBody": ObjectFault.TRUNCATED,
    "BadDigest": ObjectFault.TRUNCATED,
    "InvalidRange": ObjectFault.RANGE,
}
_BY_STATUS: Mapping[int, ObjectFault] = {
    _STATUS_OK: ObjectFault.SERVER,
    _STATUS_MISSING: ObjectFault.MISSING,
    408: ObjectFault.TIMEOUT,
    409: ObjectFault.CONFLICT,
    412: ObjectFault.CONFLICT,
    416: ObjectFault.RANGE,
    429: ObjectFault.THROTTLED,
    504: ObjectFault.TIMEOUT,
}
_WRONG_REGION = "the bucket {bucket!r} is elsewhere: correct `region` or `endpoint` of the tier"
_WRONG_KEYS = "access key or secret are wrong: correct the credentials of this process"
_NO_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or `profile` of the tier (files of profiles"
    " need `pip install boto3`), or `is_anonymous` for a public bucket"
)
_REMEDIES_BY_CODE: Mapping[str, str] = {
    "SignatureDoesNotMatch": _WRONG_KEYS,
    "InvalidAccessKeyId": _WRONG_KEYS,
    "InvalidToken": _WRONG_KEYS,
    "AuthorizationHeaderMalformed": _WRONG_REGION,
    "PermanentRedirect": _WRONG_REGION,
    "TemporaryRedirect": _WRONG_REGION,
    "IllegalLocationConstraintException": _WRONG_REGION,
    "QuotaExceeded": "the bucket {bucket!r} is full: raise its quota, or run `kvx gc`",
}
_REMEDIES: Mapping[ObjectFault, str] = {
    ObjectFault.MISSING: "there is no such object",
    ObjectFault.NO_BUCKET: (
        "there is no bucket {bucket!r}: create it, or correct `bucket`, `endpoint` or `region`"
    ),
    ObjectFault.DENIED: (
        "the service refuses it: these credentials need s3:GetObject, s3:PutObject,"
        " s3:DeleteObject and s3:ListBucket on {bucket!r} (without s3:ListBucket absent objects"
        " are refused, too)"
    ),
    ObjectFault.EXPIRED: "the credentials have expired: renew them",
    ObjectFault.SKEWED: "the clocks differ by too much: set this machine's by NTP",
    ObjectFault.CONFLICT: "the object is there already, or is being stored by somebody else",
    ObjectFault.THROTTLED: "the service wants fewer requests: lower `max_in_flight` if it lasts",
    ObjectFault.SERVER: "the service failed: look at its logs if it lasts",
    ObjectFault.TRUNCATED: "the bytes did not arrive whole: look at proxies on the way if it lasts",
    ObjectFault.RANGE: "the object is shorter than what is asked of it: it is damaged, or not ours",
    ObjectFault.TIMEOUT: "the service did not go on in time: look at its load and at the network",
    ObjectFault.CONNECTION: "the connection was lost: look whether the service runs",
    ObjectFault.DNS: "the endpoint's name is not known: correct `endpoint` or the resolver",
    ObjectFault.TLS: (
        "the endpoint's certificate is not trusted: name its authority as `ca_file`, and the host"
        " in `endpoint` as the certificate does"
    ),
    ObjectFault.PROTOCOL: (
        "this is no answer that S3 gives: look whether `endpoint` is one, and at proxies on the way"
    ),
}
_NO_TLS = "it speaks no TLS that we do: correct `endpoint` (http or https?)"
_NO_CONNECTION = "no connection could be made: look whether the service runs at `endpoint`"
_NO_CONNECTION_IN_TIME = (
    "no connection stood within {connect_timeout_s} s: look at the network, or raise"
    " `connect_timeout_s`"
)
# The first that is found; a group is what is shown.
_CAUSES: tuple[tuple[str, ObjectFault, str], ...] = (
    (r'"dns error"[^"]*"([^"]*)"', ObjectFault.DNS, ""),
    (r'"dns error"', ObjectFault.DNS, ""),
    (r"InvalidCertificate\(\s*(\w+)", ObjectFault.TLS, ""),
    (
        r"(InvalidMessage|Inappropriate\w*Message|AlertReceived|Peer(?:Incompatible|Misbehaved))",
        ObjectFault.TLS,
        _NO_TLS,
    ),
    (r"kind: Timeout(?s:.*)\bConnect,", ObjectFault.TIMEOUT, _NO_CONNECTION_IN_TIME),
    (r"kind: Timeout", ObjectFault.TIMEOUT, ""),
    (r'kind: Connect,(?s:.*)message: "([^"]*)"', ObjectFault.CONNECTION, _NO_CONNECTION),
    (r"kind: Connect,", ObjectFault.CONNECTION, _NO_CONNECTION),
    (r"(IncompleteBody|UnexpectedEof)", ObjectFault.TRUNCATED, ""),
    (r"(IncompleteMessage)", ObjectFault.CONNECTION, ""),
    (r'code: \d+,\s+kind: \w+,\s+message: "([^"]*)"', ObjectFault.CONNECTION, ""),
    (r"hyper::Error\(\s+Parse\(\s+(\w+)", ObjectFault.PROTOCOL, ""),
    (r"redirect without LOCATION", ObjectFault.DENIED, _WRONG_REGION),
    (r"kind: Interrupted", ObjectFault.CONNECTION, ""),
)
