"""The whole way on the command line: a run that is killed and goes on, its export, its picture in plain diffusers."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import yaml

from corelora.diffusion.export import LAYOUTS
from corelora.recipe.tree import as_data
from diffusion.helpers import make_recipe, our_picture, plain_pictures
from processes import CORELORA, wait_for
from train.test_kill import assert_equal_runs, step_of

STEPS = 6


def write_recipe(root, path):
    """With everything that a run can do: a prior, NoRA's statistics, pictures as it goes, a test."""
    subject = {"class_prompt": "a photo", "class_images": 6, "validation_prompts": ["sks at sea"], "validate_every": 2}
    loop = {"steps": STEPS, "save_every": 1, "keep": 2}
    method = {"name": "nora", "r": 8, "inner_r": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    recipe = make_recipe(root, subject=subject, loop=loop, method=method, optim={"lr": 2e-2})
    path.write_text(yaml.safe_dump(as_data(recipe)))


@pytest.mark.slow
def test_killed_resumed_exported(root, tmp_path, driver, monkeypatch):
    """Killed while it makes class pictures and after a checkpoint: the same run, bit for bit, and the same picture."""
    monkeypatch.setenv("CORELORA_CACHE", str(tmp_path / "cache"))  # where class pictures and latents are kept
    write_recipe(root, tmp_path / "recipe.yaml")
    log, cut = tmp_path / "log", root / "cut"
    command = (*CORELORA, "train", tmp_path / "recipe.yaml", "--output")
    made = tmp_path / "cache" / "class-pictures"
    for happened in (lambda: any(made.glob("*/*.png")), lambda: step_of(cut) >= 2):
        pid = driver.start(*command, cut, log=log)
        wait_for(happened, seconds=120)
        os.kill(pid, signal.SIGKILL)
        assert driver.wait(pid) == -signal.SIGKILL, log.read_text()[-2000:]
    assert driver.run(*command, cut, log=log) == 0, log.read_text()[-2000:]
    assert "going on after step" in log.read_text()
    shutil.rmtree(tmp_path / "cache")  # class pictures too are the same again
    assert driver.run(*command, tmp_path / "whole", log=log) == 0, log.read_text()[-2000:]
    assert_equal_runs(cut, tmp_path / "whole")
    for name in ("contact-sheet.png", "validation/000004.png"):
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((cut / "results.json").read_text())["contact_sheet"] == "contact-sheet.png"

    for layout in LAYOUTS:
        words = (*CORELORA, "export", cut, root / f"xl-run-{layout}", "--for", layout)
        assert driver.run(*words, log=log) == 0, log.read_text()[-2000:]
    ours = our_picture(root, cut / "adapter", "xl")
    plain = plain_pictures(driver, root, [f"xl-run-{n}" for n in LAYOUTS])
    moved = float((ours - plain["xl-none"]).abs().max())
    assert moved > 1e-3
    for layout in LAYOUTS:
        assert float((ours - plain[f"xl-run-{layout}"]).abs().max()) < 1e-3 * moved + 1e-5, layout
