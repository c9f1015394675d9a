"""Puts a program into its own user, mount, network, process and IPC namespaces; run as `python -I -S -c SOURCE`.

What follows is one program's configuration, as JSON; or the number of a socket, over which the configurations of many
come, each with the program's own socket and a pipe for how it ended: for each a copy of this process is forked, and its
id is the answer. A copy costs a millisecond, a Python of its own forty.

With the kind "bubblewrap" the program is bwrap, which opens the namespaces; with "none" there are no namespaces at all.

Stands alone: it imports nothing of corelora, because its text is handed to a fresh interpreter. Two processes come out
of it. The outer one stays outside, watches time, memory and the number of processes, and kills. The inner one is
process 1 of its namespace, so that everything it starts ends with it, and becomes the program after it has given up
every privilege. Linux's own calls are reached through ctypes; os.unshare exists from Python 3.12 on only.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys
import time
from typing import Any, NoReturn

CLONE = {"mount": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
LIBC = ctypes.CDLL(None, use_errno=True)
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def call(name: str, *args: Any) -> None:
    """A C function that answers 0, or an OSError with its name."""
    if getattr(LIBC, name)(*args) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}{args}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2)."""
    call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())


def write(path: str, text: str) -> None:
    """Write a small file of /proc."""
    with open(path, "w") as f:
        f.write(text)


def unshare(*names: str) -> None:
    """Leave the namespaces of these kinds for new ones."""
    call("unshare", sum(CLONE[n] for n in names))


def map_user(inside: int, uid: int, gid: int) -> None:
    """This process, `uid` outside, is `inside` in its new user namespace."""
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{inside} {uid} 1")
    write("/proc/self/gid_map", f"{inside} {gid} 1")


def bind(path: str, root: str, flags: int) -> None:
    """Show a file or folder of the outside under `root`, at the same place; a link stays a link."""
    target = root + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    kept = os.statvfs(path).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)  # locked where the mount is somebody else's
    mount(path, target, "", MS_BIND | MS_REC)
    mount("", target, "", MS_BIND | MS_REMOUNT | flags | kept)


def build_root(config: dict[str, Any]) -> None:
    """A file system of its own: the Python runtime, read-only, and an empty /tmp that is limited in size."""
    root = config["root"]
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    # Before what is shown from outside: an environment may lie below /tmp itself.
    os.makedirs(root + "/tmp")
    mount("tmpfs", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={config['disk_mb']}m,mode=1777")
    for path in config["visible"]:
        bind(path, root, MS_RDONLY | MS_NOSUID | MS_NODEV)
    for path in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"):
        bind(path, root, MS_NOSUID)
    os.makedirs(root + "/proc")
    mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.makedirs(root + "/old")
    if LIBC.syscall(SYS_PIVOT_ROOT[os.uname().machine], root.encode(), (root + "/old").encode()) != 0:
        raise OSError(ctypes.get_errno(), "pivot_root")
    os.chdir("/tmp")


def close_old_root() -> None:
    """The outside is gone for good, and / can't be written."""
    call("umount2", b"/old", MNT_DETACH)
    mount("", "/", "", MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)


def give_up_privileges(config: dict[str, Any]) -> None:
    """Become an ordinary user without capabilities. As root a process limit would not hold."""
    if config["as_root"]:
        os.setgroups([])
        os.setresgid(config["uid"], config["uid"], config["uid"])
        os.setresuid(config["uid"], config["uid"], config["uid"])
        call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # or its own /proc files belong to root
    uid, gid = os.getuid(), os.getgid()
    unshare("user")
    map_user(1000, uid, gid)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def limit(config: dict[str, Any]) -> None:
    """Limits that hold for each process."""
    megabyte = 1 << 20
    seconds = int(config["seconds"]) + 1
    limits: dict[int, int] = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: config["disk_mb"] * megabyte,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_AS: config["memory_mb"] * megabyte,
    }
    if config["kind"] == "namespaces":  # elsewhere it would count all of the user's processes
        limits[resource.RLIMIT_NPROC] = config["processes"]
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def become_program(config: dict[str, Any]) -> None:
    """The inner process, from its first line to the program's. Bubblewrap, where it is used, does the middle part."""
    if config["kind"] == "namespaces":
        build_root(config)
        close_old_root()
        give_up_privileges(config)
    os.setsid()
    limit(config)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    nothing = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):  # what a program prints is nobody's business, however much it is
        os.dup2(nothing, fd)
    os.execve(config["command"][0], config["command"], config["environment"])


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, itself included."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        try:
            with open(f"/proc/{one}/task/{one}/children") as f:
                todo += [int(word) for word in f.read().split()]
        except OSError:
            pass
    return found


