"""CoreLoraConfig: what a user writes, checked when it is made, and turned into an AdapterSpec for each layer."""

from __future__ import annotations

import math
import os
import re
import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from peft import PeftConfig, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

import corelora.methods  # noqa: F401  (fills the table of methods)
from corelora.card import write_card
from corelora.errors import CoreLoraError, UnknownSettingError, nearest, raise_all, unknown_name
from corelora.measured import Stats
from corelora.registry import METHODS, OUTERS
from corelora.spec import CHOICE_NAMES, VARIANTS, AdapterSpec, Choices, choice_problems, parse_train

ADAPTER_FORMAT = 1  # of the adapter's files; a newer one is refused

_RENAMED = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init_weights",
    "rank": "r",
    "lora_bias": "bias",
}


def _help(text: str, default: Any = None) -> Any:
    if isinstance(default, (dict, list, set)):
        return field(default_factory=type(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class CoreLoraConfig(PeftConfig):
    """Configuration of a low-rank adapter with a core.

    `method` names a published method, which fills the choices (`outer`, `core`, `train`, `start`, `core_start`,
    `core_std`, `sampling`, `slice_scale`, `pinv_rtol`, `singular_values`, `position`); each of them can be set
    instead. All mistakes are reported together, as a CoreLoraError; a keyword that does not exist raises an
    UnknownSettingError that names the nearest one.
    """

    method: str = _help("Name of the method; `corelora methods` lists them.", "nlora")
    variant: str = _help(
        "'default' is what measurements support, 'published' what the paper's formulas say.", "default"
    )
    r: int = _help("Outer rank.", 16)
    inner_r: int | None = _help("Inner rank k of nested and parallel cores. Default: half of r, at least 1.")
    alpha: float | None = _help("The product is scaled by alpha / r. Default: the layer's r, which makes it 1.")
    target_modules: list[str] | str | None = _help(
        "Names (suffixes) of the modules to adapt, a regular expression, or 'all-linear'. Default: as PEFT's LoRA has "
        "it for the architecture."
    )
    exclude_modules: list[str] | str | None = _help("Names or a regular expression of modules to leave alone.")
    dropout: float = _help("Probability that an input feature is dropped before A, in training.", 0.0)
    bias: str = _help("Which biases of the base train: 'none', 'all' or 'corelora_only'.", "none")
    use_rslora: bool = _help("Scale by alpha / sqrt(r) instead of alpha / r.", False)
    modules_to_save: list[str] | None = _help("Modules to train and save whole, such as a new classifier.")
    layers_to_transform: list[int] | int | None = _help("Adapt only the layers with these indices.")
    layers_pattern: list[str] | str | None = _help("Name of the layer list that the indices refer to.")
    rank_pattern: dict[str, int] = _help("Other ranks for modules whose name matches.", {})
    alpha_pattern: dict[str, float] = _help("Other alphas for modules whose name matches.", {})
    inner_r_pattern: dict[str, int] = _help("Other inner ranks for modules whose name matches.", {})
    fan_in_fan_out: bool = _help("Accepted for LoRA's sake; layers with a transposed weight are recognised.", False)
    target_parameters: list[str] | None = _help("Not supported: adapters sit on modules.")
    init_weights: bool = _help("False starts all trained factors at random non-zero values, for tests.", True)

    outer: str | None = _help("How A and B begin: kaiming, random, svd, awsvd, nystrom, gradient.")
    core: str | None = _help("Structure of the core: none, diagonal, dense, nested, parallel_a, parallel_b.")
    train: list[str] | str | None = _help("Which factors learn: any of A, core, B.")
    start: str | None = _help("'zero', 'as_is' or 'subtract' (the first output is exactly the pretrained model's).")
    core_start: str | None = _help("How the core begins.")
    core_std: float | str | None = _help("Standard deviation of a Gaussian core: a number, or '1/r'.")
    sampling: str | None = _help("Which rows and columns a Nystrom start takes.")
    slice_scale: str | None = _help("Scaling of Nystrom slices: none, unit, orthonormal.")
    pinv_rtol: float | None = _help("Singular values under this part of the largest count as zero in a pinv core.")
    singular_values: str | None = _help("Where an SVD start puts S: left (B), right (A), split.")
    position: str | None = _help("w_a, w_b or both, for parallel cores and two nested cores in a row.")

    stats: Any = _help(
        "For starts that read statistics (AwSVD: InputStats, gradient: GradientStats): them, a path, or 'weight'."
    )
    stats_fingerprint: str | None = _help("Fingerprint of the statistics that were used; written on saving.")
    stats_power: float = _help("Exponent of the mean absolute input in AwSVD's scaling.", 0.5)
    svd_solver: str = _help("'auto', 'exact' or 'randomized'.", "auto")
    on_small_layer: str = _help("'error' or 'clip' where r exceeds a weight's smaller side.", "error")
    store_outer: bool | None = _help("Keep frozen outer factors in the file. Default: decompositions yes, slices no.")
    seed: int = _help("Seed of sampled indices and frozen random factors.", 0)
    adapter_format: int | None = _help("Version of the file format; set in saved configs only.")

    def __post_init__(self) -> None:
        super_post = getattr(super(), "__post_init__", None)
        if super_post is not None:
            super_post()
        self.peft_type = PeftType.CORELORA  # type: ignore[attr-defined]
        self.stats_object: Any = None
        self.targets_given = self.target_modules is not None
        if isinstance(self.stats, os.PathLike):
            self.stats = os.fspath(self.stats)
        elif isinstance(self.stats, Stats):  # stays outside the fields: only its fingerprint is written
            self.stats_object, self.stats = self.stats, None
            self.stats_fingerprint = self.stats_object.fingerprint
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        raise_all(self.problems(), "CoreLoraConfig")
        if self.use_rslora and self.alpha is None and not self.alpha_pattern:
            warnings.warn(
                "use_rslora without alpha makes the scale sqrt(r), which grows with r: set alpha (rsLoRA's paper "
                "keeps it constant).",
                stacklevel=3,
            )

    def problems(self) -> list[str]:
        """Every mistake in this config, one sentence each."""
        found = [p for p in (METHODS.miss(self.method),) if p]
        for kind, value, known in (
            ("variant", self.variant, VARIANTS),
            ("on_small_layer", self.on_small_layer, ("error", "clip")),
            ("svd_solver", self.svd_solver, ("auto", "exact", "randomized")),
            ("bias", self.bias, ("none", "all", "corelora_only")),
        ):
            if value not in known:
                found.append(unknown_name(kind, value, known))
        if not found:
            found += choice_problems(self.choices())
        found += self._number_problems()
        if self.stats is not None and not isinstance(self.stats, str):
            found.append(f"stats must be statistics, a path or 'weight', got {self.stats!r}.")
        if self.store_outer is False and not found and not OUTERS[self.choices().outer].repeatable:
            found.append(
                f"store_outer can't be False: the outer factors of {self.choices().outer!r} come from gradients that a "
                "load does not have."
            )
        if self.target_parameters:
            found.append("target_parameters is not supported: name modules in target_modules instead.")
        if self.layers_pattern and self.layers_to_transform is None:
            found.append("layers_pattern needs layers_to_transform.")
        return found

    def _number_problems(self) -> list[str]:
        found = []
        ranks = {"r": self.r} | {f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}
        for name, rank in ranks.items():
            if not isinstance(rank, int) or rank < 1:
                found.append(f"{name} must be a whole number of at least 1, got {rank!r}.")
        alphas = {"alpha": self.alpha} | {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if alpha is not None and not _is_number(alpha):
                found.append(f"{name} must be a number, got {alpha!r}.")
            elif alpha is not None and not alpha > 0:
                found.append(f"{name} must be positive, got {alpha!r}.")
        inners = {"inner_r": self.inner_r} | {f"inner_r_pattern[{k!r}]": v for k, v in self.inner_r_pattern.items()}
        for name, inner in inners.items():
            if inner is not None and (not isinstance(inner, int) or inner < 1):
                found.append(f"{name} (k) must be a whole number of at least 1, got {inner!r}.")
        if isinstance(self.inner_r, int) and isinstance(self.r, int) and self.inner_r > max(self.r, 1):
            found.append(f"inner_r (k) must be between 1 and r = {self.r}, got {self.inner_r!r}.")
        for name, value in (("dropout", self.dropout), ("stats_power", self.stats_power)):
            if not _is_number(value):
                found.append(f"{name} must be a number, got {value!r}.")
        if _is_number(self.dropout) and not 0 <= self.dropout < 1:
            found.append(f"dropout must be in [0, 1), got {self.dropout!r}.")
        return found

    def choices(self) -> Choices:
        """The method's choices with the user's own in their place."""
        given = {name: getattr(self, name) for name in CHOICE_NAMES}
        if given["train"] is not None:
            given["train"] = parse_train(given["train"])
        return METHODS[self.method].choices(self.variant).changed(**given)

    @property
    def from_file(self) -> bool:
        """This config was saved with an adapter: factors come from its file."""
        return self.adapter_format is not None

    def spec_for(self, key: str, shape: tuple[int, int]) -> AdapterSpec:
        """The spec of the adapter on the module named `key` with weight shape (o, i).

        Raises:
            CoreLoraError: k exceeds that layer's r, or another number does not fit.
        """
        r = self.rank_for(key)
        choices = self.choices()
        if self.on_small_layer == "clip" and OUTERS[choices.outer].needs_rank:
            r = min(r, *shape)
        inner = self.inner_r_pattern.get(get_pattern_key(list(self.inner_r_pattern), key), self.inner_r)
        if inner is None:
            inner = max(1, r // 2)
        elif self.on_small_layer == "clip":
            inner = min(inner, r)
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), key), self.alpha)
        alpha = float(r if alpha is None else alpha)
        return AdapterSpec(
            choices=choices,
            r=r,
            inner_r=inner,
            scale=alpha / math.sqrt(r) if self.use_rslora else alpha / r,
            dropout=self.dropout,
            seed=self.seed,
            store_outer=self.store_outer,
            svd_solver=self.svd_solver,
            stats_power=self.stats_power,
        )

    def rank_for(self, key: str) -> int:
        """The outer rank asked for on the module named `key`, before any clipping."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), key), self.r)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, and corelora's section in the folder's model card."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(save_directory, self.method, self.variant, self.r, self.base_model_name_or_path)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's; a damaged adapter file beside the config is reported here, by its name.

        Raises:
            CoreLoraError: the folder's adapter file is truncated, or of a newer format.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        _check_readable(os.path.join(os.fspath(pretrained_model_name_or_path), subfolder or ""))
        return config

    def to_dict(self) -> dict[str, Any]:
        """As PEFT has it, with the method's choices written out: an adapter keeps its meaning if a default changes."""
        data = asdict(self)
        choices = asdict(self.choices())
        data.update({name: choices[name] for name in CHOICE_NAMES})
        data["train"] = list(choices["train"])
        data["stats"] = self.stats if self.stats == "weight" else None
        data["adapter_format"] = ADAPTER_FORMAT
        return data


def unmatched_targets(config: CoreLoraConfig, keys: list[str]) -> list[str]:
    """One sentence for each name or expression in `target_modules` that no module has, with the nearest that one has.

    Args:
        config: a config whose target_modules the user wrote; PEFT's own table for an architecture may name more.
        keys: the names of the model's modules.
    """
    targets = config.target_modules
    if not config.targets_given or targets == "all-linear":
        return []
    if isinstance(targets, str):
        if any(re.fullmatch(targets, key) for key in keys):
            return []
        return [f"target_modules: the expression {targets!r} matches no module's full name."]
    ends = {key.rpartition(".")[2] for key in keys} - {""}
    missing = [t for t in sorted(targets or ()) if not any(key == t or key.endswith(f".{t}") for key in keys)]
    return [
        f"target_modules: {t!r} matches no module." + (f" Did you mean {guess!r}?" if guess else "")
        for t in missing
        for guess in [nearest(t.rpartition(".")[2], ends)]
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_readable(folder: str) -> None:
    """Raise CoreLoraError where a local adapter folder holds a truncated or damaged file (only its header is read)."""
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise CoreLoraError(f"{path} is truncated or damaged ({error}): copy or download the adapter again") from None


def _checked(init: Any) -> Any:
    """Wrap the dataclass's __init__: unknown keywords are answered with the right name, several together."""

    def __init__(self: CoreLoraConfig, *args: Any, **kwargs: Any) -> None:
        saved = kwargs.get("adapter_format")
        if isinstance(saved, int) and saved > ADAPTER_FORMAT:  # before its keys are called unknown
            raise CoreLoraError(
                f"this adapter has file format {saved}, but this corelora reads up to {ADAPTER_FORMAT}: "
                "upgrade corelora"
            )
        known = [f.name for f in fields(CoreLoraConfig) if f.init]
        unknown = [k for k in kwargs if k not in known]
        if unknown:
            lines = []
            for key in unknown:
                guess = _RENAMED.get(key) or nearest(key, known)
                lines.append(f"CoreLoraConfig has no setting {key!r}" + (f": use {guess!r}." if guess else "."))
            raise UnknownSettingError(" ".join(lines))
        init(self, *args, **kwargs)

    __init__.__wrapped__ = init  # type: ignore[attr-defined]
    return __init__


CoreLoraConfig.__init__ = _checked(CoreLoraConfig.__init__)  # type: ignore[method-assign]
