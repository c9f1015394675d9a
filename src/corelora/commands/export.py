"""`corelora export`: an adapter as a plain LoRA with equal outputs, which any server loads."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from corelora.commands.output import print_json
from corelora.errors import CoreLoraError
from corelora.export import export_lora
from corelora.folders import adapter_folder
from corelora.servers import SERVERS

HELP = "write an adapter as a plain LoRA with equal outputs"
IMAGES = ("diffusers", "kohya")  # software for pictures: adapters of the task dreambooth
PIPELINE = "pipeline.json"  # a file of theirs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="the adapter's folder, or a run's")
    add("out", metavar="OUT", help="the folder to make")
    add("--for", dest="for_", default="all", choices=[*SERVERS, *IMAGES], help="who will load it (%(default)s)")
    add("--rank", type=int, help="cut to this rank; the report has the error that it costs")
    add("--base", metavar="MODEL", help="base model, in place of the one that the adapter names")
    add("--no-check", action="store_true", help="don't load the export back and compare")
    add("--overwrite", action="store_true", help="replace a folder that is not empty")
    add("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Export and print the report.

    Raises:
        CoreLoraError: see `export_lora` and `export_subject`.
    """
    arguments.adapter = adapter_folder(arguments.adapter)
    if arguments.for_ in IMAGES:
        return _for_images(arguments)
    if (Path(arguments.adapter) / PIPELINE).is_file():
        raise CoreLoraError(f"{arguments.adapter} is of a diffusion model: add --for {' or --for '.join(IMAGES)}")
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


def _for_images(arguments: argparse.Namespace) -> int:
    try:
        from corelora.diffusion.export import Wanted, export_subject
    except ModuleNotFoundError as error:
        raise CoreLoraError(f"this export needs {error.name}. Install: pip install corelora[train,diffusion]") from None
    check = not arguments.no_check
    wanted = Wanted(layout=arguments.for_, rank=arguments.rank, base=arguments.base, check=check)
    report = export_subject(Path(arguments.adapter), Path(arguments.out), wanted, arguments.overwrite)
    if arguments.json:
        print_json({**asdict(report), "path": str(report.path)})
        return 0
    print(report)
    print(
        f'\nNext: pipeline.load_lora_weights("{report.path}") in diffusers, or the file in any program that reads it.'
    )
    return 0
