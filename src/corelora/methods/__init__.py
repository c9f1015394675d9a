"""The methods, one file each. Every file of this folder is imported; each registers itself."""

import importlib
import pkgutil

import corelora.core
import corelora.sampling  # noqa: F401  (the choices that the methods name)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
