"""The rules of the house that no linter knows, as tests. See docs/ARCHITECTURE.md.

A rule that makes one place worse is overruled where it is stated here, with the reason beside it.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Packages of the product, and the folder their names start at.
PACKAGES = {
    "kvx": "",
    "server/kvx_server": "server",
    "connectors/kvx_vllm": "connectors",
    "benchmarks/kvx_bench": "benchmarks",
}
CODE_FOLDERS = ("kvx", "kvx_ext", "server", "connectors", "benchmarks", "tests")
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70

# From the bottom up; a package may import from its own level and from those below.
LEVELS = (("kvx_ext",), ("kvx",), ("kvx.transfer",), ("kvx.cache",), ("kvx.cli",))
# `kvx_bench` measures the native core itself as a limit line, so it may see that too.
PUBLIC = {
    "kvx_server": {"kvx", "kvx.errors"},
    "kvx_vllm": {"kvx", "kvx.errors"},
    "kvx_bench": {"kvx", "kvx.errors", "kvx_ext"},
}
FOREIGN_TO_KVX = {"torch", "vllm", "sglang", "fastapi", "starlette", "aiohttp", "uvicorn"}
NAMES_REFUSED = {"util", "utils", "helper", "helpers", "common", "misc", "mgr", "tools", "stuff"}
PARAMETERS_REFUSED = {"src", "dst"}
# setup.py passes the number of compile jobs on; it runs before there is a kvx to import.
ENVIRONMENT_READERS = {"kvx/config.py", "connectors/kvx_vllm/settings.py", "setup.py"}
# Finished, but what is going to import them is not; each leaves the list when it is.
AWAITED: set[str] = {"kvx.transfer.relayout"}
# For authors of backends and for tests, outside of what the product itself runs.
STANDALONE = {"kvx.transfer.conformance"}
# One of these caught to do nothing hides what nobody thought of; a narrow one is a decision.
BROAD_EXCEPTIONS = {"Exception", "BaseException", "OSError", "KvxError"}
# Functions that read best in one piece, by file and the lines they may have.
LONG_FUNCTIONS = {
    "kvx_ext/bind/engine.cpp": 80,  # a table: one entry a method
    "tests/native/test_engine.cpp": 80,  # a storm needs all its weather at once
}


@cache
def files(*suffixes: str) -> tuple[Path, ...]:
    found = [ROOT / "setup.py"] if ".py" in suffixes else []
    for folder in CODE_FOLDERS:
        paths = (ROOT / folder).rglob("*")
        found.extend(path for path in paths if path.suffix in suffixes)
    return tuple(sorted(found))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def modules() -> dict[str, Path]:
    """Return every module of the product by its dotted name."""
    found = {}
    for folder, root in PACKAGES.items():
        for path in files(".py"):
            if path.is_relative_to(ROOT / folder):
                parts = path.relative_to(ROOT / root).with_suffix("").parts
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """Yield what a module imports, `a.b` for `from a import b`, with the line."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def level_of(name: str) -> int | None:
    """Return the level of a module of kvx; None for anything else."""
    inside = [level for level, names in enumerate(LEVELS) if any(is_within(name, n) for n in names)]
    return max(inside, default=None)


def test_imports_go_down_only() -> None:
    wrong = []
    for name, path in modules().items():
        # `kvx` itself re-exports what is public, so it stands above all of them.
        own = len(LEVELS) if name == "kvx" else level_of(name)
        for imported, line in imports(name, path):
            target = level_of(imported)
            where = f"{label(path)}:{line}: {imported}"
            if own is None and target is not None:
                module = imported if imported in modules() else imported.rpartition(".")[0]
                if module not in PUBLIC[name.partition(".")[0]]:
                    wrong.append(f"{where} is not public")
            elif own is not None and target is not None and target > own:
                wrong.append(f"{where} is above")
            elif own is not None and imported.split(".")[0] in FOREIGN_TO_KVX:
                wrong.append(f"{where} is foreign to kvx")
            elif own is not None and imported.split(".")[0] in PUBLIC:
                wrong.append(f"{where} is above")
    assert not wrong, "\n".join(wrong)


