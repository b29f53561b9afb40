"""A bucket does what `ObjectStore` says, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvx.cache.s3.obstore_store import ObstoreStore, open_store
from kvx.cache.s3.store import DELETE_BATCH_MAX, LIST_PAGE_MAX, ObjectError, ObjectFault
from kvx.errors import ConfigError, UnavailableError, UsageError
from kvx.tier_config import S3TierConfig
from tests.cache.s3.bad_server import MARKS, SILENCE, Answer, BadServer, Ending, part, refusal
from tests.cache.s3.conftest import open_at

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    Serve = Callable[..., BadServer]

BODY = np.random.default_rng(1).integers(0, 256, 100_000, np.uint8)


@pytest.fixture
def store(bucket_settings: dict[str, str]) -> ObstoreStore:
    return open_at(**bucket_settings)


async def names_of(store: ObstoreStore, prefix: str, after: str = "") -> list[str]:
    return [one.name async for page in store.list(prefix, after=after) for one in page]


async def test_what_is_put_can_be_got_whole_and_in_parts(store: ObstoreStore) -> None:
    await store.put("a/b", BODY.data, only_if_absent=False)
    for start, size in [(0, BODY.size), (0, 1), (17, 4096), (BODY.size - 1, 1)]:
        got = await store.get("a/b", start, size)
        assert np.array_equal(np.frombuffer(got, np.uint8), BODY[start : start + size])


async def test_objects_are_sent_from_where_they_lie(store: ObstoreStore) -> None:
    rows = BODY.reshape(10, -1)
    for body in (rows.data, memoryview(rows.tobytes()), rows[3].data):
        await store.put("a", body, only_if_absent=False)
        assert bytes(await store.get("a", 0, body.nbytes)) == body.tobytes()


async def test_head_says_size_and_time(store: ObstoreStore) -> None:
    await store.put("a", BODY.data, only_if_absent=True)
    facts = await store.head("a")
    assert (facts.name, facts.size_bytes) == ("a", BODY.size)
    assert abs(facts.modified_s - time.time()) < 60


async def test_only_the_first_is_stored_where_only_if_absent(store: ObstoreStore) -> None:
    await store.put("a", memoryview(b"first"), only_if_absent=True)
    with pytest.raises(ObjectError) as caught:
        await store.put("a", memoryview(b"other"), only_if_absent=True)
    assert caught.value.fault is ObjectFault.CONFLICT
    assert bytes(await store.get("a", 0, 5)) == b"first"
    await store.put("a", memoryview(b"third"), only_if_absent=False)
    assert bytes(await store.get("a", 0, 5)) == b"third"


async def test_what_is_absent_is_missing(
    store: ObstoreStore, bucket_settings: dict[str, str]
) -> None:
    for ask in (store.get("nope", 0, 1), store.head("nope")):
        with pytest.raises(ObjectError) as caught:
            await ask
        assert (caught.value.fault, caught.value.errno) == (ObjectFault.MISSING, 404)
    elsewhere = open_at(**{**bucket_settings, "bucket": "no-such-bucket"})
    for other in (
        elsewhere.get("nope", 0, 1), elsewhere.head("nope"), elsewhere.delete(["nope"]),
        elsewhere.put("nope", memoryview(b"x"), only_if_absent=True), names_of(elsewhere, ""),
    ):  # fmt: skip
        with pytest.raises(ObjectError, match="no-such-bucket") as caught:
            await other
        assert caught.value.fault is ObjectFault.NO_BUCKET


WRONG_KEYS = [("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"), ("AWS_ACCESS_KEY_ID", "Invalid")]


@pytest.mark.parametrize(("variable", "code"), WRONG_KEYS)
@pytest.mark.usefixtures("needs_rgw")
async def test_keys_that_are_wrong(
    bucket_settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, variable: str, code: str
) -> None:
    monkeypatch.setenv(variable, "wrong")
    store = open_at(**bucket_settings)
    for ask in (store.get("nope", 0, 1), store.head("nope")):
        with pytest.raises(ObjectError, match=f"{code}.*access key or secret are wrong") as caught:
            await ask
        assert (caught.value.fault, caught.value.errno) == (ObjectFault.DENIED, 403)


@pytest.mark.parametrize("start", [0, 50, 99, 100, 101])
async def test_a_range_that_is_not_in_the_object(store: ObstoreStore, start: int) -> None:
    await store.put("a", memoryview(bytes(100)), only_if_absent=True)
    with pytest.raises(ObjectError) as caught:
        await store.get("a", start, 101)
    assert caught.value.fault is ObjectFault.RANGE


async def test_lists_are_in_order_and_by_prefix(store: ObstoreStore) -> None:
    names = ["kvx/v1/a/1", "kvx/v1/a/2", "kvx/v1/ab/1", "kvx/v1/b/1", "kvx/v2/a/1", "kvy", "other"]
    for name in reversed(names):
        await store.put(name, memoryview(name.encode()), only_if_absent=True)
    for prefix in ["", "k", "kvx", "kvx/", "kvx/v1/a", "kvx/v1/a/", "kvx/v1/a/2", "kvx/v3", "z"]:
        expected = [name for name in names if name.startswith(prefix)]
        assert await names_of(store, prefix) == expected, prefix
        for after in [*names, "kvx/v1/a/", "a", "z"]:
            expected_after = [name for name in expected if name > after]
            assert await names_of(store, prefix, after) == expected_after, (prefix, after)
    facts = [one async for page in store.list("kvx/v2/") for one in page]
    assert [(one.name, one.size_bytes) for one in facts] == [("kvx/v2/a/1", 10)]


async def test_lists_come_in_pages_and_batches_are_deleted(store: ObstoreStore) -> None:
    count = LIST_PAGE_MAX + 7
    names = [f"a/{number:04}" for number in range(count)]
    for first in range(0, count, 50):
        batch = names[first : first + 50]
        puts = (store.put(name, memoryview(b"x"), only_if_absent=True) for name in batch)
        await asyncio.gather(*puts)
    pages = [page async for page in store.list("a/")]
    assert [len(page) for page in pages] == [LIST_PAGE_MAX, 7]
    assert [one.name for page in pages for one in page] == names
    await store.delete([*names[: DELETE_BATCH_MAX - 1], "a/absent"])
    assert await names_of(store, "a/") == names[DELETE_BATCH_MAX - 1 :]
    await store.delete([])
    with pytest.raises(UsageError, match="1001 objects"):
        await store.delete(["x"] * (DELETE_BATCH_MAX + 1))


async def test_a_list_ends_with_the_last_name_of_its_prefix(answering: Serve) -> None:
    names = [f"a/{number:04}" for number in range(LIST_PAGE_MAX)]
    facts = "<LastModified>2026-11-21T12:00:00Z</LastModified><ETag>x</ETag><Size>1</Size>"
    listed = "".join(f"<Contents><Key>{name}</Key>{facts}</Contents>" for name in names)
    body = (
        "<ListBucketResult><NextContinuationToken>more</NextContinuationToken>"
        f"{listed}</ListBucketResult>"
    )
    server = answering(Answer(body=body.encode()))
    pages = [page async for page in open_at(server.endpoint).list("a/00")]
    assert [len(page) for page in pages] == [100]
    assert len(server.requests) <= 2  # the client is one page ahead


async def test_buckets_are_in_the_path_where_an_endpoint_is_given(answering: Serve) -> None:
    server = answering(part(b"x", 0, 1))
    await open_at(server.endpoint + "/").get("a", 0, 1)
    assert server.requests[0].path == "/bucket/a"
    assert "AWS4-HMAC-SHA256 Credential=kvxak/" in server.requests[0].head
    assert "x-amz-content-sha256: UNSIGNED-PAYLOAD" in server.requests[0].head


async def test_anonymous_requests_are_not_signed(answering: Serve) -> None:
    server = answering(part(b"x", 0, 1))
    await open_at(server.endpoint, is_anonymous=True).get("a", 0, 1)
    assert "authorization" not in server.requests[0].head.lower()


async def test_the_environment_names_an_endpoint_and_the_configuration_wins(
    answering: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, other = answering(part(b"x", 0, 1)), answering(part(b"x", 0, 1))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", named.endpoint)
    await open_at("").get("a", 0, 1)
    await open_at(other.endpoint).get("a", 0, 1)
    assert [len(server.requests) for server in (named, other)] == [1, 1]
    assert named.requests[0].path == "/bucket/a"


def write_profiles(home: Path, monkeypatch: pytest.MonkeyPatch, token: str = "") -> None:
    lines = ["[default]", "aws_access_key_id = ofdefault", "aws_secret_access_key = x"]
    lines += ["[other]", "aws_access_key_id = ofother", "aws_secret_access_key = x"]
    lines += [f"aws_session_token = {token}"] * bool(token)
    (home / "credentials").write_text("\n".join(lines))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "absent"))


@pytest.mark.parametrize(
    ("profile", "has_keys", "expected"),
    [("", True, "kvxak"), ("", False, "ofdefault"), ("other", True, "ofother")],
)
async def test_profiles(
    answering: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, profile: str,
    has_keys: bool, expected: str,
) -> None:  # fmt: skip
    write_profiles(tmp_path, monkeypatch, token="SESSION" * (profile != ""))
    if not has_keys:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    server = answering(part(b"x", 0, 1))
    await open_at(server.endpoint, profile=profile).get("a", 0, 1)
    assert f"Credential={expected}/" in server.requests[0].head
    assert ("x-amz-security-token: SESSION" in server.requests[0].head) == (profile != "")


async def test_no_credentials_anywhere(
    answering: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "absent"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "absent"))
    server = answering(part(b"x", 0, 1))
    with pytest.raises(ObjectError, match=r"no credentials .*AWS_ACCESS_KEY_ID") as caught:
        await open_at(server.endpoint).get("a", 0, 1)
    assert caught.value.fault is ObjectFault.DENIED
    assert not server.requests


async def test_credentials_that_a_service_does_not_give(
    answering: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setitem(sys.modules, "botocore", None)
    source, server = answering(refusal("404 Not Found")), answering(part(b"x", 0, 1))
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", source.endpoint)
    with pytest.raises(ObjectError, match=r"no credentials .*/token gave none, HTTP 404") as caught:
        await open_at(server.endpoint).get("a", 0, 1)
    assert caught.value.fault is ObjectFault.DENIED
    assert not server.requests


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore", None)
    with pytest.raises(UnavailableError, match="pip install boto3"):
        open_at("http://127.0.0.1:1", profile="some")
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(UnavailableError, match=r"pip install 'kvx\[s3\]'"):
        open_at("http://127.0.0.1:1")


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:9000", "http://", "ftp://host", "http://a b", "http://h\xf6st", "x:y:z"]
)
def test_an_endpoint_that_is_no_url(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="is not the URL of a service") as caught:
        open_at(endpoint)
    assert caught.value.key == "endpoint"


def test_secrets_in_an_endpoint_are_not_repeated() -> None:
    with pytest.raises(ConfigError, match="user") as caught:
        open_at("http://me:hidden@127.0.0.1:9000")
    assert "hidden" not in str(caught.value)


def test_certificates_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file") as caught:
        open_at("https://127.0.0.1:1", ca_file=tmp_path / "absent")
    assert caught.value.key == "ca_file"
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="certificate"):
        open_at("https://127.0.0.1:1", ca_file=tmp_path / "empty")


def test_on_aws_the_bucket_is_part_of_the_host() -> None:
    for bucket, expected in [
        ("mine", "https://mine.s3.eu-west-1.amazonaws.com"),
        ("with.dots", "https://s3.eu-west-1.amazonaws.com"),
    ]:
        store = open_store(S3TierConfig(bucket=bucket, region="eu-west-1"))
        assert store._place.endpoint == expected


def count_of(folder: str) -> int:
    return len(os.listdir(f"/proc/self/{folder}"))  # noqa: PTH208 - names of numbers


async def wait_until(is_so: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Look again and again; the client lets go of things in threads of its own."""
    ends_at = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < ends_at
        await asyncio.sleep(0.01)


