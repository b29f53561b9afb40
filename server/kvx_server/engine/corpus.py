"""The running Python's own documentation as text, for demos and to train the tiny model on.

Nothing is downloaded and no module of the standard library is imported to read it: the language
reference comes from `pydoc_data.topics`, docstrings come from parsing the library's source files.
The order is deterministic for one Python version: topics by name, then modules by dotted name.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Folders below the standard library that hold tests, installed packages or generated files.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}
)
_Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of documentation.

    Attributes:
        title: Name of the help topic ("lambda") or dotted name of the module ("json.decoder").
        text: The documentation, which starts with the title and ends with a newline.
    """

    title: str
    text: str


def documents() -> list[Document]:
    """Return every document: `topic_documents()`, then `module_documents()`.

    Reads and parses some 600 files, which takes seconds: keep the result.
    """
    return topic_documents() + module_documents()


def topic_documents() -> list[Document]:
    """Return the help topics of the language reference, by name; empty where Python lacks them."""
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415 - some distributions lack it
    except ImportError:
        return []
    return [Document(name, f"{name}\n\n{topics[name].strip()}\n") for name in sorted(topics)]


def module_documents(folder: Path | None = None) -> list[Document]:
    """Return the docstrings of every module below a folder, one document per module.

    A module without docstrings gives no document, and neither does a file that does not parse.

    Args:
        folder: Where to look; the standard library of the running Python by default.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts):
            title = _module_name(relative)
            text = _module_text(title, path)
            if text is not None:
                found[title] = text
    return [Document(title, found[title]) for title in sorted(found)]


def _module_name(relative: Path) -> str:
    parts = list(relative.with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def _module_text(title: str, path: Path) -> str | None:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None
    pieces = list(_pieces(tree, owner=""))
    module_docstring = ast.get_docstring(tree)
    if module_docstring:
        pieces.insert(0, module_docstring.strip())
    return "\n\n".join([title, *pieces]) + "\n" if pieces else None


def _pieces(parent: ast.Module | ast.ClassDef, owner: str) -> Iterator[str]:
    """Yield `signature` plus indented docstring of every documented definition, in file order."""
    for node in parent.body:
        if not isinstance(node, _Documented):
            continue
        docstring = ast.get_docstring(node)
        if docstring:
            body = "\n".join(f"    {line}".rstrip() for line in docstring.strip().splitlines())
            yield f"{_signature(node, owner)}\n{body}"
        if isinstance(node, ast.ClassDef):
            yield from _pieces(node, owner=f"{owner}{node.name}.")


def _signature(node: _Documented, owner: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {owner}{node.name}({bases})" if bases else f"class {owner}{node.name}"
    return f"{owner}{node.name}({ast.unparse(node.args)})"
