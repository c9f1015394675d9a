"""The tested program's side, inside the sandbox: runs the code, then calls its functions as the judge asks.

Runs as `python -I -c WIRE+THIS FD PROCESSES`, reads the code from the socket FD. It may lie, die or hang:
then its answers are wrong or missing, and that is all.
"""

import operator
import resource
import socket
import sys
from types import SimpleNamespace
from typing import Any

from corelora.evaluate.sandbox_wire import Broken, Line, pack, unpack

OPERATIONS = {
    "call": lambda target, args, names: target(*args, **names),
    "get": lambda target, args, names: getattr(target, args[0]),
    "set": lambda target, args, names: setattr(target, args[0], args[1]),
    "next": lambda target, args, names: next(target),
    "iter": lambda target, args, names: iter(target),
    "item": lambda target, args, names: target[args[0]],
    "len": lambda target, args, names: len(target),
    "bool": lambda target, args, names: bool(target),
    "str": lambda target, args, names: str(target),
    "repr": lambda target, args, names: repr(target),
    "in": lambda target, args, names: args[0] in target,
    "same": lambda target, args, names: bool(operator.eq(target, args[0])),
    "less": lambda target, args, names: bool(operator.lt(target, args[0])),
}


def serve(line: Line) -> None:
    """Run the code that comes first, answer with the names it defines, then answer calls until the judge hangs up."""
    kept: dict[int, Any] = {}

    def refer(value: Any) -> Any:
        scalar = getattr(value, "item", None)
        if type(value).__module__ == "numpy" and scalar is not None and getattr(value, "ndim", 1) == 0:
            return pack(value.item(), refer)
        kept[len(kept)] = value
        return {"r": len(kept) - 1}

    space = {"__name__": "program", "__builtins__": __builtins__}
    state = SimpleNamespace(first=True)
    while True:
        message = line.receive()
        try:
            if state.first:
                state.first = False
                exec(compile(message["code"], "<program>", "exec"), space)
                answer = {name: pack(value, refer) for name, value in list(space.items()) if not name.startswith("__")}
            else:
                args = [unpack(a, kept.__getitem__) for a in message["args"]]
                names = {k: unpack(v, kept.__getitem__) for k, v in message["names"].items()}
                answer = pack(OPERATIONS[message["do"]](kept[message["target"]], args, names), refer)
            line.send({"value": answer})
        except Broken:
            raise
        except BaseException as error:
            line.send({"error": type(error).__name__, "text": str(error)[:500]})


if __name__ == "__main__":
    sys.setrecursionlimit(5000)
    if int(sys.argv[2]):  # in a user namespace of its own: counts this sandbox's processes only
        resource.setrlimit(resource.RLIMIT_NPROC, (int(sys.argv[2]), int(sys.argv[2])))
    try:
        serve(Line(socket.socket(fileno=int(sys.argv[1]))))
    except Broken:
        sys.exit(0)
