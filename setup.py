"""Build kvx: Python packages from pyproject.toml plus one native module built by CMake."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Build `kvx_ext._core` with CMake instead of distutils' own compiler driver."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and install the module where setuptools expects it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        # --fresh: pip builds in environments that are gone the next time, caches would name them.
        configure = [
            "cmake", "--fresh", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        subprocess.run(
            ["cmake", "--build", str(build_dir), "--target", "_core", "-j", jobs], check=True
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        built = next(build_dir.glob("_core*.so"))
        target.unlink(missing_ok=True)
        self.copy_file(str(built), str(target))


setup(
    packages=[
        *find_packages(include=["kvx", "kvx.*", "kvx_ext"]),
        *find_packages("server", include=["kvx_server", "kvx_server.*"]),
        *find_packages("connectors", include=["kvx_vllm", "kvx_vllm.*"]),
        *find_packages("benchmarks", include=["kvx_bench", "kvx_bench.*"]),
    ],
    package_dir={
        "kvx_server": "server/kvx_server",
        "kvx_bench": "benchmarks/kvx_bench",
        "kvx_vllm": "connectors/kvx_vllm",
    },
    package_data={
        "kvx": ["py.typed"],
        "kvx_ext": ["py.typed", "_core.pyi", "include/kvx/*.h"],
        "kvx_server": ["engine/tiny_llama/*"],
    },
    ext_modules=[Extension("kvx_ext._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
