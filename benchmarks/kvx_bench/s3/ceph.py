"""A Ceph of one monitor, one OSD in memory and one RGW: its settings, its programs, its start.

It listens at a loopback address of its own, so that any number of them run beside each other with
the ports that Ceph has always had: no port has to be looked for, and none can be lost to another
program between finding it and using it.
"""

from __future__ import annotations

import http.client
import secrets
import shutil
import subprocess
import time
import uuid
from typing import TYPE_CHECKING

from kvx.errors import UnavailableError
from kvx_bench.s3.service import Keys, Service

if TYPE_CHECKING:
    from pathlib import Path

PACKAGES = ("radosgw", "ceph-mon", "ceph-osd", "ceph-common")
_PROGRAMS = ("radosgw", "ceph-mon", "ceph-osd", "ceph", "ceph-authtool", "monmaptool", "setpriv")
_PORT = 7480
_READY_S = 90.0
_ASK_S = 0.05
_LOG_TAIL_LINES = 5

# The monitor proposes at once instead of after a second: a start takes 1.5 to 6 s instead of 15.
_SETTINGS = """\
[global]
fsid = {fsid}
mon host = [v2:{host}:3300,v1:{host}:6789]
public addr = {host}
cluster addr = {host}
ms bind ipv6 = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon allow pool delete = true
auth allow insecure global id reclaim = false
mon data avail warn = 2
mon data avail crit = 1
paxos propose interval = 0.02
paxos min wait = 0.01
osd objectstore = memstore
memstore device bytes = {memory_bytes}
osd numa auto affinity = false
run dir = {folder}
log file = {folder}/$name.log
admin socket =
pid file =
mon data = {folder}/mon
osd data = {folder}/osd
keyring = {folder}/keyring
debug ms = 0
log max recent = 50

[client.rgw.a]
rgw frontends = beast endpoint={host}:{port}
rgw data = {folder}
rgw enable ops log = false
rgw enable usage log = false
rgw thread pool size = 64
rgw bucket default quota max objects = -1
rgw override bucket index max shards = 1
rgw enable lc threads = false
rgw run sync thread = false
rgw gc obj min wait = 5
rgw gc processor period = 5
rgw gc processor max time = 5
"""


def why_not() -> str:
    """Return why there can be none here; empty when there can."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if not missing:
        return ""
    return f"{', '.join(missing)} not installed; apt-get install {' '.join(PACKAGES)}"


class Ceph:
    """One that runs as children of this process, which die with it.

    REQUIRES: made and closed by a thread that lives longer than it: the kernel kills the children
    when the thread that started them ends.
    """

    def __init__(self, folder: Path, memory_bytes: int) -> None:
        """Start it in an empty folder, and wait until it answers.

        Raises:
            UnavailableError: It did not start; with what it said.
        """
        self._folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._host = ".".join(["127", *map(str, (secrets.randbelow(250) + 2 for _ in range(3)))])
        self._settings = folder / "ceph.conf"
        fsid = str(uuid.uuid4())
        self._settings.write_text(
            _SETTINGS.format(
                fsid=fsid, host=self._host, port=_PORT, folder=folder, memory_bytes=memory_bytes
            )
        )
        keys = Keys(secrets.token_hex(10), secrets.token_hex(20))
        try:
            self._start_monitor(fsid)
            self._start_osd()
            self._start("radosgw", "-n", "client.rgw.a")
            self._wait_until_it_answers()
            self._do(
                "radosgw-admin", "user", "create", "--uid=kvx", "--display-name=kvx",
                f"--access-key={keys.access_key}", f"--secret-key={keys.secret_key}",
            )  # fmt: skip
        except BaseException:
            self.close()
            raise
        self.service = Service(
            f"http://{self._host}:{_PORT}", keys=keys, software=f"Ceph RGW {_version()}"
        )

    def close(self) -> None:
        """Kill it: what it holds is for nobody."""
        for daemon in self._daemons.values():
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()

    def _start_monitor(self, fsid: str) -> None:
        (self._folder / "mon").mkdir()
        keyring, map_ = str(self._folder / "keyring"), str(self._folder / "monmap")
        everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
        self._run("ceph-authtool", "--create-keyring", keyring)
        for name, *caps in (
            ("mon.", "--cap", "mon", "allow *"),
            ("client.admin", *everything, "--cap", "mgr", "allow *"),
            ("client.rgw.a", "--cap", "mon", "allow rw", "--cap", "osd", "allow rwx"),
        ):
            self._run("ceph-authtool", keyring, "--gen-key", "-n", name, *caps)
        addresses = f"[v2:{self._host}:3300,v1:{self._host}:6789]"
        self._run("monmaptool", "--create", "--addv", "a", addresses, "--fsid", fsid, map_)
        self._do("ceph-mon", "--mkfs", "-i", "a", "--monmap", map_, "--keyring", keyring)
        self._start("ceph-mon", "-i", "a")

    def _start_osd(self) -> None:
        (self._folder / "osd").mkdir()
        name = str(uuid.uuid4())
        keyring = str(self._folder / "keyring")
        number = self._do("ceph", "osd", "new", name).strip()
        caps = ("--cap", "mon", "allow profile osd", "--cap", "osd", "allow *")
        self._run("ceph-authtool", keyring, "--gen-key", "-n", f"osd.{number}", *caps)
        self._do("ceph", "auth", "add", f"osd.{number}", "-i", keyring)
        self._do("ceph-osd", "-i", number, "--mkfs", "--osd-uuid", name)
        self._start("ceph-osd", "-i", number)

    def _start(self, program: str, *arguments: str) -> None:
        output = (self._folder / f"{program}.out").open("wb")
        with output:
            self._daemons[program] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", program, "-c", self._settings, *arguments, "-f"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _do(self, program: str, *arguments: str) -> str:
        return self._run(program, "-c", str(self._settings), *arguments)

    def _run(self, *command: str) -> str:
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=_READY_S,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(
                f"{command[0]} did not end within {_READY_S:g} s; {self._last_words()}"
            ) from error
        if done.returncode:
            raise UnavailableError(
                f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}"
            )
        return done.stdout

    def _wait_until_it_answers(self) -> None:
        end = time.monotonic() + _READY_S
        while not self._answers():
            ended = {
                program: daemon.returncode
                for program, daemon in self._daemons.items()
                if daemon.poll() is not None
            }
            if ended or time.monotonic() > end:
                what = " and ".join(
                    f"{program} ended with {code}" for program, code in ended.items()
                )
                what = what or f"RGW is silent after {_READY_S:g} s"
                raise UnavailableError(f"Ceph did not start: {what}; {self._last_words()}")
            time.sleep(_ASK_S)  # it tells nobody when it begins to listen

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(self._host, _PORT, timeout=5)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status < http.HTTPStatus.INTERNAL_SERVER_ERROR
        except (ConnectionError, TimeoutError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _last_words(self) -> str:
        said = {
            path.stem: path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
            for path in sorted(self._folder.glob("*.out"))
        }
        return f"its programs said: {said}"


def _version() -> str:
    done = subprocess.run(["radosgw", "--version"], check=True, capture_output=True, text=True)
    return done.stdout.split()[2]
