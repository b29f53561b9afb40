"""The corpus is Python's own documentation, in an order that repeats."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvx_server.engine.corpus import Document, documents, module_documents, topic_documents


def test_documents_of_the_running_python() -> None:
    everything = documents()
    modules = {document.title: document.text for document in everything}
    assert modules["json.decoder"].startswith("json.decoder\n\nImplementation of JSONDecoder")
    assert sum(len(document.text) for document in everything) > 500_000
    assert not any("test" in document.title.split(".") for document in everything)


def test_topics_are_sorted() -> None:
    topics = topic_documents()
    if not topics:
        pytest.skip("this Python was installed without pydoc_data.topics")
    titles = [document.title for document in topics]
    assert titles == sorted(titles)
    assert "import" in titles


def test_modules_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "pack" / "tests").mkdir(parents=True)
    (tmp_path / "pack" / "__init__.py").write_text('"""The pack."""\n', encoding="utf-8")
    (tmp_path / "pack" / "tests" / "left_out.py").write_text('"""Out."""\n', encoding="utf-8")
    (tmp_path / "pack" / "broken.py").write_text("def (", encoding="utf-8")
    (tmp_path / "pack" / "silent.py").write_text("x = 1\n", encoding="utf-8")
    (tmp_path / "one.py").write_text(
        "class A(B):\n"
        "    def f(self, x=1):\n"
        '        """Do.\n\n        More."""\n'
        "def g(): pass\n"
        "async def h(*, y: int):\n"
        '    """Wait."""\n',
        encoding="utf-8",
    )
    one = "one\n\nA.f(self, x=1)\n    Do.\n\n    More.\n\nh(*, y: int)\n    Wait.\n"
    assert module_documents(tmp_path) == [
        Document("one", one),
        Document("pack", "pack\n\nThe pack.\n"),
    ]
