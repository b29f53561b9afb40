"""Everybody who takes part moves bytes, whole, and is told when they are not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvx.errors import UnavailableError
from kvx_bench.row import Row
from kvx_bench.s3.bucket import Bucket
from kvx_bench.s3.clients import client
from kvx_bench.s3.entrant import Entrant
from kvx_bench.s3.rig import BASELINES, KVX, Rig, present
from kvx_bench.s3.service import Service
from tests.s3.servers import open_bucket, open_client

NUM_BLOCKS = 16
BLOCK_BYTES = 64 << 10
# Of kvx's, with the settings it has by itself.
NUM_GROUPS = 2


@pytest.fixture
def rig(s3_endpoint: Service) -> Iterator[Rig]:
    with Bucket(s3_endpoint) as bucket:
        yield Rig(bucket, 4, NUM_BLOCKS, BLOCK_BYTES, 1)


@pytest.fixture(params=[*BASELINES, KVX])
def entrant(rig: Rig, request: pytest.FixtureRequest) -> Iterator[Entrant]:
    try:
        made = rig.open(request.param)
    except UnavailableError as error:
        if "ModuleNotFoundError" not in str(error):
            raise
        pytest.skip(f"{request.param}: {error}")
    with made:
        yield made


def test_what_is_put_is_brought_back_and_removed(rig: Rig, entrant: Entrant) -> None:
    entrant.store()
    names = rig.bucket.names()
    assert len(names) in (NUM_BLOCKS, NUM_GROUPS)
    assert all(name.startswith(f"{rig.bucket.prefix}/") for name in names)
    sample = entrant.get()
    assert sample.wall_s > 0
    assert sample.cpu_s > 0
    assert entrant.put().wall_s > 0
    assert rig.bucket.names() == names


def test_wrong_bytes_are_told(rig: Rig, entrant: Entrant) -> None:
    entrant.store()
    where = {"Bucket": rig.bucket.name, "Key": max(rig.bucket.names())}
    with open_client(rig.bucket.service) as s3:
        body = bytearray(s3.get_object(**where)["Body"].read())
        body[len(body) // 2] ^= 1
        s3.put_object(**where, Body=bytes(body))
    with pytest.raises(UnavailableError, match=r"has 0x|of 16 arrived"):
        entrant.get()


def test_who_is_not_installed_is_a_row(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvx_bench.s3.rig.BASELINES", ("nobody",))
    absent: list[Row] = []
    with present(rig, absent) as entrants:
        assert set(entrants) == {KVX}
    assert [row.key for row in absent] == ["s3.baseline.nobody"]
    assert absent[0].note.startswith("not here because ")


def test_everybody_is_known() -> None:
    assert set(client._CLIENTS) == {*BASELINES, KVX}


def test_a_bucket_of_others_is_left_as_it_was(s3_endpoint: Service) -> None:
    with open_bucket(s3_endpoint) as others:
        others.put("theirs", b"x")
        with Bucket(s3_endpoint, others.name) as bucket:
            others.put(f"{bucket.prefix}/ours", b"y")
            assert bucket.names() == {f"{bucket.prefix}/ours"}
        assert others.names() == ["theirs"]
