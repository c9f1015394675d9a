"""`corelora export`: an adapter as a plain LoRA with equal outputs, which any server loads."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from corelora.commands.output import print_json
from corelora.export import export_lora
from corelora.servers import SERVERS

HELP = "write an adapter as a plain LoRA with equal outputs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="the adapter's folder")
    add("out", metavar="OUT", help="the folder to make")
    add("--for", dest="for_", default="all", choices=list(SERVERS), help="who will load it (%(default)s)")
    add("--rank", type=int, help="cut to this rank; the report has the error that it costs")
    add("--base", metavar="MODEL", help="base model, in place of the one that the adapter names")
    add("--no-check", action="store_true", help="don't load the export back and compare")
    add("--overwrite", action="store_true", help="replace a folder that is not empty")
    add("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Export and print the report."""
    report = export_lora(
        arguments.adapter,
        arguments.out,
        for_=arguments.for_,
        rank=arguments.rank,
        base_model=arguments.base,
        check=not arguments.no_check,
        overwrite=arguments.overwrite,
    )
    if arguments.json:
        print_json({**asdict(report), "path": str(report.path)})
        return 0
    print(report)
    print(f'\nNext: load it with plain PEFT, `PeftModel.from_pretrained(base, "{report.path}")`, or serve it.')
    return 0