HALF = Answer(
    "206 Partial Content", b"x", ("Content-Range: bytes 0-99/100", *MARKS), 100, Ending.HOLD
)


@pytest.mark.parametrize(("verb", "answer"), [("get", SILENCE), ("get", HALF), ("put", SILENCE)])
async def test_calls_that_are_given_up_leave_nothing_behind(
    answering: Serve, verb: str, answer: Answer
) -> None:
    server = answering(answer)
    store = open_at(server.endpoint)
    body = memoryview(bytes(1 << 20))

    def call() -> Coroutine[None, None, object]:
        is_get = verb == "get"
        return store.get("a", 0, 100) if is_get else store.put("a", body, only_if_absent=True)

    async def give_up(count: int) -> None:
        asked = len(server.requests) + count
        calls = [asyncio.create_task(call()) for _ in range(count)]
        await wait_until(lambda: len(server.requests) >= asked)
        for one in calls:
            one.cancel()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in ended)
        await wait_until(lambda: server.num_open == 0)

    await give_up(40)  # the client has its threads now
    descriptors, threads = count_of("fd"), count_of("task")
    references = sys.getrefcount(body)
    for _ in range(5):
        await give_up(40)
    await wait_until(lambda: count_of("fd") <= descriptors)
    await wait_until(lambda: sys.getrefcount(body) <= references)
    # Those that looked up names stay for 10 s, and are used again.
    assert count_of("task") <= threads + 40


