"""The conversations of the demo: questions about long passages of Python's own documentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvx_server.engine.corpus import topic_documents

if TYPE_CHECKING:
    from collections.abc import Sequence

_PASSAGE_CHARACTERS = 900


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a user says, turn by turn.

    Attributes:
        title: What it is about.
        passages: One a turn; a prompt holds all passages and answers so far.
    """

    title: str
    passages: tuple[str, ...]


def conversations(count: int, num_turns: int) -> list[Conversation]:
    """Return conversations over the longest help topics of the running Python.

    Raises:
        ValueError: This Python carries no documentation (`pydoc_data` is missing).
    """
    topics = sorted(topic_documents(), key=lambda document: (-len(document.text), document.title))
    if len(topics) < count:
        message = f"this Python carries {len(topics)} help topics; {count} are needed"
        raise ValueError(message)
    return [
        Conversation(
            document.title,
            tuple(
                document.text[turn * _PASSAGE_CHARACTERS : (turn + 1) * _PASSAGE_CHARACTERS]
                for turn in range(num_turns)
            ),
        )
        for document in topics[:count]
    ]


def prompt(conversation: Conversation, turn: int, answers: Sequence[str]) -> str:
    """Return everything said up to and including the user's part of `turn`."""
    said = []
    for earlier in range(turn):
        said += [conversation.passages[earlier], answers[earlier]]
    return "".join([*said, conversation.passages[turn]])
