"""Gradient statistics: against autograd's own gradients and their exact SVD, on every layer kind, and as files."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import corelora.gradients
from corelora import CoreLoraConfig, GradientStats, InputStats, collect_gradients, export_lora
from corelora.errors import CoreLoraError
from corelora.layers import view_of
from laws.cases import KINDS, ODD_KINDS, base_model, batch
from test_stats import llama

IDS = torch.arange(18).view(2, 9) % 32
TARGETS = ["q_proj", "down_proj"]


def rows(count: int = 3) -> list[dict[str, Tensor]]:
    torch.manual_seed(5)
    return [{"input_ids": ids, "labels": ids} for ids in (torch.randint(0, 32, (2, 9)) for _ in range(count))]


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def autograd_gradients(model: nn.Module, batches, loss) -> dict[str, Tensor]:
    """The mean gradient of each layer's weight as W[o,i], by plain backward passes."""
    model = model.eval().requires_grad_(True)
    for one in batches:
        loss(model, one).backward()
    found = {}
    for name, layer in model.named_modules():
        view = view_of(layer)
        if view is not None and layer.weight.grad is not None:
            found[name] = view.matrix(layer.weight.grad) / len(batches)
    return found


def product(stats: GradientStats, name: str) -> Tensor:
    return stats.left[name] * stats.singular[name] @ stats.right[name]


@pytest.mark.parametrize("kind", KINDS | ODD_KINDS)
def test_all_triplets_are_the_gradient(kind):
    """With as many triplets as there are, U S Vh is autograd's gradient."""
    model, x = base_model(kind), batch(kind)
    wanted = autograd_gradients(base_model(kind), [x], squares)["layer"]
    found = collect_gradients(model, [x], 99, ["layer"], loss=squares, progress=False)
    assert found.names == {"layer"}
    torch.testing.assert_close(product(found, "layer"), wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))


def test_a_language_model():
    """Every layer's top triplets over several batches of unequal lengths, against the exact SVD of the exact mean."""
    wanted = autograd_gradients(llama(), rows(), lambda m, b: m(**b).loss)
    found = collect_gradients(llama(), rows(), 3, progress=False)
    assert found.names == set(wanted) - {"model.embed_tokens", "lm_head"}
    assert len(found.names) == 14
    assert found.batches == 3
    for name in found.names:
        U, S, Vh = torch.linalg.svd(wanted[name], full_matrices=False)
        torch.testing.assert_close(found.singular[name], S[:3], rtol=1e-4, atol=1e-8)
        best = (U[:, :3] * S[:3]) @ Vh[:3]
        torch.testing.assert_close(product(found, name), best, rtol=0, atol=2e-4 * float(S[0]))


