"""The reader returns what was written, and refuses every file whose header lies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kvx_server.engine.errors import ModelFormatError
from kvx_server.engine.safetensors import SafetensorsFile

_VALUES = np.array([[1.0, -2.5, 3.0], [0.0, 65504.0, 2**-14]], dtype=np.float32)


def _write(path: Path, header: object, data: bytes, *, header_bytes: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(encoded) if header_bytes is None else header_bytes
    path.write_bytes(size.to_bytes(8, "little") + encoded + data)
    return path


def _entry(dtype: str = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> object:
    return {
        "__metadata__": {"a": "b"},
        "t": {"dtype": dtype, "shape": shape, "data_offsets": offsets},
    }


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_reads_as_float32(tmp_path: Path, dtype: str) -> None:
    data = {
        "F32": _VALUES.tobytes(),
        "F16": _VALUES.astype(np.float16).tobytes(),
        # The upper half of a float32; exact for these values but one.
        "BF16": (_VALUES.view(np.uint32) >> 16).astype(np.uint16).tobytes(),
    }[dtype]
    file = SafetensorsFile(_write(tmp_path / "a", _entry(dtype, offsets=(0, len(data))), data))
    assert file.names == {"t"}
    tensor = file.read("t")
    assert tensor.dtype == np.float32
    assert tensor.shape == (2, 3)
    np.testing.assert_allclose(tensor, _VALUES, rtol=2**-8 if dtype == "BF16" else 0)


def test_reads_scalars_empty_tensors_and_offsets(tmp_path: Path) -> None:
    header = {
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "empty": {"dtype": "F16", "shape": [0, 5], "data_offsets": [4, 4]},
        "last": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    }
    # An odd header size puts the tensors on odd addresses.
    encoded = json.dumps(header).encode() + b" "
    encoded += b" " * ((len(encoded) + 1) % 2)
    file = SafetensorsFile(
        _write(tmp_path / "a", encoded, np.array([7, 8], dtype=np.float32).tobytes())
    )
    assert file.read("scalar") == 7
    assert file.read("empty").shape == (0, 5)
    assert file.read("last").tolist() == [8]
    with pytest.raises(KeyError):
        file.read("other")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{not json", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (["t"], "not an object"),
        ({"t": 1}, "described by"),
        ({"t": {}}, "dtype None"),
        (_entry(dtype="I64"), "dtype 'I64'"),
        (_entry(shape="23"), "readable shape"),
        (_entry(shape=[2, -3]), "readable shape"),
        (_entry(shape=[2, True]), "readable shape"),
        (_entry(shape=[2**62, 2**62]), "needs"),
        (_entry(offsets=[0]), "data_offsets"),
        (_entry(offsets=[0, 24, 48]), "data_offsets"),
        (_entry(offsets=[24, 0]), "needs"),
        (_entry(offsets=[-24, 0]), "data_offsets"),
        (_entry(offsets=[0, 23]), "needs"),
        (_entry(offsets=[4, 28]), "claims"),
        (_entry(offsets=[2**70, 2**70 + 24]), "claims"),
    ],
)
def test_refuses_lying_header(tmp_path: Path, header: object, reason: str) -> None:
    path = _write(tmp_path / "a", header, _VALUES.tobytes())
    with pytest.raises(ModelFormatError, match=reason):
        SafetensorsFile(path)


@pytest.mark.parametrize("header_bytes", [10**6, 2**63, 2**64 - 1])
def test_refuses_header_size_beyond_file(tmp_path: Path, header_bytes: int) -> None:
    path = _write(tmp_path / "a", _entry(), _VALUES.tobytes(), header_bytes=header_bytes)
    with pytest.raises(ModelFormatError, match="header of"):
        SafetensorsFile(path)


def test_refuses_every_truncation(tmp_path: Path) -> None:
    path = _write(tmp_path / "a", _entry(), _VALUES.tobytes())
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFormatError):
            SafetensorsFile(path)


def test_refuses_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="cannot be opened"):
        SafetensorsFile(tmp_path / "a")


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    path = _write(tmp_path / "a", _entry(), _VALUES.tobytes())
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(500):
        changed = bytearray(whole)
        for position in generator.integers(0, len(whole) - _VALUES.nbytes, 2):
            changed[position] = generator.integers(256)
        path.write_bytes(changed)
        try:
            file = SafetensorsFile(path)
        except ModelFormatError:
            continue
        for name in file.names:
            assert file.read(name).nbytes <= 2 * _VALUES.nbytes
