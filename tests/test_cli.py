"""The command line, called as a function: output, JSON, exit codes, one clear message for each mistake."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, ViTConfig

from corelora import CoreLoraConfig, __version__
from corelora.cli import COMMANDS, main
from corelora.commands.methods import formula
from corelora.commands.output import table
from corelora.errors import CoreLoraError
from corelora.registry import METHODS
from processes import CORELORA

SMALL = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TRAINED_R4 = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))  # LoRA of rank 4 on the seven linear layers


@pytest.fixture
def base(tmp_path):
    """A saved tiny model."""
    LlamaForCausalLM(SMALL).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    """A saved NLoRA adapter that does something, on the model of `base`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(
        model, CoreLoraConfig(method="nlora", r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# -- the frame ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_for_each(command, capsys):
    """Exit code 0, and each option explained."""
    with pytest.raises(SystemExit) as left:
        main([command, "--help"] if command else ["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    if command is None:
        assert all(name in out for name in COMMANDS)
    else:
        assert "--json" in out
        assert "--debug" in out


def test_version_and_nothing(capsys):
    """`--version` says which; no command at all is a mistake, answered with the help."""
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out
    assert main([]) == 2
    assert "methods" in capsys.readouterr().out


def test_unknown_command_names_the_nearest(capsys):
    """On standard error, with exit code 2."""
    assert main(["plam", "llama"]) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "unknown command 'plam'. Did you mean 'plan'?" in seen.err


@pytest.mark.slow
def test_as_a_process(tmp_path, driver):
    """The exit code reaches the shell, and a mistake has no traceback."""
    done = driver.call(*CORELORA, "export", tmp_path / "none", tmp_path / "out")
    assert done.returncode == 2
    assert "corelora export:" in done.stderr
    assert "holds no adapter" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["methods", "norra"], "Did you mean 'nora'?"),
        (["plan", "llama", "--method", "norra"], "unknown method 'norra'"),
        (["plan", "./nothing.json"], "there is no such file or folder"),
        (["plan", "llama", "--set", "sampling"], "--set takes KEY=VALUE"),
        (["plan", "llama", "--no-memory", "--set", "samplin=random"], "use 'sampling'"),
        (["plan", "llama", "--set", "sampling=[a"], "--set takes KEY=VALUE with a value in YAML"),
        (["plan", "llama", "--set", "r=3"], "'r' has its own option (--r)"),
        (["plan", "llama", "--set", "method=lora", "--set", "inner_r=3"], "'inner_r' has its own option (--inner-r)"),
        (["plan", "llama", "--gpu", "0"], "gpu must be a size"),
        (["merge", "nothing", "out"], "nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(words, message, capsys):
    """One message on standard error, nothing on standard output, exit code 2."""
    assert main(words) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert message in seen.err
    assert seen.err.startswith(f"corelora {words[0]}: ")


def test_debug_raises():
    """The error itself, for whoever looks for its cause."""
    with pytest.raises(CoreLoraError, match="norra"):
        main(["methods", "norra", "--debug"])


def test_table_aligns():
    """Names left, numbers right."""
    lines = table(["name", "n"], [["a", "1"], ["bcdef", "10"]]).splitlines()
    assert lines == ["name    n", "-----  --", "a       1", "bcdef  10"]


# -- methods -----------------------------------------------------------------------------------------------------


def test_methods_lists_every_registered_one(capsys):
    """One row a method, and where to go next."""
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2 : 2 + len(METHODS)]] == sorted(METHODS)
    assert "Next:" in out


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_shows_one(name, capsys):
    """The docstring of its file, its choices, what it trains."""
    assert main(["methods", name]) == 0
    out = capsys.readouterr().out
    module = sys.modules[f"corelora.methods.{name}"]
    assert module.__doc__.splitlines()[0] in out
    assert "singular_values" in out
    assert formula(METHODS[name].default) in out


def test_methods_json(capsys):
    """Counts on a 4096 x 4096 layer with r = 128, k = 64, worked out here."""
    assert main(["methods", "--json"]) == 0
    found = {m["name"]: m["trained_on_reference_layer"] for m in json.loads(capsys.readouterr().out)}
    both, core = 2 * 128 * 4096, 128 * 128
    expected = {"lora": both, "slora": both + core, "nlora": both + core, "inttune": core, "nora": 2 * 64 * 128}
    assert {name: found[name] for name in expected} == expected
    assert found["lora_fa"] == 128 * 4096
    assert main(["methods", "nora", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["published"]["core_start"] == "gaussian"
    assert one["settings"]["inner_r"] == 32
    assert one["trains"] == "k*r + r*k"


# -- plan --------------------------------------------------------------------------------------------------------


def test_plan_prints_what_it_counts(base, capsys):
    """Parameters, files, memory, whether it fits."""
    assert main(["plan", str(base), "--method", "lora,nora", "--r", "4", "--length", "16"]) == 0
    out = capsys.readouterr().out
    assert f"{TRAINED_R4:,}" in out
    assert "14 adapted modules" in out
    assert "fits 24 GiB" in out
    assert "Next:" in out


def test_plan_json(base, capsys):
    """The same as data; NoRA's file with and without its outer factors."""
    words = ["plan", str(base / "config.json"), "--method", "lora,nora", "--r", "4", "--inner-r", "2", "--batch", "2"]
    assert main([*words, "--length", "16", "--json"]) == 0
    plans = {p["method"]: p for p in json.loads(capsys.readouterr().out)["plans"]}
    assert plans["lora"]["trained"] == TRAINED_R4
    assert plans["nora"]["trained"] == 14 * 2 * 2 * 4
    assert plans["nora"]["file_bytes_small"] < plans["nora"]["file_bytes_native"]
    assert plans["lora"]["memory"]["peak"] > plans["lora"]["memory"]["weights"]
    assert plans["lora"]["fits"] is True


def test_plan_takes_settings_and_targets(base, capsys):
    """`--set` and `--target` reach the config."""
    words = ["plan", str(base), "--method", "inttune", "--no-memory", "--json", "--r", "4"]
    assert main([*words, "--target", "q_proj", "--set", "sampling=random", "--set", "layers_to_transform=[0]"]) == 0
    plan = json.loads(capsys.readouterr().out)["plans"][0]
    assert (plan["modules"], plan["trained"], plan["memory"]) == (1, 16, None)


def test_plan_says_what_does_not_fit(base, capsys):
    """A rank that is too large is a method's problem, not the end; where no method is left it is the user's."""
    words = ["plan", str(base), "--r", "40", "--no-memory"]
    assert main([*words, "--method", "lora,nlora"]) == 0
    seen = capsys.readouterr()
    assert "The largest r that fits all is 16" in seen.err
    assert seen.err.startswith("nlora: ")
    assert "lora" in seen.out
    assert "nlora" not in seen.out
    assert main([*words, "--method", "nlora,inttune", "--json"]) == 2
    seen = capsys.readouterr()
    assert seen.err.startswith("corelora plan: nlora, inttune: ")  # one line for the mistake of both
    assert seen.err.count("The largest r that fits all is 16") == 1
    assert seen.out == ""


def test_plan_names_the_tokens_it_counted(tmp_path, capsys):
    """A length is cut to the model's positions, and the output says so; images have no tokens."""
    short = LlamaConfig(**{**SMALL.to_diff_dict(), "max_position_embeddings": 32})
    short.save_pretrained(tmp_path / "short")
    words = ["--method", "lora", "--r", "4", "--batch", "1"]
    assert main(["plan", str(tmp_path / "short"), *words, "--length", "1000"]) == 0
    assert "1 x 32 tokens" in capsys.readouterr().out
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    ViTConfig(**sizes, image_size=32, patch_size=16).save_pretrained(tmp_path / "images")
    assert main(["plan", str(tmp_path / "images"), *words]) == 0
    out = capsys.readouterr().out
    assert "batch 1, adamw" in out
    assert " tokens," not in out


def test_plan_that_fits_nothing_says_what_to_try(base, capsys):
    """No method is recommended that does not fit."""
    assert main(["plan", str(base), "--method", "lora", "--r", "4", "--gpu", "0.5", "--length", "8"]) == 0
    out = capsys.readouterr().out
    assert "Next: nothing fits. Try --checkpointing" in out
    assert "CoreLoraConfig(" not in out


def test_plan_of_all_methods(base, capsys):
    """`--method all` plans whatever is registered."""
    assert main(["plan", str(base), "--method", "all", "--r", "4", "--no-memory", "--json"]) == 0
    assert [p["method"] for p in json.loads(capsys.readouterr().out)["plans"]] == sorted(METHODS)


# -- export and merge --------------------------------------------------------------------------------------------


def test_export_gives_the_same_logits(base, adapter, tmp_path, capsys):
    """The plain LoRA that the command writes, against the adapter; rank and size are printed."""
    out = tmp_path / "plain"
    assert main(["export", str(adapter), str(out), "--for", "peft"]) == 0
    assert "rank 8" in capsys.readouterr().out  # twice r: the start is subtracted and A, core and B are trained
    ids = torch.arange(12)[None]
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    bare = AutoModelForCausalLM.from_pretrained(base).eval()
    assert (ours(ids).logits - plain(ids).logits).abs().max() < 1e-4
    assert (ours(ids).logits - bare(ids).logits).abs().max() > 1e-2


def test_a_base_that_is_gone_is_named(base, adapter, tmp_path, capsys):
    """The adapter's base has moved: the message names it and the option; with `--base` the export works."""
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace(json.dumps(str(base)), json.dumps(str(tmp_path / "moved"))))
    assert main(["export", str(adapter), str(tmp_path / "plain")]) == 2
    err = capsys.readouterr().err
    assert f"the base model '{tmp_path / 'moved'}' can't be loaded" in err
    assert "--base" in err
    assert not (tmp_path / "plain").exists()
    assert main(["export", str(adapter), str(tmp_path / "plain"), "--base", str(base)]) == 0


def test_merge_gives_the_same_logits(base, adapter, tmp_path, capsys):
    """The merged model loads without an adapter."""
    out = tmp_path / "merged"
    assert main(["merge", str(adapter), str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(out)
    ids = torch.arange(12)[None]
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    assert (ours(ids).logits - merged(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("command", ["export", "merge"])
def test_a_run_folder_stands_for_its_adapter(adapter, tmp_path, command, capsys):
    """What `corelora train` leaves can be given as it is."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(adapter, run / "adapter")
    assert main([command, str(run), str(tmp_path / "out")]) == 0


def test_export_json_and_a_folder_in_the_way(adapter, tmp_path, capsys):
    """A second export into the same folder is refused, and `--overwrite` is how to mean it."""
    words = ["export", str(adapter), str(tmp_path / "plain"), "--rank", "4", "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rank"] >= 4
    assert report["truncation"] > 0
    assert main(words) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
