"""README.md tells the truth: its code runs, its commands exist, its tables and figures are the result files'."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from corelora.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)


def test_begins_with_the_two_commands():
    commands = re.findall(r"^    (make \w+)", README, flags=re.MULTILINE)
    assert commands[:2] == ["make quickstart", "make test"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {c.split()[1] for c in commands} <= set(targets)


def test_python_example_runs(tmp_path, monkeypatch):
    """Each Python block, on a tiny local model, in an empty folder."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes))
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("MODEL")
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "my-lora" / "adapter_config.json").is_file()


def test_commands_exist():
    named = set(re.findall(r"^    corelora (\w+)", README, flags=re.MULTILINE))
    assert named == set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["make_tables.py", "make_pages.py"])
def test_what_result_files_make_is_current(name, driver):
    done = driver.call(ROOT / "docs" / name, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def prose(monkeypatch):
    """docs/prose.py, which is no part of a package."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("prose")


@PAGES
def test_figures_come_from_result_files(prose, path):
    """What looks measured stands in a mark that make_tables.py fills, or docs/unmarked.yaml says why not."""
    assert prose.unmarked(path.read_text(), prose.allowed(path.name)) == []


@pytest.mark.parametrize(
    "text",
    [
        "It takes 45 ms a program.",
        "A step takes 1.179 times\nthe base.",
        "It gains 12 % here.",
        "It is ten times as large.",
        "Equal in 13 of 40 replies.",
        "LoRA needs 6 to <!-- figure notes.idle .0f -->7<!-- /figure --> GiB.",
        "| a table by hand | 2.4 s |",
        "- a point of a list:\n  0.30 of the first",
    ],
)
def test_a_figure_without_a_mark_is_found(prose, text):
    assert len(prose.unmarked(text, [])) == 1


@pytest.mark.parametrize(
    "text",
    [
        "It takes <!-- figure notes.sandboxed-program .0f -->45<!-- /figure --> ms a program.",
        "<!-- table step -->\n| 45.1 ms |\n<!-- end -->",
        "`loop.clip=1.5`, and a command:\n\n    corelora train --set optim.lr=0.5",
        "transformers 5.23, TRL 1.16, Stable Diffusion 1.5, section 4.1, arXiv 2405.14739",
        "8 x 512 tokens at a rate of 5e-4, of 1,319 problems",
    ],
)
def test_what_is_no_figure_or_has_its_mark_passes(prose, text):
    assert prose.unmarked(text, []) == []


@pytest.mark.parametrize(
    "text",
    ["Some words,\n<!-- figure notes.idle .0f -->4<!-- /figure --> ms.", "<!-- figure notes.idle -->4<!-- /figure -->"],
)
def test_marks_that_markdown_or_the_script_would_not_read(prose, text):
    assert any("mark" in problem for problem in prose.unmarked(text, []))


def test_a_phrase_that_is_gone_is_told(prose):
    assert prose.unmarked("A limit of 5 seconds.", ["A limit of 5 seconds"]) == []
    [problem] = prose.unmarked("No limit.", ["A limit of 5 seconds"])
    assert "what is not there: A limit of 5 seconds" in problem


def test_every_phrase_is_of_a_document_and_every_note_is_used(prose):
    """Nothing is allowed or noted down for a text that is gone."""
    texts = {path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    groups = yaml.safe_load((ROOT / "docs" / "unmarked.yaml").read_text())
    assert all(group["why"] and set(group["phrases"]) <= set(texts) for group in groups)
    notes = json.loads((ROOT / "docs" / "results" / "notes.json").read_text())["notes"]
    by_table = {note["name"] for note in notes if note["name"].startswith("busy-")}
    marked = set(re.findall(r"<!-- figure notes\.([a-z0-9-]+)", "".join(texts.values())))
    assert {note["name"] for note in notes} == marked | by_table
    assert all(set(note) - {"to"} == {"name", "figure", "unit", "what", "how", "device", "date"} for note in notes)


@PAGES
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target
