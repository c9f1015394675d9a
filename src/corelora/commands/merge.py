"""`corelora merge`: the base model with an adapter merged into its weights."""

from __future__ import annotations

import argparse

from corelora.commands.output import megabytes, print_json
from corelora.folders import adapter_folder
from corelora.merged import export_merged

HELP = "write the base model with an adapter merged into it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="the adapter's folder, or a run's")
    add("out", metavar="OUT", help="the folder to make")
    add("--base", metavar="MODEL", help="base model, in place of the one that the adapter names")
    add("--no-check", action="store_true", help="don't load the merged model back and compare")
    add("--overwrite", action="store_true", help="replace a folder that is not empty")
    add("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Merge and print what was written."""
    path = export_merged(
        adapter_folder(arguments.adapter),
        arguments.out,
        base_model=arguments.base,
        check=not arguments.no_check,
        overwrite=arguments.overwrite,
    )
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    checked = not arguments.no_check
    if arguments.json:
        print_json({"path": str(path), "bytes": size, "checked": checked})
        return 0
    print(f"merged model in {path}, {megabytes(size)}" + (", outputs compared with the adapter's" if checked else ""))
    print(f'\nNext: load it like any model, `from_pretrained("{path}")`; corelora is not needed for it.')
    return 0
