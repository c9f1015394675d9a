"""How values cross between a tested program and its judge: one JSON text a line, made of plain values only.

Stands alone (its text is handed to fresh interpreters). What arrives is data and never code: a value of any other kind
stays where it is and travels as a reference. Subclasses of plain types arrive as the plain type, so a program can't win
a comparison with an `__eq__` of its own.
"""

import builtins
import json
import socket
from collections.abc import Callable
from typing import Any

LONGEST = 1 << 26  # bytes of one message


class Broken(Exception):
    """The other side is gone, or does not speak this language."""


def pack(value: Any, refer: Callable[[Any], Any]) -> Any:
    """A value as JSON; `refer` turns what is not plain into a reference."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return {"i": hex(int(value))}
    if isinstance(value, float):
        return {"f": repr(float(value))}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {"c": [repr(float(value.real)), repr(float(value.imag))]}
    if isinstance(value, (bytes, bytearray)):
        return {"b" if isinstance(value, bytes) else "a": bytes(value).decode("latin-1")}
    for tag, kinds in (("l", (list,)), ("t", (tuple,)), ("s", (set, frozenset))):
        if isinstance(value, kinds):
            return {tag: [pack(v, refer) for v in tuple(value)]}
    if isinstance(value, dict):
        return {"d": [[pack(k, refer), pack(v, refer)] for k, v in dict(value).items()]}
    if isinstance(value, range):
        return {"g": [value.start, value.stop, value.step]}
    if isinstance(value, type) and value in vars(builtins).values():
        return {"y": value.__name__}  # int, list, ...: the same thing on both sides
    return refer(value)


def unpack(data: Any, look_up: Callable[[Any], Any]) -> Any:
    """The value back; `look_up` answers references. Anything unknown is Broken."""
    if data is None or isinstance(data, (bool, str)):
        return data
    if not isinstance(data, dict) or len(data) != 1:
        raise Broken("not a value")
    ((tag, body),) = data.items()
    plain: dict[str, Callable[[Any], Any]] = {
        "i": lambda b: int(b, 16),
        "f": float,
        "c": lambda b: complex(float(b[0]), float(b[1])),
        "b": lambda b: b.encode("latin-1"),
        "a": lambda b: bytearray(b.encode("latin-1")),
        "g": lambda b: range(*b),
        "y": built_in_type,
    }
    if tag in plain:
        return plain[tag](body)
    if tag in ("l", "t", "s"):
        items = [unpack(v, look_up) for v in body]
        return items if tag == "l" else tuple(items) if tag == "t" else set(items)
    if tag == "d":
        return {unpack(k, look_up): unpack(v, look_up) for k, v in body}
    if tag == "r":
        return look_up(body)
    raise Broken(f"unknown tag {tag!r}")


def built_in_type(name: Any) -> type:
    """int, list, ... by name."""
    kind = getattr(builtins, str(name), None)
    if not isinstance(kind, type):
        raise Broken(f"no type {name!r}")
    return kind


class Line:
    """One end of a socket: messages out, messages in."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""

    def send(self, message: Any) -> None:
        """One message; Broken where nobody listens any more."""
        try:
            self.sock.sendall(json.dumps(message).encode() + b"\n")
        except (OSError, ValueError, RecursionError) as error:
            raise Broken(str(error)) from None

    def receive(self) -> Any:
        """The next message; Broken at the end or at nonsense."""
        while b"\n" not in self.buffer:
            try:
                more = self.sock.recv(1 << 16)
            except OSError as error:
                raise Broken(str(error)) from None
            if not more or len(self.buffer) > LONGEST:
                raise Broken("the program ended" if not more else "the message is too long")
            self.buffer += more
        line, _, self.buffer = self.buffer.partition(b"\n")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise Broken("not JSON") from None
