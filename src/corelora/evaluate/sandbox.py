"""Model-written programs, each in a sandbox of its own, judged by tests that run elsewhere.

For each program two processes take part, both in fresh user, mount, network, process and IPC namespaces: the program
(sandbox_program.py), and a judge that runs the trusted tests (sandbox_judge.py) and asks the program's functions for
results over a socket. What a sandbox sees is Python's own folders, read-only, and an empty /tmp. docs/code-sandbox.md
says what this holds against and what it does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from joblib import cpu_count
from tqdm.auto import tqdm

from corelora.errors import CoreLoraError
from corelora.evaluate.sandbox_wire import Broken, Line

UNSAFE = "none"
LINK = 10  # the number of a program's socket in its own process


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: wall time, from its start to the verdict; CPU time may be one second more.
        memory_mb: address space of a process in MiB, and half as much again for all of them together.
        processes: processes and threads at one time.
        disk_mb: its /tmp, and its largest file, in MiB.
    """

    seconds: float = 10.0
    memory_mb: int = 1024
    processes: int = 16
    disk_mb: int = 32


@dataclass(frozen=True)
class Program:
    """One program and its tests.

    Attributes:
        code: untrusted.
        tests: trusted; they find the program's module-level names.
        known: trusted code whose names the tests use instead of the program's (a task's own helpers).
        entry: names that the program must define, whatever `known` defines.
    """

    code: str
    tests: str
    known: str = ""
    entry: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The verdict on one program: whether all tests passed, why not, and the seconds that it took."""

    passed: bool
    why: str
    seconds: float


def find_sandbox() -> str | None:
    """The kind of sandbox that works here: "namespaces", "bubblewrap" or None; decided by really running a program.

    An ordinary user gets bubblewrap where it is installed. As root the kernel's own namespaces come first: only there
    does the program become another user, and a limit on processes does not bind root.
    """
    kinds = ("namespaces", "bubblewrap") if os.getuid() == 0 else ("bubblewrap", "namespaces")
    return next((kind for kind in kinds if _works(kind)), None)


def require_sandbox(unsafe: bool = False) -> str:
    """A kind of sandbox for `run_programs`.

    Args:
        unsafe: the user accepts to run the programs without one.

    Raises:
        CoreLoraError: no sandbox works here and `unsafe` is not set.
    """
    kind = find_sandbox()
    if kind is None and not unsafe:
        raise CoreLoraError(
            "no sandbox works here: neither bubblewrap nor the kernel's user namespaces, so model-written programs are "
            "not run. Install bubblewrap (apt install bubblewrap), or allow user namespaces (sysctl "
            "kernel.unprivileged_userns_clone=1; in Docker: --security-opt seccomp=unconfined), or accept the risk "
            "with --unsafe-code."
        )
    return kind or UNSAFE


def run_programs(
    programs: Sequence[Program],
    limits: Limits | None = None,
    *,
    kind: str | None = None,
    workers: int | None = None,
    desc: str = "running programs",
) -> list[Outcome]:
    """Run and judge programs, several at a time.

    Args:
        programs: what to run.
        limits: for each of them.
        kind: as `require_sandbox` answered; found if None.
        workers: programs at one time; if None as many as there are CPUs, of those that the container may use.
        desc: label of the progress bar.

    Returns:
        One outcome a program, in their order.

    Raises:
        CoreLoraError: no sandbox works here.
    """
    bench = _Bench(kind or require_sandbox(), limits or Limits())
    try:
        with ThreadPoolExecutor(workers or cpu_count()) as pool, tqdm(total=len(programs), desc=desc) as bar:

            def one(program: Program) -> Outcome:
                outcome = bench.judged(program)
                bar.update()
                return outcome

            return list(pool.map(one, programs))
    finally:
        bench.close()


@cache
def _works(kind: str) -> bool:
    if kind == "bubblewrap" and shutil.which("bwrap") is None:
        return False
    bench = _Bench(kind, Limits(seconds=20))
    try:
        return bench.judged(Program("def f(x):\n    return x + 1", "assert f(1) == 2")).passed
    except OSError:
        return False
    finally:
        bench.close()


class _Bench:
    """Starts sandboxes of one kind; keeps one judge, and one launcher of programs, for each thread."""

    def __init__(self, kind: str, limits: Limits) -> None:
        self.kind, self.limits = kind, limits
        self.root = tempfile.mkdtemp(prefix="corelora-sandbox-")  # where a sandbox mounts its own root; stays empty
        self.local = threading.local()
        self.servers: list[_Judge | _Launcher] = []

    def close(self) -> None:
        """End all judges and launchers."""
        for server in self.servers:
            server.stop()
        shutil.rmtree(self.root, ignore_errors=True)

    def judged(self, program: Program) -> Outcome:
        """Run one program."""
        began = time.monotonic()
        judge = self._judge()
        ours, theirs = socket.socketpair()
        with theirs:
            python = _python("sandbox_program", LINK, self.limits.processes if self.kind == "bubblewrap" else 0)
            runner = self._launcher().launch(self.config(python, LINK, self.limits), theirs)
        try:
            answer = judge.ask(program, ours, self.limits.seconds)
        finally:
            ours.close()
        why = "" if answer is None else str(answer.get("why", ""))
        if answer is None:
            judge.stop()
            self.local.judge = None
            why = f"no verdict within {self.limits.seconds:g} s"
        elif why.startswith("no answer"):
            why = runner.ending() or why
        runner.end()
        passed = answer is not None and answer.get("passed") is True
        return Outcome(passed, why, round(time.monotonic() - began, 3))

    def _judge(self) -> _Judge:
        judge = getattr(self.local, "judge", None)
        if judge is None or not judge.is_alive():
            ours, theirs = socket.socketpair()
            long = Limits(seconds=1e6, memory_mb=self.limits.memory_mb, processes=64)
            with theirs:
                config = self.config(_python("sandbox_judge", theirs.fileno()), theirs.fileno(), long)
                judge = self.local.judge = _Judge(_launching(json.dumps(config), theirs.fileno()), ours)
            self.servers.append(judge)
        return judge

    def _launcher(self) -> _Launcher:
        launcher = getattr(self.local, "launcher", None)
        if launcher is None or not launcher.is_alive():
            launcher = self.local.launcher = _Launcher()
            self.servers.append(launcher)
        return launcher

    def config(self, python: list[str], link: int, limits: Limits) -> dict[str, Any]:
        """What sandbox_launch.py reads: a command in a new sandbox, and the number of the one socket that it gets."""
        return {
            "kind": self.kind,
            "root": self.root,
            "visible": _visible(),
            "as_root": os.getuid() == 0,
            "uid": random.SystemRandom().randrange(1 << 20, 1 << 29),  # a user that exists nowhere else
            "seconds": limits.seconds,
            "memory_mb": limits.memory_mb,
            "processes": limits.processes,
            "disk_mb": limits.disk_mb,
            "handed_on": [link],
            "command": _bubblewrap(python, limits) if self.kind == "bubblewrap" else python,
            "environment": {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"},
        }


def _python(script: str, *words: int) -> list[str]:
    """The command of a script of this folder, in an interpreter that sees nothing else of ours."""
    return [sys.executable, "-I", "-c", _alone(script), *map(str, words)]


def _launching(word: str, fd: int) -> subprocess.Popen:
    """sandbox_launch.py, which keeps a file descriptor of this process."""
    command = [sys.executable, "-I", "-S", "-c", _source("sandbox_launch"), word]
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, pass_fds=(fd,), stdin=nothing, stdout=nothing, stderr=nothing)


class _Launcher:
    """The process that is forked for each program."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = _launching(str(theirs.fileno()), theirs.fileno())

    def is_alive(self) -> bool:
        """Whether it still takes programs."""
        return self.process.poll() is None

    def launch(self, config: dict[str, Any], link: socket.socket) -> _Runner:
        """Start a program that gets one end of a socket."""
        said, told = os.pipe()
        try:
            socket.send_fds(self.control, [json.dumps(config).encode()], [link.fileno(), told])
        finally:
            os.close(told)
        return _Runner(int(self.control.recv(32) or b"0"), said)

    def stop(self) -> None:
        """End it; programs that run end by themselves, as they were all waited for."""
        self.control.close()
        _end(self.process)


