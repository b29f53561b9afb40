"""What the build makes of the kernels: text for NVRTC, and a fatbin where there is an nvcc."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tests.sim.kernels import KERNELS, ROOT, kernel_names, parameter_bytes

FATBIN_MAGIC, PTX, CUBIN = 0xBA55ED50, 1, 2
CUBINS = [80, 86, 89, 90, 100, 120]
PORTABLE = ROOT / "kvx_ext/src/shim/cuda/portable.h"
TEXTS = sorted([*KERNELS.glob("*.cu"), KERNELS / "span.h", KERNELS / "floats.h"])
# Threads run one after the other on the CPU, so none may wait for, or speak to, another.
FORBIDDEN = re.compile(
    r"__sync|__shared__|\batomic|__shfl|__ballot|__any|__all|__activemask|__reduce|__threadfence"
    r"|cooperative|\basm\b|\bvolatile\b|cuda_fp|printf|malloc"
)
NVCC = shutil.which("nvcc", path="/usr/local/cuda/bin:/usr/local/bin") or shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def embed(output: Path, nvcc: str = "") -> subprocess.CompletedProcess[str]:
    defined = [
        f"-DINCLUDE={ROOT / 'kvx_ext/src'}", f"-DOUTPUT={output}", f"-DNVCC={nvcc}",
    ]  # fmt: skip
    script = ["-P", str(KERNELS / "embed.cmake")]
    return subprocess.run(
        ["cmake", *defined, *script], check=True, capture_output=True, text=True, timeout=300
    )


def fatbin_bytes(images: str) -> int:
    found = re.search(r"kernel_fatbin\(\) \{ return \{kFatbin, (\d+)\}; \}", images)
    assert found is not None
    return int(found[1])


def fatbin_entries(fatbin: bytes) -> list[tuple[int, int]]:
    """Return kind and architecture of each image; the layout is that of CUDA's fatbinary."""
    magic, _, header_bytes, size = struct.unpack_from("<IHHQ", fatbin)
    assert (magic, header_bytes + size) == (FATBIN_MAGIC, len(fatbin))
    entries, at = [], header_bytes
    while at < len(fatbin):
        kind, _, entry_header_bytes, entry_bytes = struct.unpack_from("<HHIQ", fatbin, at)
        (architecture,) = struct.unpack_from("<I", fatbin, at + 28)
        entries.append((kind, architecture))
        at += entry_header_bytes + entry_bytes
    return entries


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_threads_keep_to_themselves(path: Path) -> None:
    code = re.sub(r"//[^\n]*", "", path.read_text())
    assert FORBIDDEN.search(code) is None
    # All memory goes through `load` and `store`, or the bounds would not be checked.
    assert "reinterpret_cast" not in code


@pytest.mark.parametrize(
    "line",
    ["__syncthreads();", "atomicAdd(p, 1);", "__shared__ float x[32];", "__shfl_sync(m, v, 0);"],
)
def test_forbidden_words_are_found(line: str) -> None:
    assert FORBIDDEN.search(line) is not None


def test_without_nvcc_the_source_is_embedded(tmp_path: Path) -> None:
    embed(tmp_path)
    images = (tmp_path / "images.cpp").read_text()
    assert fatbin_bytes(images) == 0
    source = (tmp_path / "kvx_kernels.cu").read_text()
    assert source in images
    assert "#include" not in source
    assert not (tmp_path / "kvx_kernels.fatbin").exists()
    for path in (*TEXTS, KERNELS / "parameters.h", PORTABLE):
        last = [line for line in path.read_text().splitlines() if line and line[0] not in "}#/"][-1]
        assert last in source
    # It must be a text that a compiler takes without any file beside it.
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None
    checked = [compiler, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    subprocess.run(checked, check=True, input=source, text=True, timeout=60)


def test_an_nvcc_that_fails_is_reported_and_does_without(tmp_path: Path) -> None:
    failing = tmp_path / "nvcc"
    failing.write_text("#!/bin/sh\necho it is broken >&2\nexit 3\n")
    failing.chmod(0o755)
    done = embed(tmp_path, str(failing))
    assert "it is broken" in done.stderr
    assert fatbin_bytes((tmp_path / "images.cpp").read_text()) == 0


@needs_nvcc
def test_the_fatbin_has_every_architecture(tmp_path: Path) -> None:
    embed(tmp_path, str(NVCC))
    fatbin = (tmp_path / "kvx_kernels.fatbin").read_bytes()
    entries = fatbin_entries(fatbin)
    assert sorted(arch for kind, arch in entries if kind == CUBIN) == CUBINS
    # PTX of the oldest is what a driver compiles for a GPU that is none of these.
    assert [arch for kind, arch in entries if kind == PTX] == [80]
    images = (tmp_path / "images.cpp").read_text()
    assert fatbin_bytes(images) == len(fatbin)
    begin = images.index("kFatbin[] = {") + len("kFatbin[] = {")
    numbers = images[begin : images.index("};", begin)].split(",")
    assert bytes(int(number, 16) for number in numbers) == fatbin + b"\0"
    check_ptx(tmp_path)


def check_ptx(folder: Path) -> None:
    """The text that went into the fatbin has every kernel, with the parameters known here."""
    command = [str(NVCC), "-std=c++17", "-ptx", "-arch=compute_80", "-o", "kernels.ptx"]
    subprocess.run([*command, "kvx_kernels.cu"], cwd=folder, check=True, timeout=120)
    ptx = (folder / "kernels.ptx").read_text()
    entries = dict(re.findall(r"\.entry (\w+)\((.*?)\)", ptx, re.DOTALL))
    assert sorted(entries) == sorted(kernel_names())
    for name, parameters in entries.items():
        sizes = [
            int(count) if count else 8
            for count in re.findall(r"\.param \.(?:align 8 \.b8|u64) \w+(?:\[(\d+)\])?", parameters)
        ]
        assert sizes == parameter_bytes(name), name
    assert re.search(r"\b(bar|barrier|atom|red|shfl|vote|\.shared)\b", ptx) is None
    # Sixteen bytes at a time, as promised.
    assert ptx.count("ld.v4.u32") + ptx.count("ld.v4.b32") >= 4
