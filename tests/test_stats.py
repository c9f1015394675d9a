"""Input statistics: exact against a plain computation, under padding, on every layer kind, and as files."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import BartConfig, BartModel, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from corelora import CoreLoraConfig, InputStats, collect_stats
from corelora.errors import CoreLoraError


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()


def inputs_of(model: nn.Module, names: list[str], *calls) -> dict[str, list[torch.Tensor]]:
    """What layers see in plain calls of the model, recorded by hooks of the test's own."""
    seen: dict[str, list[torch.Tensor]] = {n: [] for n in names}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, args, n=n: seen[n].append(args[0].detach()))
        for n in names
    ]
    with torch.no_grad():
        for call in calls:
            model(**call)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_tokens_do_not_count(side):
    """Padding on either side gives the means of the sentences alone, each run without padding."""
    model = llama()
    rows = [torch.randint(0, 32, (n,)) for n in (7, 3, 5)]
    ids, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for k, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(7 - len(row), 7)
        ids[k, where], mask[k, where] = row, 1
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)  # as generation does; else left padding shifts rotary positions
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
    found = collect_stats(model, [batch], progress=False)
    names = [n for n in found.mean_abs if n != "model.embed_tokens"]
    assert len(names) == 2 * 7 + 1
    alone = inputs_of(model, names, *({"input_ids": row[None]} for row in rows))
    for name in names:
        tokens = torch.cat([x.reshape(-1, x.shape[-1]) for x in alone[name]])
        torch.testing.assert_close(found.mean_abs[name], tokens.abs().mean(dim=0), rtol=2e-5, atol=1e-6)
        assert found.tokens[name] == 15 == len(tokens)


def test_many_batches_are_one_stream():
    """The mean over all tokens, not over batches; a generator is consumed one batch at a time and none is kept."""
    model = nn.Sequential(nn.Linear(6, 4))
    kept, seen = [], []

    def batches():
        for n in (1, 9, 4):
            x = torch.randn(n, 6)
            kept.append(x.clone())
            seen.append(weakref.ref(x))
            yield x
            del x
            gc.collect()
            assert len([r for r in seen if r() is not None]) <= 1

    stats = collect_stats(model, batches(), progress=False)
    torch.testing.assert_close(stats.mean_abs["0"], torch.cat(kept).abs().mean(dim=0))
    assert stats.tokens["0"] == 14


def test_a_long_stream_keeps_its_digits():
    """Sums run in float64: 4,000 batches of the same numbers have the mean of one."""
    x = torch.full((3, 2), 0.1)
    stats = collect_stats(nn.Sequential(nn.Linear(2, 2)), (x for _ in range(4000)), progress=False)
    torch.testing.assert_close(stats.mean_abs["0"], torch.full((2,), 0.1), rtol=1e-7, atol=0)


def test_encoder_decoder_masks():
    """Encoder layers count the encoder's mask, decoder layers the decoder's, cross-attention keys the encoder's."""
    torch.manual_seed(0)
    model = BartModel(
        BartConfig(
            vocab_size=20,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=12,
            decoder_ffn_dim=12,
            max_position_embeddings=16,
        )
    ).eval()
    ids, decoder_ids = torch.randint(4, 20, (2, 5)), torch.randint(4, 20, (2, 3))
    mask, decoder_mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }
    stats = collect_stats(model, [batch], progress=False)
    for name, expected_mask in (
        ("encoder.layers.0.fc1", mask),
        ("decoder.layers.0.fc1", decoder_mask),
        ("decoder.layers.0.encoder_attn.k_proj", mask),
        ("decoder.layers.0.encoder_attn.q_proj", decoder_mask),
    ):
        x = inputs_of(model, [name], batch)[name][0]
        expected = x[expected_mask.bool()].abs().mean(dim=0)
        torch.testing.assert_close(stats.mean_abs[name], expected, msg=name)
        assert stats.tokens[name] == int(expected_mask.sum())