class _Runner:
    """One program's watcher, outside of its sandbox: a copy of the launcher, which ends all below it with itself."""

    def __init__(self, pid: int, said: int) -> None:
        self.pid, self.said = pid, said
        if not pid:
            os.close(said)
            raise OSError("the launcher of sandboxes has ended")

    def ending(self) -> str:
        """How the watcher saw the program end, in words; empty where it is still running."""
        if not select.select([self.said], [], [], 2)[0]:
            return ""
        said = os.read(self.said, 1 << 12).decode(errors="replace").strip()
        if said.startswith("setup "):
            self.end()
            raise OSError(f"the sandbox could not be set up: {said[6:]}")
        if said.startswith("exit "):
            return f"the program ended before the tests did (exit code {said[5:]})"
        return f"stopped: too much {said}" if said in ("time", "memory") else f"stopped: too many {said}"

    def end(self) -> None:
        """Kill it, if it still runs, and wait for it: its end of the pipe closes with it."""
        with contextlib.suppress(ProcessLookupError):  # its id is its own until the launcher gets its next program
            os.kill(self.pid, signal.SIGKILL)
        while os.read(self.said, 1 << 12):
            pass
        os.close(self.said)


class _Judge:
    """The process that runs trusted tests, fed with jobs."""

    def __init__(self, process: subprocess.Popen, control: socket.socket) -> None:
        self.process, self.control = process, control

    def is_alive(self) -> bool:
        """Whether it still takes jobs."""
        return self.process.poll() is None

    def ask(self, program: Program, link: socket.socket, seconds: float) -> dict[str, Any] | None:
        """The verdict on one program; None where none came in time."""
        ours, theirs = socket.socketpair()
        job = {"code": program.code, "tests": program.tests, "known": program.known, "entry": list(program.entry)}
        with ours:
            try:
                socket.send_fds(self.control, [b"job"], [link.fileno(), theirs.fileno()])
                theirs.close()
                link.close()  # the judge has it; the program's end must show there
                ours.settimeout(seconds + 1)  # the watcher of the program is the first to act
                line = Line(ours)
                line.send(job)
                answer = line.receive()
            except (OSError, Broken):
                return None
        return answer if isinstance(answer, dict) else None

    def stop(self) -> None:
        """End it and everything below it."""
        self.control.close()
        _end(self.process)


