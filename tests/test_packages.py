"""What is installed: whole packages, that need what is declared and use what is public."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import kvx
from kvx_ext import _core

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "kvx", "kvx_ext", "server/kvx_server", "connectors/kvx_vllm", "benchmarks/kvx_bench",
)  # fmt: skip
# What a distribution is imported as, where that is not its own name.
IMPORTED_AS = {"pyyaml": "yaml"}
# Ships with type checkers, never imported when the code runs.
TYPES_ONLY = {"_typeshed"}
# Comes with extras of kvx, or is used where somebody has it for reasons of his own.
OPTIONAL = {"obstore": "s3", "cryptography": "s3", "botocore": None}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(source: str) -> set[str]:
    """Return the top names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {one.name.partition(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


def kvx_names(source: str) -> set[str]:
    """Return every x of `kvx.x` and `from kvx import x`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        is_attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if is_attribute and ast.unparse(node).startswith("kvx."):
            found.add(ast.unparse(node).removeprefix("kvx."))
        elif isinstance(node, ast.ImportFrom) and node.module == "kvx":
            found |= {one.name for one in node.names}
    return found


def test_every_folder_of_a_package_is_a_package() -> None:
    """Setuptools leaves out folders without `__init__.py`, and whatever is below them."""
    folders = {path.parent for path in python_files(*PACKAGES)}
    assert [str(one) for one in folders if not (one / "__init__.py").exists()] == []


def test_kvx_needs_only_what_it_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[<>=\[ ]", one)[0] for one in project["dependencies"]]
    declared = {IMPORTED_AS.get(name, name) for name in names}
    used = {name for path in python_files("kvx") for name in imported(path.read_text())}
    ours = {"kvx", "kvx_ext"} | TYPES_ONLY
    assert used - sys.stdlib_module_names - ours - set(OPTIONAL) == declared
    extras = project["optional-dependencies"]
    for name, extra in OPTIONAL.items():
        assert name in used
        assert extra is None or any(one.startswith(name) for one in extras[extra])


def test_what_stands_on_kvx_uses_public_names() -> None:
    hidden = {
        f"{path.relative_to(ROOT)}: kvx.{name}"
        for path in python_files("server", "connectors", "benchmarks")
        for name in kvx_names(path.read_text()) - set(kvx.__all__) - {"errors"}
    }
    assert hidden == set()


def test_public_names_are_there_and_sorted() -> None:
    assert [name for name in kvx.__all__ if not hasattr(kvx, name)] == []
    assert sorted(kvx.__all__) == kvx.__all__


def test_headers_are_included_once_and_by_somebody() -> None:
    sources = [
        path
        for folder in ("kvx_ext", "tests/native")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".h", ".cpp", ".cu"}
    ]
    texts = {path: path.read_text() for path in sources}
    included = {name for text in texts.values() for name in re.findall(r'#include "(.+)"', text)}
    headers = [path for path in sources if path.suffix == ".h"]
    assert [str(one) for one in headers if "#pragma once" not in texts[one]] == []
    dead = [one for one in headers if not any(str(one).endswith(f"/{name}") for name in included)]
    assert [str(one) for one in dead] == []


def test_native_code_does_not_read_the_environment() -> None:
    readers = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "kvx_ext").rglob("*")
        if path.suffix in {".h", ".cpp"} and re.search(r"\bgetenv\b", path.read_text())
    ]
    assert readers == []


def mistakes_mark() -> bytes:
    """Return what a file of native code contains when it can make mistakes on purpose."""
    source = (ROOT / "kvx_ext/src/shim/sabotage.h").read_text()
    found = re.search(r'kMistakesMark\[\] =\s*"(.+)"', source)
    assert found is not None
    return found[1].encode()


def test_what_is_installed_makes_no_mistakes_on_purpose() -> None:
    assert mistakes_mark() not in Path(_core.__file__).read_bytes()


def test_the_rules_can_complain() -> None:
    assert imported("def f():\n    import torch.nn\n    from vllm.x import y") == {"torch", "vllm"}
    assert kvx_names("kvx.Secret()\nfrom kvx import hidden\nx.kvx.y") == {"Secret", "hidden"}
