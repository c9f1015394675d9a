"""The judge's side, in a sandbox of its own: runs the trusted tests; the program's functions are stand-ins.

The tests and the program never share an interpreter. A test calls a stand-in, the arguments go to the program's process
as data, and the result comes back as data, so a program can pass only by answering right: leaving early, patching
builtins, or looking for the verdict in memory reaches nothing.

Runs as `python -I -c WIRE+THIS FD`. Jobs come over the socket FD, each with the socket of its program attached; each is
judged in a forked process, and answered with one line.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from corelora.evaluate.sandbox_wire import Broken, Line, pack, unpack


class Program:
    """The other process: asks it to do one thing, waits for the answer."""

    def __init__(self, line: Line) -> None:
        self.line = line

    def ask(self, do: str, target: int, args: Sequence[Any] = (), names: Mapping[str, Any] | None = None) -> Any:
        """The result as plain data or stand-ins, or the exception that the program raised."""
        packed = {k: pack(v, self.refer) for k, v in (names or {}).items()}
        message = {"do": do, "target": target, "args": [pack(a, self.refer) for a in args], "names": packed}
        self.line.send(message)
        return self.result()

    def result(self) -> Any:
        """The answer to the last message."""
        answer = self.line.receive()
        if not isinstance(answer, dict):
            raise Broken("not an answer")
        if "error" in answer:
            kind = getattr(builtins, str(answer["error"]), RuntimeError)
            is_error = isinstance(kind, type) and issubclass(kind, Exception) and kind is not AssertionError
            raise (kind if is_error else RuntimeError)(f"{answer['error']}: {answer.get('text', '')}")
        return unpack(answer.get("value"), self.stand_in) if "value" in answer else None

    def start(self, code: str) -> dict[str, Any]:
        """Run the program's code; its module-level names as stand-ins or plain values."""
        self.line.send({"code": code})
        answer = self.line.receive()
        if not isinstance(answer, dict) or not isinstance(answer.get("value"), dict):
            error = answer if isinstance(answer, dict) else {}
            raise RuntimeError(f"{error.get('error', 'nonsense')}: {error.get('text', '')}")
        return {str(name): unpack(value, self.stand_in) for name, value in answer["value"].items()}

    def stand_in(self, target: Any) -> StandIn:
        """What stands for an object that stays with the program."""
        return StandIn(self, int(target))

    def refer(self, value: Any) -> Any:
        """Stand-ins go back as the object they stand for; nothing else of the judge's leaves it."""
        if isinstance(value, StandIn):
            return {"r": object.__getattribute__(value, "_target")}
        raise TypeError(f"a {type(value).__name__} can't be given to the program")


class StandIn:
    """A function, class or object of the program's. It never equals a value, and a stand-in if the program says so."""

    def __init__(self, program: Program, target: int) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_target", target)

    def _ask(self, do: str, *args: Any, **names: Any) -> Any:
        return object.__getattribute__(self, "_program").ask(do, object.__getattribute__(self, "_target"), args, names)

    def __call__(self, *args: Any, **names: Any) -> Any:
        return self._ask("call", *args, **names)

    def __getattr__(self, name: str) -> Any:
        return self._ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, value)

    def __iter__(self) -> Any:
        return self._ask("iter")

    def __next__(self) -> Any:
        return self._ask("next")

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)

    def __len__(self) -> int:
        return self._ask("len")

    def __bool__(self) -> bool:
        return self._ask("bool") is True

    def __str__(self) -> str:
        return str(self._ask("str"))

    def __repr__(self) -> str:
        return str(self._ask("repr"))

    def __contains__(self, value: Any) -> bool:
        return self._ask("in", value) is True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StandIn) and self._ask("same", other) is True

    def __lt__(self, other: object) -> bool:
        return isinstance(other, StandIn) and self._ask("less", other) is True

    __hash__ = object.__hash__


def judge(job: Mapping[str, Any], line: Line) -> None:
    """Run one job: {"code", "known", "entry", "tests"}; the exception of what failed.

    `known` is trusted code whose names the tests may use beside the program's (a task's own helpers); `tests` is run
    with the name in `entry`, and all others, standing for the program's.
    """
    program = Program(line)
    space: dict[str, Any] = {"__name__": "tests"}
    names = program.start(job["code"])
    space.update(names)
    exec(compile(job["known"], "<known>", "exec"), space)
    for name in job["entry"]:
        if name not in names:
            raise NameError(f"the program defines no {name}")
        space[name] = names[name]
    exec(compile(job["tests"], "<tests>", "exec"), space)


def verdict(job: Mapping[str, Any], line: Line) -> dict[str, Any]:
    """What came out, as data."""
    try:
        judge(job, line)
    except AssertionError as error:
        return {"passed": False, "why": f"a test failed: {str(error)[:200]}".rstrip(": ")}
    except Broken as error:
        return {"passed": False, "why": f"no answer: {error}"}
    except RecursionError:
        return {"passed": False, "why": "RecursionError"}
    except BaseException as error:
        return {"passed": False, "why": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"passed": True, "why": ""}


def main() -> None:
    """Fork a judge for each job."""
    control = socket.socket(fileno=int(sys.argv[1]))
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1 << 16, 2)
        if not data:
            return
        if os.fork() == 0:
            answer_job(*fds)
        for fd in fds:
            os.close(fd)
        bury_ended()


def answer_job(link: int, reply: int) -> None:
    """The forked judge: read the job, judge it, answer, end."""
    caller = socket.socket(fileno=reply)
    found = verdict(Line(caller).receive(), Line(socket.socket(fileno=link)))
    caller.sendall(json.dumps(found).encode() + b"\n")
    os._exit(0)


def bury_ended() -> None:
    """Take note of forked judges that have ended, so that they don't stay behind."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    sys.setrecursionlimit(5000)
    main()
