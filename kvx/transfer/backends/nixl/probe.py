"""Does NIXL load here? Asked in a process of its own, once.

A plugin that is listed need not load, one that loads need not start, and some never return: GDS
without a driver spins for ever. So the question is put to a child with a time limit, and only what
it could create is created in this process.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys

MODULES = ("nixl_cu13", "nixl_cu12")
VERSION = "1.5"
INSTALL = "pip install --no-deps nixl-cu13==1.5.1"
_SAYS = "kvx-nixl-probe:"
_TEXT_MAX = 300


def module_name() -> str:
    """Return which build of NIXL is installed; empty when none is."""
    return next((name for name in MODULES if importlib.util.find_spec(name) is not None), "")


def version_of(module: str) -> str:
    """Return the version of an installed build."""
    try:
        return importlib.metadata.version(module.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.lru_cache(maxsize=32)
def objection(backends: tuple[str, ...], timeout_s: float) -> str:
    """Return why these plugins cannot be used here; empty when they can.

    Takes about a second the first time; the answer is kept.
    """
    module = module_name()
    if not module:
        return f"NIXL is not installed: {INSTALL}"
    version = version_of(module)
    if not version.startswith(f"{VERSION}."):
        return f"{module} is version {version}, kvx works with {VERSION}: {INSTALL}"
    return _ask_child(module, backends, timeout_s)


def _ask_child(module: str, backends: tuple[str, ...], timeout_s: float) -> str:
    try:
        child = subprocess.run(
            # This file alone, and nothing from the directory that we happen to stand in.
            [sys.executable, "-P", __file__, module, *backends],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"NIXL did not start {', '.join(backends)} within {timeout_s:g} s"
    said = [line for line in child.stdout.splitlines() if line.startswith(_SAYS)]
    if said:
        return said[-1].removeprefix(_SAYS).strip()
    return f"NIXL ended the probing process with {child.returncode}: {child.stderr[-_TEXT_MAX:]}"


def try_all(module: str, backends: list[str]) -> str:
    """Create an agent with these plugins; return why that does not work. For the child."""
    bindings = importlib.import_module(f"{module}._bindings")
    config = bindings.nixlAgentConfig()
    config.useProgThread = True
    config.pthrDelay = 1000
    agent = bindings.nixlAgent("kvx-probe", config)
    for backend in backends:
        try:
            kinds = agent.getPluginParams(backend)[1]
            if not kinds:
                return f"the plugin {backend} of NIXL is listed, and does not load"
            agent.createBackend(backend, {})
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
            return f"the plugin {backend} of NIXL does not start: {error}"
    return ""


def main() -> None:
    """Print the answer; for the child."""
    try:
        answer = try_all(sys.argv[1], sys.argv[2:])
    except ImportError as error:
        answer = f"{sys.argv[1]} is installed and cannot be imported: {error}"
    sys.stdout.write(f"{_SAYS} {answer[:_TEXT_MAX]}\n")


if __name__ == "__main__":
    main()
