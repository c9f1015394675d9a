"""Hostile programs: each is a failed sample within its time, and nobody else's verdict changes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from corelora.errors import CoreLoraError
from corelora.evaluate import sandbox
from corelora.evaluate.sandbox import Limits, Program, find_sandbox, require_sandbox, run_programs

GOOD = Program("def f(x):\n    return x + 1", "assert f(1) == 2\nassert f(-1) == 0")
TESTS = "assert f(1) == 2\nassert f(41) == 42"
LIMITS = Limits(seconds=4, memory_mb=512, processes=12)

HOSTILE = {
    "endless loop": "while True:\n    pass",
    "endless loop in the function": "def f(x):\n    while True:\n        pass",
    "fork bomb": "import os\nfor _ in range(400):\n    if os.fork() == 0:\n        import time\n        time.sleep(60)",
    "threads without end": "import threading, time\n"
    "while True:\n    threading.Thread(target=time.sleep, args=(60,)).start()",
    "20 GB": "x = bytearray(20 << 30)\ndef f(x):\n    return x + 1",
    "writing outside": "open('/usr/owned', 'w').write('x')\ndef f(x):\n    return x + 1",
    "opening a socket": "import socket\ns = socket.create_connection(('1.1.1.1', 53), 2)\ndef f(x):\n    return x + 1",
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "os._exit(0)": "import os\nos._exit(0)",
    "os._exit(0) in the function": "import os\ndef f(x):\n    os._exit(0)",
    "catching the signal": "import signal\n"
    "for s in range(1, 32):\n    try:\n        signal.signal(s, lambda *a: None)\n    except OSError:\n        pass\n"
    "while True:\n    pass",
    "killing its parent": "import os, signal\nos.kill(os.getppid() or -1, signal.SIGKILL)\nos.kill(-1, 9)\nos._exit(0)",
    "objects that equal everything": "class E:\n    def __eq__(s, o):\n        return True\n"
    "    __hash__ = None\ndef f(x):\n    return E()",
    "integers that equal everything": "class E(int):\n    def __eq__(s, o):\n        return True\n"
    "    __hash__ = None\ndef f(x):\n    return E(7)",
    "other builtins": "import builtins\n"
    "for n in ('all', 'any', 'isinstance', 'print', 'len', 'abs'):\n    setattr(builtins, n, lambda *a, **k: True)\n"
    "AssertionError = BaseException\nbuiltins.AssertionError = type('E', (BaseException,), {})\n"
    "def f(x):\n    return 0",
    "overriding the tests' helpers": "def check(*a):\n    return True\ndef assertEqual(*a):\n    return True\n"
    "def f(x):\n    return 0",
    "answering the judge itself": "import os, json\nfor fd in range(3, 64):\n    try:\n"
    '        os.write(fd, b\'{"passed": true, "why": ""}\\n\' * 100)\n    except OSError:\n        pass\nos._exit(0)',
    "nonsense to the judge": "import os\nfor fd in range(3, 64):\n    try:\n"
    "        os.write(fd, b'[' * 100000 + b'\\n')\n    except OSError:\n        pass",
    "no newline to the judge": "import os\nfor fd in range(3, 64):\n    try:\n        while True:\n"
    "            os.write(fd, b'x' * 65536)\n    except OSError:\n        pass",
    "an endless answer": "import itertools\ndef f(x):\n    return [1] * (1 << 25)",
    "a name that is not there": "def g(x):\n    return x + 1",
    "not Python": "def f(x) return x + 1",
    "nothing": "",
}
PRINTING = "import sys\nfor _ in range(1000):\n    sys.stdout.write('x' * (1 << 20))\ndef f(x):\n    return 0"


@pytest.fixture(scope="module", autouse=True)
def _needs_a_sandbox():
    if find_sandbox() is None:
        pytest.skip("this machine allows neither bubblewrap nor user namespaces")


@pytest.fixture(params=["namespaces", "bubblewrap"])
def kind(request):
    """Each kind of sandbox that works here."""
    if not sandbox._works(request.param):
        pytest.skip(f"{request.param} does not work on this machine")
    return request.param


@pytest.mark.slow
def test_hostile_programs_fail_alone(kind, tmp_path):
    """All of them between good ones; a file of the run's and the good verdicts stay as they are."""
    results = tmp_path / "results.json"
    results.write_text("{}")
    deleting = f"import os, shutil\nos.remove({str(results)!r})\ndef f(x):\n    return x + 1"
    codes = {**HOSTILE, "deleting the results": deleting, "printing a gigabyte": PRINTING}
    programs = [p for code in codes.values() for p in (Program(code, TESTS), GOOD)]
    outcomes = run_programs(programs, LIMITS, kind=kind, workers=2)
    passed = [name for name, outcome in zip(codes, outcomes[::2], strict=True) if outcome.passed]
    assert not passed, f"{passed} passed"
    assert all(o.passed for o in outcomes[1::2]), [o for o in outcomes[1::2] if not o.passed]
    late = {n: o for n, o in zip(codes, outcomes[::2], strict=True) if o.seconds > LIMITS.seconds + 4}
    assert not late
    assert all(o.why for o in outcomes[::2])
    assert results.read_text() == "{}"
    assert not Path("/usr/owned").exists()