def test_encoder_with_equal_lengths_of_encoder_and_decoder():
    """Where both masks fit by shape, a cross-attention's keys still follow the encoder's."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=20,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_position_embeddings=16,
    )
    model = BartModel(config).eval()
    mask, decoder_mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    ids, decoder_ids = torch.randint(4, 20, (2, 4)), torch.randint(4, 20, (2, 4))
    stats = collect_stats(
        model,
        [
            {
                "input_ids": ids,
                "attention_mask": mask,
                "decoder_input_ids": decoder_ids,
                "decoder_attention_mask": decoder_mask,
            }
        ],
        progress=False,
    )
    assert stats.tokens["decoder.layers.0.encoder_attn.k_proj"] == 4
    assert stats.tokens["decoder.layers.0.encoder_attn.q_proj"] == 6
    assert stats.tokens["decoder.layers.0.fc1"] == 6
    assert stats.tokens["encoder.layers.0.fc1"] == 4


def test_embedding_is_the_frequency_of_tokens():
    """|x_j| of a one-hot input, averaged: how often token j came, padding left out."""
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    ids, mask = torch.tensor([[1, 2, 2, 0], [5, 2, 0, 0]]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    stats = collect_stats(model, [{"input_ids": ids, "attention_mask": mask}], "word_embeddings", progress=False)
    expected = torch.tensor([0, 1, 3, 0, 0, 1, 0, 0, 0]) / 5
    torch.testing.assert_close(stats.mean_abs["embeddings.word_embeddings"], expected)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Conv2d(4, 4, 3, groups=4, padding=2, dilation=2),
    ],
    ids=["strided", "grouped", "1x1", "depthwise_dilated"],
)
def test_convolution_counts_kernel_columns(conv):
    """One number a kernel column: what that entry of the kernel is multiplied with, over all positions and groups."""
    x = torch.randn(2, 4, 7, 6)
    stats = collect_stats(nn.Sequential(conv), [x], progress=False)
    columns = F.unfold(x.abs(), conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # [n, c*k*k, positions]
    per_group = columns.reshape(2, conv.groups, -1, columns.shape[-1])
    torch.testing.assert_close(stats.mean_abs["0"], per_group.mean(dim=(0, 1, 3)))


def test_conv1d_of_gpt2_is_a_linear_layer():
    """Its i is the input's side, whichever way the weight is stored."""
    x = torch.randn(5, 7)
    torch.testing.assert_close(
        collect_stats(nn.Sequential(Conv1D(4, 7)), [x], progress=False).mean_abs["0"], x.abs().mean(dim=0)
    )


def test_a_model_spread_over_devices():
    """Sums stay where their layer is; the result is on the CPU. The meta device stands in for a second one."""

    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2, device="meta")

        def forward(self, x):
            return self.second(self.first(x).to("meta"))

    x = torch.randn(5, 4)
    stats = collect_stats(Spread(), [x], "first", progress=False)
    torch.testing.assert_close(stats.mean_abs["first"], x.abs().mean(dim=0))


def test_a_mask_on_another_device_than_the_layer():
    """A mask follows the layer's input: the lookup asks the input where it is."""
    from corelora.stats import _mask_for

    mask = _mask_for(torch.empty(2, 3, 4, device="meta"), {"attention_mask": torch.ones(2, 3)}, decodes=False)
    assert mask is not None
    assert mask.device.type == "meta"


def test_save_and_load(tmp_path):
    """A round trip keeps numbers, names, counts, samples and the fingerprint; the file is plain safetensors."""
    stats = collect_stats(llama(), [{"input_ids": torch.randint(0, 32, (2, 6))}], progress=False)
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    loaded = InputStats.load(path)
    assert loaded.tokens == stats.tokens
    assert loaded.mean_abs.keys() == stats.mean_abs.keys()
    assert all(torch.equal(loaded.mean_abs[n], stats.mean_abs[n]) for n in stats.mean_abs)
    assert loaded.samples.keys() == stats.samples.keys()
    assert loaded.fingerprint == stats.fingerprint


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    """Where writing breaks off, neither a broken file nor a temporary one stays, and an older file survives."""
    path = tmp_path / "stats.safetensors"
    InputStats({"layer": torch.ones(3)}, {"layer": 1}).save(path)

    def broken(tensors, name, metadata=None):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("corelora.measured.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        InputStats({"layer": torch.zeros(3)}).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors"]
    assert torch.equal(InputStats.load(path).mean_abs["layer"], torch.ones(3))


def test_files_that_are_no_statistics(tmp_path):
    """A missing, a truncated, and another safetensors file are each refused by name, with how to get statistics."""
    for make in ("missing", "truncated", "other"):
        path = tmp_path / f"{make}.safetensors"
        if make == "truncated":
            InputStats({"layer": torch.ones(300)}).save(path)
            path.write_bytes(path.read_bytes()[:-50])
        elif make == "other":
            save_file({"weight": torch.ones(2)}, path)
        with pytest.raises(CoreLoraError, match=rf"{make}\.safetensors.*collect_stats"):
            InputStats.load(path)


