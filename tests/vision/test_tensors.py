"""Pictures to tensors: the processor's own way, and crops that depend on seed, epoch and picture alone."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, ConvNextImageProcessor, Siglip2ImageProcessor, ViTImageProcessor

from corelora.errors import CoreLoraError
from corelora.vision.tensors import AREAS, Batches, Collator, Cropper, Processor, crop_box, load_processor
from vision.helpers import texture

KINDS = {
    "crop in the middle": lambda: BitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6]
    ),
    "squeezed": lambda: ViTImageProcessor(size={"height": 24, "width": 24}),
    "a part of 224": lambda: ConvNextImageProcessor(size={"shortest_edge": 48}, crop_pct=0.875),
    "no scale": lambda: ViTImageProcessor(size={"height": 8, "width": 8}, do_rescale=False, do_normalize=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_steps_are_the_processors(kind):
    """A crop that is already of the right size is scaled and normalised as the processor does it."""
    processor = Processor(KINDS[kind]())
    height, width = processor.size()
    picture = texture("banded", 3, side=height)
    options = {"do_resize": False, "return_tensors": "pt"}
    expected = processor.images(images=[picture], do_center_crop=False, **options)["pixel_values"][0].float()
    assert (height, width) == tuple(expected.shape[1:])
    torch.testing.assert_close(Cropper(processor, "light").normalise(picture), expected, atol=1e-5, rtol=1e-5)


def test_a_processor_whose_size_depends_on_the_picture():
    """No batch could be made."""
    with pytest.raises(CoreLoraError, match="several sizes"):
        Processor(ViTImageProcessor(size={"shortest_edge": 32}, default_to_square=False)).size()


def test_a_processor_that_makes_patches():
    """Pictures of any size as lists of patches, with masks, are another kind of input."""
    with pytest.raises(CoreLoraError, match=r"and pixel_attention_mask, spatial_shapes; \[1, 3, h, w\] is expected"):
        Processor(Siglip2ImageProcessor()).size()


def test_a_model_without_a_processor(tmp_path):
    """Named, with what was looked for."""
    with pytest.raises(CoreLoraError, match="no image processor and tokenizer at"):
        load_processor(str(tmp_path), {}, texts=True)


@pytest.mark.parametrize("augment", AREAS)
@pytest.mark.parametrize("size", [(64, 48), (31, 200), (1000, 10), (1, 1)])
def test_crops_lie_in_the_picture(augment, size):
    """With an area in its bounds, wherever such a shape fits."""
    low, high = AREAS[augment]
    for n in range(200):
        left, top, right, bottom = crop_box(size, (low, high), random.Random(n))
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        if size == (64, 48):
            part = (right - left) * (bottom - top) / (size[0] * size[1])
            assert low - 1e-6 <= part <= high + 1e-6
            assert 0.74 < (right - left) / (bottom - top) < 1.34


def rows(count, train=True):
    """Rows with their pictures inside."""
    from vision.test_pictures import data_of

    return [
        {"picture": {"path": None, "bytes": data_of(texture("dotted", n))}, "labels": n % 3, "row": n, "train": train}
        for n in range(count)
    ]


def test_crops_depend_on_seed_epoch_and_picture_alone():
    """Not on the batch, nor on what was made before."""
    made, processor = rows(6), Processor(KINDS["squeezed"]())
    first = Collator(processor, Batches(augment="strong"))
    whole = first(made)
    again = Collator(processor, Batches(augment="strong"))
    parts = [again(made[3:]), again(made[:3])]
    assert torch.equal(whole["pixel_values"], torch.cat([parts[1]["pixel_values"], parts[0]["pixel_values"]]))
    assert whole["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(first(made)["pixel_values"], whole["pixel_values"])
    first.epoch = 1
    assert not torch.equal(first(made)["pixel_values"], whole["pixel_values"])
    assert not torch.equal(
        Collator(processor, Batches(augment="strong", seed=1))(made)["pixel_values"], whole["pixel_values"]
    )


@pytest.mark.parametrize("augment", ["none", "light"])
def test_rows_to_test_on_are_never_cropped(augment):
    """They come as the processor makes them; so do training rows without augmentation."""
    processor, made = Processor(KINDS["squeezed"]()), rows(3, train=augment == "none")
    pictures = [texture("dotted", n) for n in range(3)]
    assert torch.equal(Collator(processor, Batches(augment=augment))(made)["pixel_values"], processor(pictures))


def test_half_of_the_crops_are_flipped():
    """A ramp's direction tells."""
    ramp = Image.fromarray(np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(64, 0)).convert("RGB")
    crop = Cropper(Processor(KINDS["squeezed"]()), "light")
    flips = [bool(v[0, 0, 0] > v[0, 0, -1]) for v in (crop(ramp, random.Random(n)) for n in range(200))]
    assert 70 < sum(flips) < 130