def test_nothing_survives(kind):
    """A daemon that a program leaves behind ends with its sandbox."""
    mark = f"corelora-{os.getpid()}-{time.monotonic_ns()}"
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        f"        os.execv('/bin/sh', ['/bin/sh', '-c', 'sleep 30; : {mark}'])\n    os._exit(0)\n"
        "time.sleep(0.2)\ndef f(x):\n    return x + 1"
    )
    assert run_programs([Program(code, TESTS)], LIMITS, kind=kind)[0].passed
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _running(mark):
        time.sleep(0.05)
    assert not _running(mark)


def _running(mark: str) -> bool:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.append(mark in (folder / "cmdline").read_text())
        except OSError:
            continue
    return any(found)


def test_what_a_program_sees(kind, tmp_path, monkeypatch):
    """No secrets of the environment, no file of the user's, no other process, nobody's privileges, no way out."""
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    (tmp_path / "secret").write_text("x")
    code = f"""
import os, socket

def looks():
    found = []
    if "SECRET_TOKEN" in os.environ:
        found.append("environment")
    if any(os.path.exists(path) for path in ({str(tmp_path)!r}, {str(Path.home() / ".ssh")!r}, "/etc/passwd")):
        found.append("files")
    if os.path.exists("/proc/1/environ") and len([p for p in os.listdir("/proc") if p.isdigit()]) > 3:
        found.append("processes")
    if os.geteuid() == 0:
        found.append("root")
    status = open("/proc/self/status").read() if os.path.exists("/proc/self/status") else "CapEff:\\t0\\n"
    if int(status.split("CapEff:")[1].split()[0], 16):
        found.append("capabilities")
    if [n for _, n in socket.if_nameindex() if n != "lo"]:
        found.append("network")
    for folder in ("/", "/usr", {os.path.dirname(os.__file__)!r}):
        try:
            open(folder + "/x", "w").close()
            found.append("writes " + folder)
        except OSError:
            pass
    open("/tmp/mine", "w").write("x")
    return found
"""
    outcome = run_programs([Program(code, "found = looks()\nassert found == [], found")], LIMITS, kind=kind)[0]
    assert outcome.passed, outcome.why


def test_an_environment_below_tmp(kind, tmp_path, monkeypatch):
    """Python's folders may lie below /tmp: they are shown on top of the sandbox's own, read-only."""
    file = tmp_path / "x"
    file.write_text("1")
    tmp_path.chmod(0o755)  # as an environment is; the program is another user
    visible = [*sandbox._visible(), str(tmp_path)]
    monkeypatch.setattr(sandbox, "_visible", lambda: visible)
    code = f"def read():\n    return open({str(file)!r}).read()\ndef write():\n    open({str(file)!r}, 'w')"
    tests = "assert read() == '1'\ntry:\n    write()\n    assert False\nexcept OSError:\n    pass"
    outcome = run_programs([Program(code, tests)], LIMITS, kind=kind)[0]
    assert outcome.passed, outcome.why


def test_disk_is_limited(kind):
    code = "def f(x):\n    with open('/tmp/x', 'wb') as h:\n        for _ in range(200):\n            h.write(bytes(x))"
    outcome = run_programs([Program(code, "f(1 << 20)")], LIMITS, kind=kind)[0]
    assert not outcome.passed


def test_values_cross_as_what_they_are():
    """Types, nesting, exact numbers, exceptions, objects of the program's own, iterators."""
    code = """
import collections, decimal, fractions
class Node:
    def __init__(self, v): self.v, self.next = v, None
P = collections.namedtuple("P", "a b")
LIMIT = 7
def same(x): return x
def kinds(): return [1, 2.5, "x", None, True, (1,), {2}, {3: [4]}, 1j, b"z", range(3), 10 ** 300, float("inf"), P(1, 2)]
def fails(x): raise ValueError("no " + x)
def counts(): yield from (1, 2, 3)
def total(node):
    n = 0
    while node: n, node = n + node.v, node.next
    return n
"""
    tests = """
assert kinds() == [1, 2.5, "x", None, True, (1,), {2}, {3: [4]}, 1j, b"z", range(3), 10 ** 300, float("inf"), (1, 2)]
assert [type(v) for v in kinds()][:6] == [int, float, str, type(None), bool, tuple]
for v in (0, -5, 1e-300, "\\n\\u2028é", [[], ()], {(1, 2): {3}}, same(int)):
    assert same(v) == v and type(same(v)) is type(v)
try:
    fails("way")
    assert False
except ValueError as error:
    assert "no way" in str(error)
assert list(counts()) == [1, 2, 3]
node = Node(1)
node.next = Node(5)
assert total(node) == 6 and node.next.v == 5 and LIMIT == 7
assert Node(1) != 1 and not (Node(1) == Node(1)) and node == node
"""
    outcome = run_programs([Program(code, tests)], LIMITS)[0]
    assert outcome.passed, outcome.why


def test_without_a_sandbox_nothing_runs(monkeypatch):
    """Where no kind works, the programs are refused; the user may insist."""
    monkeypatch.setattr(sandbox, "_works", lambda kind: False)
    with pytest.raises(CoreLoraError, match=r"(?s)no sandbox works here.*bubblewrap.*--unsafe-code"):
        require_sandbox()
    assert require_sandbox(unsafe=True) == sandbox.UNSAFE


def test_unsafe_still_is_another_process():
    """Without a sandbox, by the user's wish: limits hold, the evaluating process is not where it runs."""
    code = f"import os\ndef f(x):\n    assert os.getpid() != {os.getpid()}\n    return x + 1"
    outcomes = run_programs(
        [Program(code, TESTS), Program("import os\nos._exit(0)", TESTS)], LIMITS, kind=sandbox.UNSAFE
    )
    assert [o.passed for o in outcomes] == [True, False]
