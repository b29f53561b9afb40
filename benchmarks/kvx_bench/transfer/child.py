"""A second process that does what it is asked, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kvx.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PATIENCE_S = 60.0
_GOODBYE_S = 5.0


def _folder_of(package: str) -> str:
    """Return the folder that a package of ours is imported from."""
    spec = find_spec(package)
    assert spec is not None, f"{package} is running"
    assert spec.origin is not None, f"{package} is a folder with an __init__.py"
    return str(Path(spec.origin).parent.parent)


class Child:
    """A program that was started afresh, not forked: no thread or lock of ours is in it.

    It finds a socket at the descriptor whose number is its last argument, reads requests from it
    and answers each with one line. It has to end when the socket does.
    """

    def __init__(self, command: Sequence[str]) -> None:
        """Start it; `command` is everything but the last argument."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        ours.settimeout(_PATIENCE_S)
        self.socket = ours
        self._lines = ours.makefile("rb")

    @classmethod
    def of_module(
        cls, module: str, *, python: Path | None = None, settings: Mapping[str, str] | None = None
    ) -> Child:
        """Start a module of ours with this Python's path, under this Python or another one.

        What another one has installed is found behind what this one has. `settings` are further
        variables of its environment.
        """
        # An editable installation is found by a hook of this Python, which another one has not.
        ours = [_folder_of(package) for package in (module.partition(".")[0], "kvx")]
        path = [*ours, *sys.path]
        program = f"import sys; sys.path[:] = list(dict.fromkeys([*{path!r}, *sys.path])); "
        program += f"import runpy; runpy.run_module({module!r}, run_name='__main__', "
        program += "alter_sys=False)"
        command = [str(python or sys.executable), "-c", program]
        if settings:
            # env(1) sets them for that process alone.
            command[:0] = ["env", *(f"{name}={text}" for name, text in settings.items())]
        return cls(command)

    @classmethod
    def of_folders(
        cls, module: str, beside: str, python: Path, settings: Mapping[str, str]
    ) -> Child:
        """Start a module of ours under another Python that has all it needs but our packages.

        Args:
            module: To run.
            beside: A package of ours that it imports besides.
            python: The other one; what is installed with this one is not found.
            settings: Further variables of its environment.
        """
        folders = [_folder_of(package) for package in (module.partition(".")[0], beside, "kvx")]
        path = ":".join(dict.fromkeys(folders))
        variables = {"PYTHONPATH": path, **settings}
        given = [f"{name}={text}" for name, text in variables.items()]
        return cls(["env", *given, str(python), "-m", module])

    def __enter__(self) -> Self:
        """Nothing but the child."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End it."""
        self.close()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def ask(self, **request: object) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            UnavailableError: It ended, said nothing in time, or answered with an error.
        """
        self._send(request)
        return self._answer(request)

    def ask_for_fd(self, **request: object) -> tuple[int, dict[str, Any]]:
        """Send a request that is answered with a descriptor, then with a line."""
        self._send(request)
        # One byte alone: a reader of lines would have read on, and lost what came with it.
        _, (fd,), _, _ = socket.recv_fds(self.socket, 1, 1)
        return fd, self._answer(request)

    def close(self) -> None:
        """Hang up, and stop it if that does not end it."""
        self._lines.close()
        self.socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GOODBYE_S)
            return
        self._process.kill()
        self._process.wait()

    def _send(self, request: dict[str, object]) -> None:
        try:
            self.socket.sendall(json.dumps(request).encode() + b"\n")
        except ConnectionError as error:
            raise self._ended(request) from error

    def _answer(self, request: dict[str, object]) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except ConnectionError as error:
            raise self._ended(request) from error
        except TimeoutError as error:
            raise UnavailableError(
                f"the second process did not {request.get('do')} within {_PATIENCE_S:g} s"
            ) from error
        if not line:
            raise self._ended(request)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UnavailableError(str(answer["error"]))
        return answer

    def _ended(self, request: dict[str, object]) -> UnavailableError:
        try:
            code = str(self._process.wait(_GOODBYE_S))
        except subprocess.TimeoutExpired:
            code = "no exit code yet"
        return UnavailableError(
            f"the second process ended with {code} when it was asked to {request.get('do')}; "
            "what it wrote above says why"
        )
