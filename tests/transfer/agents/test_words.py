"""What is built on agents talks through them: topics, seeking, and callbacks that end."""

from __future__ import annotations

import threading
import time

import pytest

import kvx
from tests.transfer.agents.pairs import KEY, open_pair


def test_words_reach_who_hears_their_topic_and_nobody_else() -> None:
    with open_pair() as pair:
        heard: list[tuple[str, bytes]] = []
        came = threading.Event()

        def take(peer: str, payload: bytes) -> None:
            heard.append((peer, payload))
            came.set()

        pair.other.hear("some.topic", take)
        pair.one.say("other", "another.topic", b"for nobody")
        pair.one.say("other", "some.topic", b"hello")
        assert came.wait(5)
        assert heard == [("one", b"hello")]
        pair.other.hear("some.topic", None)
        pair.one.say("other", "some.topic", b"again")
        time.sleep(0.05)
        assert len(heard) == 1
        with pytest.raises(kvx.PeerLost):
            pair.one.say("stranger", "some.topic", b"")


def test_who_is_sought_is_met_whenever_it_comes() -> None:
    with kvx.Agent("one", key=KEY, config={"redial_s": 0.02}) as one:
        one.seek("other")
        one.seek("tcp://127.0.0.1:9")
        with pytest.raises(kvx.UsageError):
            one.seek("tcp://nowhere")
        with kvx.Agent("other", key=KEY) as other:
            one.import_peer(other.export())
            end = time.monotonic() + 5
            while "other" not in one.peers and time.monotonic() < end:
                time.sleep(0.01)
            assert "other" in one.peers


def test_a_callback_ends() -> None:
    with kvx.Agent("one", key=KEY) as one, kvx.Agent("other", key=KEY) as other:
        first: list[object] = []
        second: list[object] = []
        end = one.on_event(first.append)
        one.on_event(second.append)
        end()
        end()
        one.connect(other.export())
        deadline = time.monotonic() + 5
        while not second and time.monotonic() < deadline:
            time.sleep(0.01)
        assert second
        assert not first
