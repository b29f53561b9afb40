"""The rules of the house as tests: layers, sizes, names, and what must not be in the code.

Each rule is a function from source to complaints; the samples at the end show that it can complain.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kvx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[1]
LINES_MAX = 400
FUNCTION_LINES_MAX = 70

# Where packages lie, and what their modules are called.
PACKAGES = {"kvx": "", "kvx_ext": "", "server/kvx_server": "server/", "benchmarks/kvx_bench": "benchmarks/"}  # fmt: skip  # noqa: E501
NATIVE = ("kvx_ext", "tests/native")
SHIM = "kvx_ext/src/shim/"

# What the wheel needs; `rich` is for people, so only the command has it.
DEPENDENCIES = {"numpy", "msgspec", "yaml", "_typeshed"}
COMMAND_DEPENDENCIES = DEPENDENCIES | {"rich"}

ENVIRONMENT_READERS = {
    "kvx/config.py": "reads it once, for everybody",
    "setup.py": "the build takes its number of jobs from there, as CMake does",
    "server/kvx_server/demo/command.py": "hands it on to the processes it starts",
}
FORBIDDEN_NAMES = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "mgr", "v2"}
MARKS = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")
BROAD = {"Exception", "BaseException"}
LOGS = {"exception", "error", "warning", "critical"}


def files(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[str]:
    """Return the files of some folders, by path from the root."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(
        str(path.relative_to(ROOT))
        for path in found
        if path.suffix in suffixes and path.is_file() and "__pycache__" not in path.parts
    )


PRODUCT = [*files(*PACKAGES), *files("server/training"), "setup.py"]
PYTHON = sorted({*PRODUCT, *files("tests")})
CPP = files(*NATIVE, suffixes=(".cpp", ".h"))
TEXTS = [
    *PYTHON,
    *CPP,
    *files("docs", suffixes=(".md",)),
    "README.md",
    "CMakeLists.txt",
    "Makefile",
]


def module_name(path: str) -> str:
    """Return what a file of a package is imported as."""
    for prefix in PACKAGES.values():
        if prefix and path.startswith(prefix):
            path = path.removeprefix(prefix)
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


MODULES = {module_name(path): path for path in files(*PACKAGES)}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and module of every import, also of those that only types need."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, one.name) for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for one in node.names:
                full = f"{node.module}.{one.name}"
                yield node.lineno, full if full in MODULES else str(node.module)


def layer(module: str) -> float:
    """Return how high a module stands; nothing imports what stands higher than itself."""
    parts = module.split(".")
    if parts[0] == "kvx_ext":
        return 0
    if parts == ["kvx"]:
        return 4  # the public face: the command and what is above it may look at it
    return {"transfer": 2, "cache": 3, "cli": 5}.get(parts[1], 1)


def layer_complaints(module: str, source: str) -> list[str]:
    """Complain about imports that go up, past the public names, or out of the house."""
    package = module.split(".", maxsplit=1)[0]
    complaints = []
    for line, name in imports(ast.parse(source)):
        top = name.split(".")[0]
        if package not in {"kvx", "kvx_ext"}:
            allowed = {"kvx", package} | ({"kvx_ext"} if package == "kvx_bench" else set())
            is_ours = top.startswith("kvx")
            if is_ours and (top not in allowed or (top == "kvx" and name != "kvx")):
                complaints.append(f"{module}:{line} imports {name}, which is not public")
        elif top in {"kvx", "kvx_ext"}:
            if layer(name) > layer(module):
                complaints.append(f"{module}:{line} imports {name} from a layer above it")
        else:
            is_command = module.startswith("kvx.cli")
            known = COMMAND_DEPENDENCIES if is_command else DEPENDENCIES
            if top not in sys.stdlib_module_names and top not in known:
                complaints.append(f"{module}:{line} imports {name}, which is no dependency of kvx")
    return complaints


def public_name_complaints(module: str, source: str) -> list[str]:
    """Complain about uses of `kvx.x` where x is not in `kvx.__all__`."""
    return [
        f"{module}:{node.lineno} uses kvx.{node.attr}, which is not public"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "kvx"
        and node.attr not in kvx.__all__
    ]


def size_complaints(path: str, source: str) -> list[str]:
    """Complain about files and Python functions that are too long."""
    count = len(source.splitlines())
    complaints = [f"{path} has {count} lines"] if count > LINES_MAX else []
    if not path.endswith(".py"):
        return complaints
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                complaints.append(f"{path}:{node.lineno} {node.name} has {lines} lines")
    return complaints