async def test_a_closed_store_leaves_no_connections(answering: Serve) -> None:
    server = answering(part(b"x", 0, 1))
    store = open_at(server.endpoint)
    await asyncio.gather(*(store.get("a", 0, 1) for _ in range(8)))
    assert server.num_open > 0
    await store.close()
    await wait_until(lambda: server.num_open == 0)


def threads_of_a_client(num_cpus: int, **environment: str) -> int:
    """Return how many threads a process has once it has opened a bucket."""
    program = (
        "import os\n"
        "from kvx.cache.s3.obstore_store import open_store\n"
        "from kvx.tier_config import S3TierConfig\n"
        f"os.sched_getaffinity = lambda _: set(range({num_cpus}))\n"
        "before = dict(os.environ)\n"
        "open_store(S3TierConfig(bucket='b', endpoint='http://127.0.0.1:1', is_anonymous=True))\n"
        "assert dict(os.environ) == before\n"
        "print(len(os.listdir('/proc/self/task')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60,
        env=os.environ | environment,
    )  # fmt: skip
    return int(done.stdout)


def test_a_client_has_a_thread_for_four_cpus_unless_it_is_told() -> None:
    one = threads_of_a_client(num_cpus=2)
    assert threads_of_a_client(num_cpus=12) == one + 2
    assert threads_of_a_client(num_cpus=256) == one + 7
    assert threads_of_a_client(num_cpus=256, TOKIO_WORKER_THREADS="3") == one + 2
