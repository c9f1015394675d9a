"""Imports once, then forks a process for each command line that it is told, so that a test can start many quickly.

Each line on standard input is a JSON object: {"words": [...], "log": path} starts `corelora WORDS` and answers its
process id; {"wait": pid} answers the exit code, negative for a signal.
"""

import json
import os
import sys

import torch

from corelora.cli import main
from corelora.commands import train as _command  # noqa: F401
from corelora.train import run as _run  # noqa: F401

torch.set_num_threads(1)


def start(words: list[str], log: str) -> int:
    """Fork a process that runs the command and ends with its exit code."""
    pid = os.fork()
    if pid:
        return pid
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (handle, 1), (handle, 2)):
        os.dup2(source, target)
    code = 1
    try:
        code = main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


for line in sys.stdin:
    told = json.loads(line)
    if "wait" in told:
        answer = os.waitstatus_to_exitcode(os.waitpid(told["wait"], 0)[1])
    else:
        answer = start(told["words"], told["log"])
    print(answer, flush=True)
