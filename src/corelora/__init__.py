"""Low-rank adapters with a core, as a PEFT method. Importing corelora registers the type CORELORA with PEFT."""

from corelora.peft_plugin import register as _register

_register()

from corelora.checks import GradientCheck, GradientCheckCallback, check_training  # noqa: E402
from corelora.config import CoreLoraConfig  # noqa: E402
from corelora.export import ExportReport, export_lora  # noqa: E402
from corelora.fold import fold, unfold  # noqa: E402
from corelora.gradients import GradientStats, collect_gradients  # noqa: E402
from corelora.merged import export_merged  # noqa: E402
from corelora.spec import list_methods, register_method  # noqa: E402
from corelora.stats import InputStats, collect_stats  # noqa: E402

__all__ = [
    "CoreLoraConfig",
    "ExportReport",
    "GradientCheck",
    "GradientCheckCallback",
    "GradientStats",
    "InputStats",
    "check_training",
    "collect_gradients",
    "collect_stats",
    "export_lora",
    "export_merged",
    "fold",
    "list_methods",
    "register_method",
    "unfold",
]
__version__ = "0.1.0"