def resident_mb(pids: list[int]) -> int:
    """Memory that processes really hold, in MiB."""
    pages = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm") as f:
                pages += int(f.read().split()[1])
        except (OSError, IndexError):
            pass
    return pages * resource.getpagesize() >> 20


def watch(pid: int, config: dict[str, Any]) -> str:
    """Wait for the program; kill it where it takes too long, too much memory or too many processes."""
    deadline, pause = time.monotonic() + config["seconds"], 0.002
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return f"exit {os.waitstatus_to_exitcode(status)}"
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
        pids = descendants(pid)
        reason = "time" if time.monotonic() > deadline else ""
        reason = reason or ("processes" if len(pids) > config["processes"] + 2 else "")
        reason = reason or ("memory" if resident_mb(pids) > 1.5 * config["memory_mb"] else "")
        if reason:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return reason


def enter(config: dict[str, Any]) -> None:
    """Open the namespaces; as an ordinary user that takes a user namespace first."""
    others = ("mount", "pid", "net", "ipc", "uts")
    if config["as_root"]:
        unshare(*others)
    else:
        uid, gid = os.getuid(), os.getgid()
        unshare("user", *others)
        map_user(0, uid, gid)


def launch(config: dict[str, Any]) -> None:
    """Start the program, say on standard output how it ended."""
    if config["kind"] == "namespaces":
        enter(config)
    errors_out, errors_in = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(errors_out)
            become_program(config)
        except BaseException as error:
            os.write(errors_in, repr(error).encode()[:500])
            os._exit(97)
    os.close(errors_in)
    for fd in config["handed_on"]:  # the program's, not the watcher's: its end must show when the program ends
        os.close(fd)
    how = watch(pid, config)
    with os.fdopen(errors_out, "rb") as f:
        trouble = f.read().decode(errors="replace")
    os.write(1, f"setup {trouble}".encode() if trouble else how.encode())


def serve(control: socket.socket) -> None:
    """Launch what comes over the socket, each in a copy of this process, until the other side hangs up."""
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1 << 20, 2)
        if not message:
            return
        bury_ended()  # only now: until here nobody else could get the id of one that is to be killed
        pid = os.fork()
        if pid == 0:
            control.close()
            launch_copy(json.loads(message), *fds)
        for fd in fds:
            os.close(fd)
        control.send(str(pid).encode())


def launch_copy(config: dict[str, Any], link: int, said: int) -> NoReturn:
    """Launch one program, whose socket gets the number that it was told, and end."""
    try:
        os.dup2(said, 1, inheritable=False)
        os.close(said)
        os.dup2(link, config["handed_on"][0])
        os.close(link)
        launch(config)
    except BaseException as error:
        os.write(1, f"setup {error!r}".encode()[:500])
    finally:
        os._exit(0)


def bury_ended() -> None:
    """Take note of copies that have ended, so that they don't stay behind."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    """One program, or as many as are asked for."""
    if sys.argv[1].isdigit():
        serve(socket.socket(fileno=int(sys.argv[1])))
    else:
        launch(json.loads(sys.argv[1]))


if __name__ == "__main__":
    main()
