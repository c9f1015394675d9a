"""The task `dreambooth`: a diffusion model learns a subject from a few pictures (Ruiz et al., arXiv 2208.12242)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, TrainerCallback

from corelora.data.cache import digest_of, key_of
from corelora.diffusion.parts import ENCODERS, Parts, find_parts, long_prompts
from corelora.diffusion.pictures import class_pictures, contact_sheet, paint
from corelora.diffusion.rows import SubjectRows, code, collate, picture_files, read_all
from corelora.diffusion.subject import Subject
from corelora.errors import CoreLoraError, raise_all, sentences
from corelora.recipe import Recipe
from corelora.recipe.subject import SubjectPart
from corelora.train.folder import RunFolder
from corelora.train.methods import is_whole
from corelora.train.story import say
from corelora.train.tasks import TASKS, Rows, Task
from corelora.train.trainer import RunTrainer

FORM = "subject"
SHOWN = 4  # pictures a row of the contact sheet
TEST_REPEAT = 8  # draws of noise for each test picture: one alone says little
TESTED = 10_000  # added to the seed of test rows, whose noise must not be that of training


class NoiseTrainer(RunTrainer):
    """Losses of all test rows, each without weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = False

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Any, Any]:
        """(None, mean squared error of each row [b], the rows' weights [b])."""
        inputs = dict(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            rows = model(**inputs)["rows"]
        return None, rows, inputs["weights"]


class DreamBooth(Task):
    """Pictures of one subject under one prompt, with the model's own pictures of its class beside them."""

    name = "dreambooth"
    task_type = None  # PEFT has none for pictures
    reads_tokens = False
    exports = "FOLDER --for diffusers    a LoRA for diffusers; --for kohya for most other programs"

    def load_config(self, recipe: Recipe) -> Parts:
        """The pipeline's parts, by its configs.

        Raises:
            CoreLoraError: no pipeline that can be trained; a size or prompts that it can't take.
        """
        parts = find_parts(recipe.model)
        raise_all(_unfit(recipe, parts), "subject")
        return parts

    def plain_config(self, recipe: Recipe) -> Parts:
        """The pipeline's parts, whatever the subject."""
        return find_parts(recipe.model)

    def load_processor(self, recipe: Recipe) -> Parts:
        """The pipeline's parts: they code pictures and prompts."""
        return find_parts(recipe.model)

    def make_meta(self, recipe: Recipe, config: Parts) -> nn.Module:
        """UNet and text encoders without weights."""
        encoders = {name: config.meta_encoder(name) for name in _trained(recipe, config)}
        return Subject(config.meta_unet(), encoders, config.load("scheduler"))

    def load_model(self, recipe: Recipe, config: Parts, processor: Any, source: str | None) -> nn.Module:
        """UNet and text encoders on the CPU, everything frozen."""
        encoders = {name: config.load(name) for name in _trained(recipe, config)}
        return Subject(config.load("unet"), encoders, config.load("scheduler"), subject_of(recipe).min_snr)

    def unused(self, model: nn.Module) -> list[str]:
        """Layers of text encoders behind the states that the UNet reads."""
        assert isinstance(model, Subject)
        return model.unused()

    def save(self, model: Any, folder: Path, processor: Parts, state: Mapping[str, Any] | None) -> None:
        """The adapter, with the name of its pipeline."""
        model.save_pretrained(folder, state_dict=state)
        processor.save(folder)

    def problems(self, recipe: Recipe) -> list[str]:
        """A missing subject, methods without an adapter, pictures that can't be used."""
        found = []
        if recipe.subject is None:
            found.append("subject is missing: its prompt says what the pictures show, `a photo of sks dog`")
        if recipe.data.form != FORM:
            found.append(f"data.form: pictures of a subject are the form {FORM!r}, not {recipe.data.form!r}")
        if is_whole(recipe.method):
            found.append(f"method.name: dreambooth trains adapters; {recipe.method['name']!r} has none")
        if recipe.model.quantize is not None:
            found.append("model.quantize: diffusion models are trained in float32, bfloat16 or float16 here")
        for which in ("train", "test"):
            source = getattr(recipe.data, which)
            try:
                read_all(picture_files(source.path, which) if source else [])
            except CoreLoraError as error:
                found += sentences(error)
        return found

    def encode(self, recipe: Recipe, which: str, processor: Parts) -> Rows:
        """Latents and texts, coded once; the class's pictures are made first where they are missing."""
        part, source = subject_of(recipe), getattr(recipe.data, which)
        size = side(recipe, processor)
        paths = picture_files(source.path, which)
        own = code(processor, recipe, paths, part.prompt, size)
        steps = processor.load("scheduler").config.num_train_timesteps
        summary = f"{len(paths)} pictures of {part.prompt!r} at {size} x {size}"
        if which == "test":
            rows = SubjectRows(own, None, recipe.loop.seed + TESTED, steps, TEST_REPEAT)
            return Rows(dataset=rows, counts={"pictures": len(paths)}, summary=summary)
        prior, others = None, []
        if part.class_prompt is not None:
            others = class_pictures(processor, part.class_prompt, part.class_images, size, part.inference_steps)
            prior = code(processor, recipe, others, part.class_prompt, size)
            summary += f", {len(others)} of {part.class_prompt!r}"
        rows = SubjectRows(own, prior, recipe.loop.seed, steps)
        key = key_of([digest_of(p) for p in (*paths, *others)], part.prompt, part.class_prompt, size)
        return Rows(dataset=rows, counts={"pictures": len(paths)}, summary=summary, fingerprint=key)

    def collator(self, recipe: Recipe, processor: Any) -> Callable[[list[dict[str, Any]]], Any]:
        """The subject's rows, then the class's."""
        return partial(collate, prior_weight=subject_of(recipe).prior_weight)

    def sample(self, row: Mapping[str, Any], processor: Any) -> list[tuple[str, bool]]:
        """Shapes: latents can't be shown as text."""
        own = row["own"]
        return [
            (f"latents {list(own['latents'].shape)} at timestep {int(own['timesteps'])} -> ", False),
            ("noise", True),
        ]

    def measure(self, recipe: Recipe) -> Callable[[Any], dict[str, float]]:
        """Mean squared error of the predicted noise over test pictures, each with several draws of noise."""

        def figures(prediction: EvalPrediction) -> dict[str, float]:
            return {"loss": float(np.asarray(prediction.predictions, np.float64).mean())}

        return figures

    def trainer_class(self) -> type:
        """Row losses."""
        return NoiseTrainer

    def callbacks(self, recipe: Recipe, folder: RunFolder, processor: Parts) -> list[TrainerCallback]:
        """New noise in each pass; validation pictures as it goes."""
        part = subject_of(recipe)
        draws = part.validation_prompts and part.validate_every
        return [Passes(), *([Validation(recipe, folder, processor)] if draws else [])]

    def finish(self, recipe: Recipe, trainer: Any, folder: RunFolder, processor: Parts) -> dict[str, Any]:
        """Validation pictures, and a contact sheet of them under the training pictures."""
        part = subject_of(recipe)
        if not trainer.is_world_process_zero():
            return {}
        model = trainer.accelerator.unwrap_model(trainer.model)
        rows = [(f"trained on: {part.prompt}", read_all(picture_files(recipe.data.train.path))[:SHOWN])]
        rows += validation_pictures(recipe, model, processor)
        contact_sheet(rows, folder.root / "contact-sheet.png")
        say(f"pictures: {folder.root / 'contact-sheet.png'}")
        return {"contact_sheet": "contact-sheet.png"}


class Passes(TrainerCallback):
    """Tells the rows which pass over them begins, also in a run that goes on, where the loader itself does not."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """`state.epoch` is whole at the beginning of a pass, and has a part behind the point in the middle of one."""
        train_dataloader.dataset.set_epoch(int(state.epoch + 1e-6))


class Validation(TrainerCallback):
    """Pictures of the validation prompts every so many steps, as validation/STEP.png."""

    def __init__(self, recipe: Recipe, folder: RunFolder, parts: Parts) -> None:
        self.recipe, self.folder, self.parts = recipe, folder, parts

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Draw them where it is time; the random numbers of training stay as they were."""
        every = subject_of(self.recipe).validate_every
        if not every or state.global_step % every or not state.is_world_process_zero:
            return
        path = self.folder.root / "validation" / f"{state.global_step:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng():
            contact_sheet(validation_pictures(self.recipe, model, self.parts), path)


@torch.no_grad()
def validation_pictures(recipe: Recipe, model: Any, parts: Parts) -> list[tuple[str, list[Any]]]:
    """(prompt, pictures) of each validation prompt, from the same noise every time.

    Args:
        recipe: the run's.
        model: as it trains; it is put back into training mode if it was.
        parts: the pipeline's other parts.
    """
    part = subject_of(recipe)
    subject = model.get_base_model()
    training = subject.training
    subject.eval()
    given = {"unet": subject.unet, **{name: subject.get_submodule(name) for name in subject.encoder_names}}
    pipeline = parts.pipeline(**given).to(subject.alphas.device)
    seeds, size = list(range(SHOWN)), side(recipe, parts)
    prompts = part.validation_prompts or [part.prompt]
    made = [(p, paint(pipeline, [p] * SHOWN, seeds, size, part.inference_steps)) for p in prompts]
    subject.train(training)
    return made


def subject_of(recipe: Recipe) -> SubjectPart:
    """The recipe's part on the subject.

    Raises:
        CoreLoraError: it has none.
    """
    if recipe.subject is None:
        raise CoreLoraError("subject is missing in the recipe")
    return recipe.subject


def side(recipe: Recipe, parts: Parts) -> int:
    """Side of a training picture in pixels: the recipe's, else what the UNet was made for."""
    given = subject_of(recipe).size
    return given or int(parts.unet["sample_size"]) * parts.scale


def _unfit(recipe: Recipe, parts: Parts) -> list[str]:
    """What this pipeline can't take."""
    part, found = subject_of(recipe), []
    if part.size is not None and part.size % parts.scale:
        near = max(parts.scale, round(part.size / parts.scale) * parts.scale)
        found.append(f"size must be a multiple of {parts.scale}, as the VAE has it: {near}, not {part.size}")
    prompts = {"prompt": part.prompt, "class_prompt": part.class_prompt or ""}
    prompts |= {f"validation_prompts[{n}]": prompt for n, prompt in enumerate(part.validation_prompts)}
    return found + long_prompts(parts, prompts)


def _trained(recipe: Recipe, parts: Parts) -> list[str]:
    """Text encoders that train."""
    wanted = recipe.subject is not None and recipe.subject.text_encoder
    return [name for name in ENCODERS if wanted and name in parts.encoders]


TASKS.add(DreamBooth.name, DreamBooth())
