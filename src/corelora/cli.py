"""The command line: `corelora COMMAND`. Each command is a module of `corelora.commands`.

Exit codes: 0 done, 2 wrong input (one message on standard error), 130 stopped by the user. Anything else is a fault of
corelora and shows its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import transformers

import corelora.commands
from corelora import __version__
from corelora.errors import CoreLoraError, UnknownSettingError, unknown_name

COMMANDS = tuple(m.name for m in pkgutil.iter_modules(corelora.commands.__path__) if m.name != "output")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `corelora`; the process's own where None.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = next((w for w in words if not w.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        return _fail("corelora", unknown_name("command", name, COMMANDS))
    arguments = _parser().parse_args(words)
    if arguments.command is None:
        _parser().print_help()
        return 2
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    where = f"corelora {arguments.command}"
    try:
        return arguments.run(arguments)
    except (CoreLoraError, UnknownSettingError, OSError) as error:
        if arguments.debug:
            raise
        return _fail(where, str(error))
    except KeyboardInterrupt:
        print(f"\n{where}: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="corelora",
        description="Low-rank adapters with a core, as a PEFT method.",
        epilog="Begin with `corelora methods`, then `corelora plan MODEL`.",
    )
    parser.add_argument("--version", action="version", version=f"corelora {__version__}")
    parser.set_defaults(command=None)
    subparsers = parser.add_subparsers(metavar="COMMAND")
    for name in COMMANDS:
        module = _module(name)
        sub = subparsers.add_parser(name, parents=[common], help=module.HELP, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run, command=name)
    return parser


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"corelora.commands.{name}")


def _fail(where: str, message: str) -> int:
    print(f"{where}: {message}", file=sys.stderr)
    return 2


def _show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    """One line a warning; other libraries' warnings to programmers are not for a command's user."""
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