def swallow_complaints(path: str, source: str) -> list[str]:
    """Complain about broad handlers that neither raise nor log nor use what they caught."""
    complaints = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and (node.type is None or _is_broad(node.type)):
            inside = [one for statement in node.body for one in ast.walk(statement)]
            is_handled = any(
                isinstance(one, ast.Raise)
                or (isinstance(one, ast.Attribute) and one.attr in LOGS)
                or (isinstance(one, ast.Name) and one.id == node.name)
                for one in inside
            )
            if node.type is None or not is_handled:
                complaints.append(f"{path}:{node.lineno} swallows an exception")
        is_call = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress")
        if is_call and isinstance(node, ast.Call) and any(map(_is_broad, node.args)):
            complaints.append(f"{path}:{node.lineno} suppresses every exception")
    return complaints


def _is_broad(caught: ast.expr) -> bool:
    return any(isinstance(one, ast.Name) and one.id in BROAD for one in ast.walk(caught))


def environment_complaints(path: str, source: str) -> list[str]:
    """Complain about looks at the environment."""
    return [
        f"{path}:{node.lineno} reads the environment"
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv"})
        or (isinstance(node, ast.ImportFrom) and node.module == "os"
            and {one.name for one in node.names} & {"environ", "environb", "getenv"})
    ]  # fmt: skip


def cpp_complaints(path: str, source: str) -> list[str]:
    """Complain about conditional code, include guards and the environment in C++."""
    complaints = []
    for number, line in enumerate(source.splitlines(), 1):
        if re.match(r"\s*#\s*(if|ifdef|ifndef|elif|else)\b", line) and not path.startswith(SHIM):
            complaints.append(f"{path}:{number} compiles conditionally")
        if re.search(r"\bgetenv\b", line):
            complaints.append(f"{path}:{number} reads the environment")
    if path.endswith(".h") and "#pragma once" not in source:
        complaints.append(f"{path} has no #pragma once")
    return complaints


def mark_complaints(path: str, source: str) -> list[str]:
    """Complain about work left behind."""
    return [
        f"{path}:{number} {found[0]}"
        for number, line in enumerate(source.splitlines(), 1)
        if (found := MARKS.search(line))
    ]


def name_complaints(path: str) -> list[str]:
    """Complain about names that say nothing."""
    words = {word for part in Path(path).with_suffix("").parts for word in part.split("_")}
    return [f"{path} is called {word}" for word in sorted(words & FORBIDDEN_NAMES)]


def all_of(check: Callable[[str, str], list[str]], paths: list[str]) -> list[str]:
    return [
        complaint for path in paths for complaint in check(path, (ROOT / path).read_text("utf-8"))
    ]


def test_imports_go_down_only() -> None:
    assert [
        complaint
        for module, path in MODULES.items()
        for complaint in layer_complaints(module, (ROOT / path).read_text())
    ] == []


def test_what_stands_on_kvx_uses_public_names() -> None:
    above = [path for path in MODULES.values() if path.startswith(("server/", "benchmarks/"))]
    assert all_of(public_name_complaints, above) == []


def test_files_and_functions_are_short() -> None:
    assert all_of(size_complaints, [*PYTHON, *CPP]) == []


def test_no_exception_is_swallowed() -> None:
    assert all_of(swallow_complaints, PYTHON) == []


def test_the_environment_is_read_in_one_place() -> None:
    complaints = all_of(environment_complaints, PRODUCT)
    assert [one for one in complaints if one.split(":")[0] not in ENVIRONMENT_READERS] == []
    assert {one.split(":")[0] for one in complaints} == set(ENVIRONMENT_READERS)


def test_nothing_is_left_for_later() -> None:
    assert all_of(mark_complaints, TEXTS) == []


def test_cpp_is_unconditional() -> None:
    assert all_of(cpp_complaints, CPP) == []


def test_names_say_something() -> None:
    assert [complaint for path in [*PYTHON, *CPP] for complaint in name_complaints(path)] == []


def test_every_folder_of_a_package_is_a_package() -> None:
    """Setuptools leaves out folders without `__init__.py`, and whatever is below them."""
    folders = {Path(path).parent for path in MODULES.values()}
    assert [str(one) for one in folders if not (ROOT / one / "__init__.py").exists()] == []