class Wide(nn.Module):
    """A layer whose gradient is sketched: 192 x 160, of which a few directions matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(160, 192)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def steep(count: int) -> list[Tensor]:
    """Batches[64, 160] whose directions shrink like 0.7^j."""
    torch.manual_seed(1)
    return [torch.randn(64, 160) * 0.7 ** torch.arange(160) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sketch_has_nearly_the_best_directions(dtype, monkeypatch):
    """Four directions from sketches of 24 and 49: they keep 99 % of what the exact ones keep, in bfloat16 too."""
    monkeypatch.setattr(corelora.gradients, "EXACT", 0)
    batches = [x.to(dtype) for x in steep(4)]
    G = autograd_gradients(Wide(), steep(4), squares)["layer"]
    model = Wide().to(dtype)
    found = collect_gradients(model, batches, 4, loss=squares, progress=False)
    U, S, Vh = found.left["layer"], found.singular["layer"], found.right["layer"]
    best = torch.linalg.svdvals(G)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(U.T @ U, torch.eye(4), **close)
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(4), **close)
    assert float((U.T @ G).norm() / best[:4].norm()) > 0.99
    assert float((G @ Vh.T).norm() / best[:4].norm()) > 0.99
    torch.testing.assert_close(S, best[:4], rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("layer", "x", "rank"),
    [
        (nn.Linear(96, 80), torch.randn(5, 96), 3),
        (nn.Conv2d(16, 64, 3), torch.randn(1, 16, 4, 4), 2),
        (nn.Embedding(96, 80), torch.arange(5)[None], 3),
    ],
    ids=["linear", "conv", "embedding"],
)
def test_a_sketch_of_a_gradient_of_few_tokens_is_exact(layer, x, rank, monkeypatch):
    """Fewer directions than the sketch has: they come back to rounding, several batches added up."""
    monkeypatch.setattr(corelora.gradients, "EXACT", 0)
    assert not corelora.gradients._Sum(view_of(layer), rank, 0).is_whole
    net, batches = nn.Sequential(layer), [x, x]
    U, S, Vh = torch.linalg.svd(autograd_gradients(net, batches, squares)["0"], full_matrices=False)
    net.zero_grad()
    found = collect_gradients(net, batches, rank, ["0"], loss=squares, progress=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    torch.testing.assert_close(product(found, "0"), best, rtol=0, atol=2e-5 * float(S[0]))


def test_a_sketch_is_smaller_than_the_gradient():
    """What is held for a large layer: (o + k) and (l + i) thin matrices, not o x i."""
    large = corelora.gradients._Sum(view_of(nn.Linear(4096, 2048, device="meta")), 16, 0)
    assert not large.is_whole
    assert (large.omega.shape, large.psi.shape) == ((4096, 48), (97, 2048))
    assert corelora.gradients._Sum(view_of(nn.Linear(64, 64)), 16, 0).is_whole


def test_the_same_seed_gives_the_same_numbers(monkeypatch):
    """Bit for bit; another seed draws other sketches."""
    monkeypatch.setattr(corelora.gradients, "EXACT", 0)
    first, again, other = (
        collect_gradients(Wide(), steep(2), 4, loss=squares, seed=seed, progress=False) for seed in (0, 0, 1)
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_the_model_is_left_as_it_was():
    """Modes, flags, hooks and gradients; also where a batch is broken, and inside no_grad."""
    model = llama().train()
    model.lm_head.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        collect_gradients(model, rows(), 2, TARGETS, progress=False)
    with pytest.raises(ValueError, match="input_ids"):
        collect_gradients(model, [{"no_such_input": 1}], 2, progress=False)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == flags[name]
        assert torch.equal(parameter, before[name])


def test_what_follows_a_layer_may_change_its_output_in_place():
    """As convolutional nets do: nothing learns before the first layer, whose output must not become a plain leaf."""
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 4), nn.ReLU(inplace=True))
    wanted = autograd_gradients(net, [torch.ones(3, 5)], squares)
    net.zero_grad()
    found = collect_gradients(net, [torch.ones(3, 5)], 6, loss=squares, progress=False)
    for name in ("0", "2"):
        torch.testing.assert_close(product(found, name), wanted[name], rtol=1e-4, atol=1e-7)


def test_errors():
    """No batch, no match, no loss, masked labels, NaN, a rank of nothing."""
    model = llama()
    with pytest.raises(CoreLoraError, match="small gradients are lost in float16"):
        collect_gradients(llama().half(), rows(1), 2, progress=False)
    masked = {"input_ids": IDS, "labels": torch.full_like(IDS, -100)}
    for batches, settings, message in (
        ([], {}, "no batch was given"),
        (rows(1), {"target_modules": ["dense"]}, "match no layer"),
        ([{"input_ids": IDS}], {}, "the model gives no loss: put `labels`"),
        ([masked], {}, "the loss of batch 1 is nan"),
        (rows(1), {"loss": lambda m, b: m(**b).loss * 0}, "no layer got a gradient"),
        (rows(1), {"loss": lambda m, b: (m(**b).logits * 0).sum().sqrt()}, "the gradient of .* is not finite"),
        (rows(1), {"rank": 0}, "rank must be at least 1, got 0"),
    ):
        with pytest.raises(CoreLoraError, match=message):
            collect_gradients(model, batches, **{"rank": 2, "progress": False} | settings)


def test_save_and_load(tmp_path):
    """A round trip keeps all numbers; files of another kind are refused by name."""
    stats = collect_gradients(llama(), rows(1), 3, TARGETS, progress=False)
    stats.save(tmp_path / "g.safetensors")
    loaded = GradientStats.load(tmp_path / "g.safetensors")
    assert loaded.fingerprint == stats.fingerprint
    assert loaded.batches == 1
    assert loaded.samples.keys() == stats.samples.keys() == stats.names
    InputStats({"layer": torch.ones(3)}, {"layer": 1}).save(tmp_path / "i.safetensors")
    with pytest.raises(CoreLoraError, match=r"not a file of gradient statistics; collect .*collect_gradients"):
        GradientStats.load(tmp_path / "i.safetensors")
    with pytest.raises(CoreLoraError, match="not a file of input statistics"):
        InputStats.load(tmp_path / "g.safetensors")


# -- in adapters ---------------------------------------------------------------------------------------------------


def config(method: str, stats, **settings) -> CoreLoraConfig:
    return CoreLoraConfig(**{"method": method, "r": 4, "target_modules": TARGETS, "stats": stats} | settings)


def layer_of(model: nn.Module, name: str = "model.layers.1.mlp.down_proj"):
    return model.get_submodule(f"base_model.model.{name}")


def test_lora_sb_is_between_the_first_directions():
    """A and B are the gradient's singular vectors, frozen; the core begins at zero, and a step of it pays."""
    G = autograd_gradients(llama(), rows(), lambda m, b: m(**b).loss)["model.layers.1.mlp.down_proj"]
    model = get_peft_model(llama(), config("lora_sb", collect_gradients(llama(), rows(), 4, TARGETS, progress=False)))
    factors = layer_of(model).factors("default")
    A, B = factors["A"].start, factors["B"].start
    S = torch.linalg.svdvals(G)[:4]
    torch.testing.assert_close(B.T @ G @ A.T, torch.diag(S), rtol=1e-3, atol=1e-4 * float(S[0]))
    trained = [(n, p.shape) for n, p in model.named_parameters() if p.requires_grad]
    assert all("corelora_core." in n and shape == (4, 4) for n, shape in trained)
    assert len(trained) == 4
    first = model(**rows()[0]).loss
    first.backward()
    for p in model.parameters():
        if p.requires_grad:
            p.data -= 0.5 * p.grad
    assert model(**rows()[0]).loss < first


