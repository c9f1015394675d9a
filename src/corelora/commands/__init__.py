"""The commands of `corelora`, one module each: `add_arguments(parser)` and `run(arguments) -> exit code`."""