def _end(process: subprocess.Popen) -> None:
    """Kill a process, if it still runs, and wait for it."""
    process.kill()
    process.wait()


@cache
def _source(name: str) -> str:
    return (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")


@cache
def _alone(name: str) -> str:
    """A script with the wire's text in front, so that a fresh interpreter needs no file of ours."""
    head, imported, tail = _source(name).partition("from corelora.evaluate.sandbox_wire import ")
    return head + _source("sandbox_wire") + tail.partition("\n")[2] if imported else head


@cache
def _visible() -> list[str]:
    """Folders that Python needs to run, outermost only; links as they are."""
    system = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache"]
    python = [sys.base_prefix, sys.base_exec_prefix, sys.prefix, os.path.dirname(os.path.realpath(sys.executable))]
    found: list[str] = []
    for path in [*system, *(os.path.realpath(p) for p in python)]:
        inside = any(path == f or path.startswith(f + "/") for f in found)
        if os.path.exists(path) and not inside:
            found.append(path)
    return found


def _bubblewrap(command: list[str], limits: Limits) -> list[str]:
    """The command inside bwrap, with the same view of the file system."""
    words = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    words += ["--cap-drop", "ALL", "--uid", "1000", "--gid", "1000"]
    # /tmp first: an environment may lie below it.
    words += ["--size", str(limits.disk_mb << 20), "--tmpfs", "/tmp", "--proc", "/proc", "--dev", "/dev"]
    for path in _visible():
        words += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    words += ["--remount-ro", "/"]
    return [*words, "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8", "--chdir", "/tmp", *command]