def test_lora_ga_takes_the_next_left_directions():
    """A from the first r right singular vectors, B from the next r left ones, both o^(1/4) / 4 long; both learn."""
    stats = collect_gradients(llama(), rows(), 8, TARGETS, progress=False)
    model = get_peft_model(llama(), config("lora_ga", stats))
    name = "model.layers.1.mlp.down_proj"
    factors = layer_of(model).factors("default")
    size = 16**0.25 / 4
    torch.testing.assert_close(factors["A"].start, size * stats.right[name][:4])
    torch.testing.assert_close(factors["B"].start, size * stats.left[name][:, 4:])
    assert factors["A"].plan.trained
    assert factors["B"].plan.trained
    assert torch.equal(model(input_ids=IDS).logits, llama()(input_ids=IDS).logits)


@pytest.mark.parametrize("method", ["lora_sb", "lora_ga"])
def test_saved_exported_and_merged(method, tmp_path):
    """A load needs no gradients: the file has A and B. The export and the merged model are the same function."""
    stats = collect_gradients(llama(), rows(), 8, TARGETS, progress=False)
    stats.save(tmp_path / "s.safetensors")
    model = get_peft_model(llama(), config(method, str(tmp_path / "s.safetensors"))).eval()
    torch.manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["stats_fingerprint"] == stats.fingerprint
    assert saved["stats"] is None
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()(input_ids=IDS).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, llama()(input_ids=IDS).logits)
    export_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(llama(), tmp_path / "plain").eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)


def test_statistics_that_do_not_serve():
    """Missing, of another kind, too few triplets, other layers, another model's shapes: each said by name."""
    few = collect_gradients(llama(), rows(1), 4, ["q_proj"], progress=False)
    inputs = InputStats({"layer": torch.ones(3)})
    for method, stats, targets, message in (
        ("lora_sb", None, TARGETS, r"\(outer 'gradient'\) needs gradient statistics: collect them with .*gradients"),
        ("lora_sb", inputs, TARGETS, "needs gradient statistics, not input statistics: collect"),
        ("nora", few, ["q_proj"], "needs input statistics, not gradient statistics: collect"),
        ("lora_sb", few, TARGETS, r"nothing for model\.layers\.0\.mlp\.down_proj"),
        ("lora_ga", few, ["q_proj"], r"4 triplets of its gradient for 8, collect them with rank=8"),
    ):
        with pytest.raises(CoreLoraError, match=message):
            get_peft_model(llama(), config(method, stats, target_modules=targets))
    few.left["model.layers.0.self_attn.q_proj"] = torch.ones(3, 4)
    with pytest.raises(CoreLoraError, match=r"q_proj: .*another model: a gradient \[3, 16\] for a weight \[16, 16\]"):
        get_peft_model(llama(), config("lora_sb", few, target_modules=["q_proj"]))


def test_factors_must_be_stored():
    """Nothing could make them again at load."""
    with pytest.raises(CoreLoraError, match="store_outer can't be False: the outer factors of 'gradient'"):
        config("lora_sb", "weight", store_outer=False)
