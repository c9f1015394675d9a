"""Python programs in processes of their own, forked from one that has imported the libraries: that takes many seconds.

A test takes the fixture `driver`. `python processes.py CHANNEL CHANNEL` is the process that forks; the numbers are of
two sockets on which it is told what to start: with the libraries alone, and with corelora as well.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

CORELORA = ("-m", "corelora")
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
LIBRARIES = (
    "torch.distributed.run",
    "transformers.trainer",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "peft",
    "accelerate.commands.launch",
    "datasets",
    "diffusers",
)
OURS = ("corelora.cli", "corelora.train.run", "corelora.evaluate.run", "corelora.export")


class Driver:
    """Starts what follows `python` on a command line: a script or -m and a module, then its arguments.

    Args:
        folder: for the output of programs that are called.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.called = folder, 0
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
        numbers = [s.fileno() for s in theirs]
        command = [sys.executable, __file__, *map(str, numbers)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=numbers, env=environment)
        self.plain, self.whole = (s.makefile("rw") for s in ours)
        self.channels: dict[int, Any] = {}  # of each process that was started
        for one in (*ours, *theirs):
            one.close()

    def start(
        self,
        *words: object,
        log: Path,
        errors: Path | None = None,
        plain: bool = False,
        environment: dict[str, str] | None = None,
    ) -> int:
        """Begin a program without waiting for it.

        Args:
            *words: what follows `python`.
            log: gets what it prints, after what is there.
            errors: gets its standard error instead.
            plain: it does not find corelora imported.
            environment: changes of this process's environment.

        Returns:
            The id of its process.
        """
        told = {
            "words": [str(w) for w in words],
            "log": str(log),
            "errors": str(errors or log),
            "folder": os.getcwd(),
            "environment": {**os.environ, "CUDA_VISIBLE_DEVICES": "", **(environment or {})},
        }
        channel = self.plain if plain else self.whole
        log.touch()  # so that it can be looked at from now on
        pid = _ask(channel, told)
        self.channels[pid] = channel
        return pid

    def wait(self, pid: int, seconds: float = 400.0) -> int:
        """Its exit code, negative for a signal; one that takes longer is ended."""
        end = time.monotonic() + seconds
        while (code := _ask(self.channels[pid], {"ended": pid})) is None:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"process {pid} took more than {seconds} s")
            time.sleep(0.01)
        return code

    def run(self, *words: object, log: Path, **options: Any) -> int:
        """Exit code of a program that is let go to its end; the options are those of `start`."""
        return self.wait(self.start(*words, log=log, **options))

    def call(self, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Exit code and output of a program, as `subprocess.run` gives them; the options are those of `start`."""
        self.called += 1
        out, err = (self.folder / f"{self.called}.{name}" for name in ("out", "err"))
        code = self.run(*words, log=out, errors=err, **options)
        return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())

    def end(self) -> None:
        """The process that forks ends when nobody can tell it more, and what it started with it."""
        self.plain.close()
        self.whole.close()
        self.process.wait(timeout=60)


def wait_for(happened: Callable[[], bool], seconds: float = 60.0) -> None:
    """Look every half millisecond."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(5e-4)


def _ask(channel: Any, told: dict[str, Any]) -> int | None:
    channel.write(json.dumps(told) + "\n")
    channel.flush()
    return json.loads(channel.readline())


# -- the process that forks -----------------------------------------------------------------------------------------


def main() -> None:
    """Import the libraries, then be two: one process knows no more than these."""
    plain, whole = (socket.socket(fileno=int(n)) for n in sys.argv[1:])
    del sys.path[0]  # the tests' folder has names that libraries have, too
    _import(LIBRARIES)
    sys.modules["torch"].set_num_threads(1)
    sys.modules["torch.distributed.launcher.api"].elastic_launch = ForkedRanks
    sys.modules["torch.distributed.run"].elastic_launch = ForkedRanks
    if os.fork() == 0:
        plain.close()
        serve(whole, OURS)
    else:
        whole.close()
        serve(plain, ())
        os.wait()


def serve(channel: socket.socket, modules: Sequence[str]) -> None:
    """Fork what is asked for, and say what has ended, until nobody can ask.

    Args:
        channel: one JSON object a line.
        modules: imported once the first program is to be started.
    """
    living: set[int] = set()
    file = channel.makefile("rw")
    for line in file:
        told = json.loads(line)
        if "ended" in told:
            pid, status = os.waitpid(told["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            living.discard(pid)
        else:
            _import(modules)
            answer = os.fork()
            if answer == 0:
                os.close(channel.fileno())
                become(told)
            living.add(answer)
        file.write(json.dumps(answer) + "\n")
        file.flush()
    for pid in living:
        os.kill(pid, signal.SIGKILL)


def _import(modules: Sequence[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    assert threading.active_count() == 1  # a fork has no more than one
    gc.freeze()  # what all have is not gone through by each


def become(told: dict[str, Any]) -> NoReturn:
    """Be the process of a program from here on."""
    descriptors = [os.open(told[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("log", "errors")]
    for target, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ.update(told["environment"])
    run_and_exit(told["words"])


def run_and_exit(words: Sequence[str]) -> NoReturn:
    """Run a script or a module as python does, and end with its exit code."""
    # After a fork torch makes its thread pool anew when it is next set: two threads that do so at once can find none.
    sys.modules["torch"].set_num_threads(1)
    code: Any = 1
    try:
        run_words(words)
        code = 0
    except SystemExit as error:
        code = error.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_words(words: Sequence[str]) -> None:
    """Run a script or a module as python does."""
    is_module = words[0] == "-m"
    asked = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    first = [os.getcwd() if is_module else os.path.dirname(os.path.abspath(words[0]))]
    sys.path[:0] = first + [p for p in asked if p and p not in sys.path]
    sys.argv = list(words[is_module:])
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


class ForkedRanks:
    """In the place of torchrun's agent, which would start new processes: the ranks are forked, and end together."""

    def __init__(self, config: Any, entrypoint: str) -> None:
        self.world = config.nproc_per_node

    def __call__(self, *words: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [self._fork(rank, port, [w for w in words if w != "-u"]) for rank in range(self.world)]
        while ranks:
            pid, status = os.wait()
            ranks.remove(pid)
            if status:
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
                sys.exit(f"a rank ended with {os.waitstatus_to_exitcode(status)}")

    def _fork(self, rank: int, port: int, words: list[str]) -> int:
        if pid := os.fork():
            return pid
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world, "LOCAL_WORLD_SIZE": self.world}
        os.environ.update({k: str(v) for k, v in {**numbers, "MASTER_PORT": port}.items()}, MASTER_ADDR="127.0.0.1")
        run_and_exit(words)


if __name__ == "__main__":
    main()