def test_errors():
    """No batch, no matching layer, only padding."""
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(CoreLoraError, match="no batch was given"):
        collect_stats(model, [], progress=False)
    with pytest.raises(CoreLoraError, match="match no layer"):
        collect_stats(model, [torch.ones(1, 4)], "q_proj", progress=False)
    with pytest.raises(CoreLoraError, match="are all tokens masked"):
        collect_stats(
            llama(), [{"input_ids": torch.zeros(1, 3).long(), "attention_mask": torch.zeros(1, 3)}], progress=False
        )


def test_the_model_is_left_as_it_was():
    """Training mode comes back, hooks go, gradients are not made; also where a batch is broken."""
    model = llama().train()
    collect_stats(model, [{"input_ids": torch.zeros(1, 3).long()}], progress=False)
    with pytest.raises(ValueError, match="input_ids"):
        collect_stats(model, [{"no_such_input": 1}], progress=False)
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def nora(stats, **settings) -> CoreLoraConfig:
    return CoreLoraConfig(method="nora", r=4, target_modules=["q_proj", "down_proj"], stats=stats, **settings)


def test_each_layer_gets_its_own_numbers(tmp_path):
    """d of the layer goes into its factors, from an object and from a path alike; the fingerprint is written."""
    stats = collect_stats(llama(), [{"input_ids": torch.randint(0, 32, (2, 9))}], progress=False)
    path = tmp_path / "s.safetensors"
    stats.save(path)
    models = [get_peft_model(llama(), nora(s)) for s in (stats, path, str(path))]
    name = "base_model.model.model.layers.1.mlp.down_proj"
    layers = [m.get_submodule(name) for m in models]
    starts = [layer.factors("default")["A"].start for layer in layers]
    assert all(torch.equal(s, starts[0]) for s in starts)
    d = stats.mean_abs["model.layers.1.mlp.down_proj"].sqrt()
    W = layers[0].get_base_layer().weight.detach()
    U, S, Vh = torch.linalg.svd(W * d, full_matrices=False)
    expected = (U[:, :4] * S[:4]) @ (Vh[:4] / d)
    found = layers[0].factors("default")["B"].start @ starts[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    for k, model in enumerate(models):
        folder = tmp_path / str(k)
        model.save_pretrained(folder)
        saved = json.loads((folder / "adapter_config.json").read_text())
        assert saved["stats_fingerprint"] == stats.fingerprint
        assert saved["stats"] is None  # loading never needs the statistics


def test_names_of_a_peft_model_are_the_plain_ones():
    """Collected on a model that has adapters, the statistics serve the plain model, and the other way round."""
    ids = [{"input_ids": torch.randint(0, 32, (2, 9))}]
    plain = collect_stats(llama(), ids, progress=False)
    wrapped = get_peft_model(llama(), CoreLoraConfig(method="lora", r=2, target_modules=["q_proj", "down_proj"]))
    on_peft = collect_stats(wrapped, ids, progress=False)
    assert on_peft.mean_abs.keys() == plain.mean_abs.keys()
    assert all(torch.equal(on_peft.mean_abs[n], plain.mean_abs[n]) for n in plain.mean_abs)
    get_peft_model(llama(), nora(on_peft))
    wrapped.add_adapter("second", nora(plain))


def test_statistics_that_do_not_serve_the_model():
    """Missing ones, other layers', another model's (by shape and by weight), NaN: each said, with the layer's name."""
    ids = [{"input_ids": torch.randint(0, 32, (2, 9))}]
    stats = collect_stats(llama(), ids, progress=False)
    with pytest.raises(CoreLoraError, match=r"needs input statistics: collect them with .*collect_stats\(model, batch"):
        get_peft_model(llama(), nora(None))
    with pytest.raises(CoreLoraError, match=r"other layers: nothing for model\.layers\.0\.self_attn\.q_proj"):
        get_peft_model(llama(), nora(InputStats({"other": torch.ones(16)})))
    short = InputStats({n: t[:-1] for n, t in stats.mean_abs.items()})
    with pytest.raises(CoreLoraError, match=r"of another model: \(15,\) numbers for 16 channels"):
        get_peft_model(llama(), nora(short))
    torch.manual_seed(77)
    other = LlamaForCausalLM(llama().config)
    with pytest.raises(CoreLoraError, match="collected on another model"):
        get_peft_model(other, nora(stats))
    stats.mean_abs["model.layers.1.mlp.down_proj"][0] = float("nan")
    with pytest.raises(CoreLoraError, match=r"layers\.1\.mlp\.down_proj: the statistics hold NaN"):
        get_peft_model(llama(), nora(stats))