def test_no_module_is_dead() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [scripts.get("scripts", {}), *scripts.get("entry-points", {}).values()]
    alive = {target.partition(":")[0] for group in groups for target in group.values()}
    for name, path in modules().items():
        for imported, _ in imports(name, path):
            alive |= {imported, imported.rpartition(".")[0]} - {name}
        # Verbs of the command are imported by name, those that were asked for only.
        alive |= {
            node.value
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
    dead = {
        name
        for name, path in modules().items()
        if name not in alive and path.name not in {"__init__.py", "__main__.py"}
    }
    assert not dead - AWAITED - STANDALONE, "imported by nothing"
    assert not AWAITED - dead, "imported by now: take them off AWAITED"


def test_files_stay_small() -> None:
    sizes = {path: path.read_text().count("\n") for path in files(".py", ".cpp", ".h", ".cu")}
    long = [
        f"{label(path)}: {lines} lines, at most {FILE_LINES_MAX}"
        for path, lines in sizes.items()
        if lines > FILE_LINES_MAX
    ]
    assert not long, "\n".join(long)


def python_functions(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (line, lines) of every function, without its docstring."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = lines_of(first) if ast.get_docstring(node) is not None else 0
            yield node.lineno, lines_of(node) - documented


def lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def cpp_functions(text: str) -> Iterator[tuple[int, int]]:
    """Yield (line, lines) of every outermost braced block whose header has parentheses."""
    blank = r"//[^\n]*|/\*.*?\*/|\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)+'|#(?:\\.|[^\n])*"
    code = re.sub(blank, lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    stack: list[tuple[bool, int]] = []
    header, line, start = "", 1, 1
    for sign in code:
        line += sign == "\n"
        if sign == "{":
            first = re.match(r"\s*(\w*)", header)
            is_scope = first is not None and first[1] in {"namespace", "class", "struct", "enum"}
            stack.append((")" in header and not is_scope, start))
        elif sign == "}" and stack:
            is_function, begun = stack.pop()
            if is_function and not any(outer for outer, _ in stack):
                yield begun, line - begun + 1
        if sign in "{};":
            header = ""
        elif header or not sign.isspace():
            start = start if header else line
            header += sign


def test_functions_stay_short() -> None:
    long = []
    for path in files(".py", ".cpp", ".h", ".cu"):
        is_python = path.suffix == ".py"
        found = python_functions(path) if is_python else cpp_functions(path.read_text())
        lines_max = LONG_FUNCTIONS.get(label(path), FUNCTION_LINES_MAX)
        long += [
            f"{label(path)}:{line}: {lines} lines, at most {lines_max}"
            for line, lines in found
            if lines > lines_max
        ]
    assert not long, "\n".join(long)


def is_broad(types: ast.expr) -> bool:
    names = types.elts if isinstance(types, ast.Tuple) else [types]
    return any(ast.unparse(name).rpartition(".")[2] in BROAD_EXCEPTIONS for name in names)


def is_nothing(statement: ast.stmt) -> bool:
    is_dots = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_dots or isinstance(statement, ast.Pass | ast.Continue)


def is_swallowing(node: ast.AST) -> bool:
    if isinstance(node, ast.ExceptHandler):
        is_idle = all(map(is_nothing, node.body))
        return node.type is None or (is_idle and is_broad(node.type))
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]
        return name == "suppress" and any(map(is_broad, node.args))
    return False


def test_no_exception_is_swallowed() -> None:
    swallowed = [
        f"{label(path)}:{node.lineno}"
        for path in files(".py")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ExceptHandler | ast.Call) and is_swallowing(node)
    ]
    assert not swallowed, "\n".join(swallowed)


def test_only_the_configuration_reads_the_environment() -> None:
    pattern = re.compile(r"\bos\.environ|\bgetenv\b|from os import .*environ")
    readers = []
    for path in files(".py", ".cpp", ".h", ".cu"):
        is_exempt = label(path) in ENVIRONMENT_READERS or label(path).startswith("tests/")
        if not is_exempt and pattern.search(path.read_text()):
            readers.append(label(path))
    assert not readers, "\n".join(readers)


def test_names_say_what_a_module_is() -> None:
    wrong = [
        f"{label(path)}: {part}"
        for path in files(".py", ".cpp", ".h", ".cu")
        for part in path.relative_to(ROOT).with_suffix("").parts
        if part in NAMES_REFUSED or re.search(r"_v\d+$", part)
    ]
    assert not wrong, "\n".join(wrong)


def test_parameters_are_called_source_and_target() -> None:
    wrong = [
        f"{label(path)}:{node.lineno}: {node.arg}"
        for path in files(".py")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.arg) and node.arg in PARAMETERS_REFUSED
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_left_for_later() -> None:
    # With brackets, so that this file does not find itself.
    pattern = re.compile(r"\b(TO[D]O|FIX[M]E|XX[X])\b")
    notes = [
        f"{label(path)}:{number}: {line.strip()}"
        for path in files(".py", ".cpp", ".h", ".cu")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not notes, "\n".join(notes)


def test_only_the_bindings_see_python() -> None:
    pattern = re.compile(r"#include\s+[<\"](nanobind|Python\.h|pybind11)")
    seers = [
        label(path)
        for path in files(".cpp", ".h", ".cu")
        if pattern.search(path.read_text()) and not label(path).startswith("kvx_ext/bind/")
    ]
    assert not seers, "\n".join(seers)


def test_conditional_compilation_stays_in_the_shims() -> None:
    pattern = re.compile(r"^\s*#\s*(if|ifdef|ifndef)\b", re.MULTILINE)
    wrong = [
        label(path)
        for path in files(".cpp", ".h", ".cu")
        if label(path).startswith("kvx_ext/")
        and not label(path).startswith("kvx_ext/src/shim/")
        and pattern.search(path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int f(int a) {\n  return a;\n}\n", [(1, 3)]),
        ("namespace a {\nvoid f() {\n  if (x) {\n  }\n}\n}\n", [(2, 4)]),
        ("class A {\n  int g() const {\n    return '{';\n  }\n};\n", [(2, 3)]),
        ('void f() { s = "}"; }  // }\nint x{3};\n', [(1, 1)]),
        ("#define F(a) \\\n  f(a, \\\n    (a))\n\nstruct A {\n  int a;\n};\n", []),
    ],
)
def test_cpp_functions_are_found(text: str, expected: list[tuple[int, int]]) -> None:
    assert list(cpp_functions(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("try:\n  f()\nexcept Exception:\n  pass\n", True),
        ("try:\n  f()\nexcept (ValueError, OSError):\n  ...\n", True),
        ("try:\n  f()\nexcept:\n  g()\n", True),
        ("with contextlib.suppress(Exception):\n  f()\n", True),
        ("with contextlib.suppress(FileExistsError):\n  f()\n", False),
        ("try:\n  f()\nexcept Exception:\n  x = None\n", False),
        ("try:\n  f()\nexcept FileExistsError:\n  pass\n", False),
    ],
)
def test_swallowing_is_recognised(text: str, *, expected: bool) -> None:
    assert any(map(is_swallowing, ast.walk(ast.parse(text)))) is expected