def test_no_module_is_dead() -> None:
    """Somebody imports it, starts it by name, or it is an entry point."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    alive = {target.split(":")[0] for target in project["scripts"].values()}
    for group in project["entry-points"].values():
        alive |= {target.split(":")[0] for target in group.values()}
    for module, path in MODULES.items():
        tree = ast.parse((ROOT / path).read_text())
        named = {name for _, name in imports(tree)}
        named |= {one.value for one in ast.walk(tree)
                  if isinstance(one, ast.Constant) and isinstance(one.value, str)}  # fmt: skip
        alive |= named - {module}
    alive |= {name.rsplit(".", depth)[0] for name in list(alive) for depth in range(1, 4)}
    assert sorted(MODULES.keys() - alive) == []


def test_no_header_is_dead() -> None:
    included = {
        name
        for path in CPP
        for name in re.findall(r'#include "([^"]+)"', (ROOT / path).read_text())
    }
    headers = [path for path in CPP if path.endswith(".h")]
    assert [one for one in headers if not any(one.endswith("/" + name) for name in included)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvx.layout", "import kvx.transfer.handle"),
        ("kvx.layout", "from kvx import namespace, TieredCache"),
        ("kvx.transfer.handle", "from kvx.cache import events"),
        ("kvx.cache.events", "if TYPE_CHECKING:\n    from kvx.cli.main import main"),
        ("kvx.cache.events", "import kvx"),
        ("kvx.cache.events", "import torch"),
        ("kvx.cache.events", "def f():\n    import vllm"),
        ("kvx.cache.events", "import rich"),
        ("kvx.cli.main", "import kvx_bench"),
        ("kvx_ext", "import kvx.errors"),
        ("kvx_server.x", "from kvx.cache.events import EventLog"),
        ("kvx_server.x", "from kvx_ext import _core"),
        ("kvx_server.x", "import kvx_bench.case"),
        ("kvx_bench.x", "import kvx.config"),
    ],
)
def test_a_broken_layer_is_seen(module: str, source: str) -> None:
    assert len(layer_complaints(module, source)) == 1


LONG = "def f():\n" + "    a = 1\n" * FUNCTION_LINES_MAX
SAMPLES: list[tuple[Callable[[str, str], list[str]], str, str]] = [
    (public_name_complaints, "m", "kvx.Secret()"),
    (size_complaints, "a.py", "a = 1\n" * (LINES_MAX + 1)),
    (size_complaints, "a.cpp", "\n" * (LINES_MAX + 1)),
    (size_complaints, "a.py", LONG),
    (size_complaints, "a.py", "async " + LONG),
    (swallow_complaints, "a.py", "try:\n  f()\nexcept:\n  raise"),
    (swallow_complaints, "a.py", "try:\n  f()\nexcept Exception:\n  pass"),
    (swallow_complaints, "a.py", "try:\n  f()\nexcept (OSError, BaseException) as e:\n  g()"),
    (swallow_complaints, "a.py", "with contextlib.suppress(Exception):\n  f()"),
    (environment_complaints, "a.py", "import os\nos.getenv('A')"),
    (environment_complaints, "a.py", "os.environ.get('A')"),
    (environment_complaints, "a.py", "from os import environ"),
    (cpp_complaints, "kvx_ext/src/a.cpp", "#ifdef A"),
    (cpp_complaints, "kvx_ext/src/a.cpp", "  # if A"),
    (cpp_complaints, "kvx_ext/src/a.cpp", 'std::getenv("A")'),
    (cpp_complaints, "kvx_ext/src/shim/a.h", "#ifndef A\n#define A"),
    (mark_complaints, "a.md", "TO" + "DO: later"),
    (lambda path, _: name_complaints(path), "kvx/cache/disk_utils.py", ""),
    (lambda path, _: name_complaints(path), "kvx/common/a.py", ""),
]


@pytest.mark.parametrize(("check", "path", "source"), SAMPLES)
def test_every_rule_can_complain(
    check: Callable[[str, str], list[str]], path: str, source: str
) -> None:
    assert len(check(path, source)) == 1


def test_what_is_handled_is_not_swallowed() -> None:
    for body in ("raise", "_log.exception('x')", "store(error)"):
        source = f"try:\n  f()\nexcept Exception as error:\n  {body}"
        assert swallow_complaints("a.py", source) == []
