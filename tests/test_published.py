"""Each method's `published` variant against its paper's formulas, written out here in float64 with plain PyTorch.

The NLoRA paper writes W[m,n] with m inputs; its A, N, B are our A, core, B, each transposed. Here all is W[o,i].
"""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from corelora import CoreLoraConfig, InputStats, collect_stats
from corelora.errors import CoreLoraError

OUT, IN, R, K = 12, 10, 4, 2
TOLERANCE = 2e-6  # float32 against float64, relative to the largest number


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(method: str, variant: str = "published", **settings):
    """A one-layer model with the method on it, the tuner layer, W in float64."""
    net = Net()
    W = net.layer.weight.detach().double().clone()
    conf = CoreLoraConfig(
        method=method, variant=variant, target_modules=["layer"], **({"r": R, "inner_r": K} | settings)
    )
    torch.manual_seed(3)
    model = get_peft_model(net, conf).eval()
    return model, model.base_model.model.layer, W


def value(layer, slot: str) -> Tensor:
    """A trained or held factor as it stands."""
    factor = layer.factors("default")[slot]
    parts = [t for t in (factor.start, factor.weight) if t is not None]
    return sum(p.detach().double() for p in parts)  # type: ignore[return-value]


def part(layer, x: Tensor) -> Tensor:
    """What the adapter adds to the base output."""
    with torch.no_grad():
        return layer.adapter_output("default", x).double()


def near(found: Tensor, expected: Tensor, size: float | None = None) -> None:
    size = float(expected.abs().max()) if size is None else size
    assert float((found.double() - expected).abs().max()) <= TOLERANCE * size


X = torch.randn(6, IN, generator=torch.Generator().manual_seed(2))


def test_nlora_starts_from_the_leading_rows_columns_and_block():
    """Section 3: A = W[I,:], N = W[I,J], B = W[:,J], leading I and J; the product is added as it stands."""
    _, layer, W = adapted("nlora")
    I = J = torch.arange(R)  # noqa: E741
    near(value(layer, "A"), W[I, :])
    near(value(layer, "core"), W[I][:, J])
    near(value(layer, "B"), W[:, J])
    near(part(layer, X), X.double() @ (W[:, J] @ W[I][:, J] @ W[I, :]).T)
    assert all(f.plan.trained for f in layer.factors("default").values())


def test_nlora_with_the_pseudo_inverse_of_equation_6():
    """Eq. 6: W[:,J] W[I,J]^+ W[I,:], with no cut of small singular values under `published`."""
    _, layer, W = adapted("nlora", core_start="pinv")
    inverse = torch.linalg.pinv(W[:R, :R], rtol=0.0)
    found = value(layer, "core")
    near(found, inverse, float(inverse.abs().max()) * 10)
    # It inverts: the Nystrom approximation is exact on the sampled rows and columns.
    near(part(layer, X), X.double() @ (W[:, :R] @ inverse @ W[:R, :]).T, 50.0)


def test_pinv_cuts_small_singular_values_where_asked():
    """`pinv_rtol` in units of the largest singular value, as torch.linalg.pinv has it."""
    _, layer, W = adapted("nlora", core_start="pinv", pinv_rtol=0.3)
    inverse = torch.linalg.pinv(W[:R, :R], rtol=0.3)
    assert int(torch.linalg.matrix_rank(inverse)) < R
    near(value(layer, "core"), inverse)


def test_default_nlora_trains_the_same_start_as_offsets():
    """B core A - B0 A0, slices of norm 1 about the identity: zero at first, and with dA alone it is B0 dA."""
    _, layer, W = adapted("nlora", "default")
    assert not part(layer, X).any()
    dA = torch.randn(R, IN)
    layer.factors("default")["A"].weight.data = dA
    B0 = W[:, :R] / W[:, :R].norm(dim=0)
    near(part(layer, X), X.double() @ (B0 @ dA.double()).T)


def test_raw_slices_with_their_start_subtracted():
    """With dA alone it is B0 core0 dA, the core a block of W."""
    _, layer, W = adapted("nlora", "default", slice_scale="none", core_start="nystrom")
    assert not part(layer, X).any()
    dA = torch.randn(R, IN)
    layer.factors("default")["A"].weight.data = dA
    near(part(layer, X), X.double() @ (W[:, :R] @ W[:R, :R] @ dA.double()).T)


def test_inttune_trains_only_the_core_between_raw_slices():
    """Section 4.3: A and B frozen, the core starts as W[I,J], nothing is scaled or subtracted."""
    model, layer, W = adapted("inttune")
    near(value(layer, "core"), W[:R, :R])
    near(part(layer, X), X.double() @ (W[:, :R] @ W[:R, :R] @ W[:R, :]).T)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == R * R


def test_default_inttune_has_orthonormal_rows_and_columns():
    """Polar factors of the slices: of all orthonormal bases of the same spaces the nearest to W's rows and columns."""
    _, layer, W = adapted("inttune", "default")
    change = torch.randn(R, R)
    layer.factors("default")["core"].weight.data = change
    A, B = nearest_rows(W[:R]), nearest_rows(W[:, :R].T).T
    near(part(layer, X), X.double() @ (B @ change.double() @ A).T, 10.0)


def nearest_rows(rows):
    """The orthonormal rows that are nearest to the given ones."""
    U, _, Vh = torch.linalg.svd(rows.double(), full_matrices=False)
    return U @ Vh


def test_inttune_with_unit_slices_scales_rows_and_columns_to_norm_one():
    """A's rows and B's columns are unit vectors in the directions of W's."""
    _, layer, W = adapted("inttune", "default", slice_scale="unit")
    change = torch.randn(R, R)
    layer.factors("default")["core"].weight.data = change
    A = W[:R] / W[:R].norm(dim=1, keepdim=True)
    B = W[:, :R] / W[:, :R].norm(dim=0, keepdim=True)
    near(part(layer, X), X.double() @ (B @ change.double() @ A).T)


@pytest.mark.parametrize("scale", ["unit", "orthonormal"])
def test_scaled_slices_leave_the_starting_product_unchanged(scale):
    """The scalings go into core0: B0 core0 A0 is that of the raw slices."""
    _, layer, W = adapted("nlora", slice_scale=scale)
    A, B = value(layer, "A"), value(layer, "B")
    if scale == "orthonormal":
        near(A @ A.T, torch.eye(R).double(), 10.0)
        near(B.T @ B, torch.eye(R).double(), 10.0)
    near(A.norm(dim=1), torch.ones(R).double())
    near(B @ value(layer, "core") @ A, W[:, :R] @ W[:R, :R] @ W[:R, :], 10.0)


def test_a_nearly_singular_slice_in_bfloat16():
    """What rounding leaves of its transform would be longer than 1: weak directions stay weak."""
    n = 48
    torch.manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(n, n).double()).Q for _ in range(2))
    net = Net()
    net.layer = nn.Linear(n, n, bias=False, dtype=torch.bfloat16)
    net.layer.weight.data = ((left * torch.logspace(0, -6, n).double()) @ right).bfloat16()
    conf = CoreLoraConfig(method="inttune", slice_scale="orthonormal", r=n, target_modules=["layer"])
    layer = get_peft_model(net, conf, autocast_adapter_dtype=False).base_model.model.layer
    change = torch.linalg.qr(torch.randn(n, n)).Q.bfloat16()
    layer.factors("default")["core"].weight.data = change
    stretched = torch.linalg.svdvals(part(layer, torch.eye(n, dtype=torch.bfloat16)).double())
    assert 0.5 < stretched[0] < 1.3


def algorithm_1(W: Tensor, d: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(A, B) of the NoRA paper's Algorithm 1: SVD of W S; B = U_r Sigma_r, A = V_r^T S^-1."""
    U, sigma, Vh = torch.linalg.svd(W @ torch.diag(d), full_matrices=False)
    return Vh[:r] @ torch.diag(1 / d), U[:, :r] @ torch.diag(sigma[:r])


def same_up_to_signs(layer, A: Tensor, B: Tensor) -> None:
    """Singular vectors have no sign: compare each row of A after giving it the paper's sign, and B with it."""
    sign = torch.sign((value(layer, "A") * A).sum(dim=1))
    near(value(layer, "A") * sign[:, None], A, 10 * float(A.abs().max()))
    near(value(layer, "B") * sign, B, 10 * float(B.abs().max()))


def test_nora_by_algorithm_1_with_the_weights_own_means():
    """stats='weight': S = diag(mean over rows of |W|). Both inner factors Gaussian; nothing subtracted."""
    model, layer, W = adapted("nora", stats="weight")
    same_up_to_signs(layer, *algorithm_1(W, W.abs().mean(dim=0), R))
    product = value(layer, "B") @ value(layer, "core_b") @ value(layer, "core_a") @ value(layer, "A")
    near(part(layer, X), X.double() @ product.T)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * R * K


def test_nora_with_collected_statistics():
    """Eq. 3 to 6 as one number a channel: s_j = sqrt(mean over tokens of |x_j|); W S = U Sigma V^T."""
    batches = [torch.randn(5, 3, IN) * torch.linspace(0.1, 3, IN) for _ in range(3)]
    stats = collect_stats(Net(), batches, progress=False)
    tokens = torch.cat([b.reshape(-1, IN) for b in batches]).double()
    _, layer, W = adapted("nora", stats=stats)
    same_up_to_signs(layer, *algorithm_1(W, tokens.abs().mean(dim=0).sqrt(), R))


def test_nora_inner_factors_are_both_gaussian():
    """ "Gaussian N(0, sigma^2)" with sigma 1e-3 (the paper gives none), at a size where the deviation can be judged."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256))
    conf = CoreLoraConfig(method="nora", variant="published", r=128, inner_r=64, target_modules=["0"], stats="weight")
    layer = get_peft_model(net, conf).base_model.model[0]
    for slot in ("core_a", "core_b"):
        found = value(layer, slot)
        assert float(found.std()) == pytest.approx(1e-3, rel=0.05)  # 8,192 numbers: 4 sigma of the estimate is 3 %
        assert abs(float(found.mean())) < 5e-5
        kurtosis = float((found / found.std()).pow(4).mean())
        assert kurtosis == pytest.approx(3, abs=0.3)  # uniform would be 1.8


def test_default_nora_starts_with_a_zero_inner_b():
    """B' zero, A' Kaiming uniform: |A'| <= 1/sqrt(r)."""
    _, layer, _ = adapted("nora", "default", stats="weight")
    assert not value(layer, "core_b").any()
    assert 0.3 / R**0.5 < float(value(layer, "core_a").abs().max()) <= 1 / R**0.5


def test_the_best_approximation_under_the_scaling():
    """B A of AwSVD is the rank-r matrix nearest to W in the norm |(W - BA) S|: no other of that rank is nearer."""
    _, layer, W = adapted("nora", stats="weight")
    d = W.abs().mean(dim=0)
    sigma = torch.linalg.svdvals(W * d)
    error = ((W - value(layer, "B") @ value(layer, "A")) * d).norm()
    assert float(error) == pytest.approx(float(sigma[R:].norm()), rel=1e-4)


def test_slora_is_kaiming_gaussian_zero():
    """Eq. 7: A Kaiming uniform, core Gaussian with std 1/r, B zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 192))
    conf = CoreLoraConfig(method="slora", variant="published", r=96, target_modules=["0"])
    model = get_peft_model(net, conf)
    layer = model.base_model.model[0]
    A, core, B = (value(layer, s) for s in ("A", "core", "B"))
    assert float(A.abs().max()) == pytest.approx(1 / 16, rel=0.01)  # Kaiming, a = sqrt 5: bound 1/sqrt(256)
    assert float(A.std()) == pytest.approx(1 / 16 / 3**0.5, rel=0.03)
    assert float(core.std()) == pytest.approx(1 / 96, rel=0.05)
    assert not B.any()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 96 * (256 + 192 + 96)


def test_pissa_splits_the_singular_values_and_keeps_the_model():
    """Meng 2024, Eq. 2 to 4: A = sqrt(S) V^T, B = U sqrt(S); W - B A is the frozen residual, so the sum is W."""
    model, layer, W = adapted("pissa")
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    same_up_to_signs(layer, S[:R, None].sqrt() * Vh[:R], U[:, :R] * S[:R].sqrt())
    assert torch.equal(model(X), Net()(X))
    dB = torch.randn(OUT, R)
    layer.factors("default")["B"].weight.data = dB
    residual = W - U[:, :R] @ torch.diag(S[:R]) @ Vh[:R]
    expected = X.double() @ (residual + value(layer, "B") @ value(layer, "A")).T + Net().layer.bias.detach().double()
    near(model(X).detach(), expected)


def test_lora_xs_trains_a_small_core_between_singular_vectors():
    """Balazy 2024: A = V^T, B = U S, frozen; R Gaussian with std 1e-5, added as it stands."""
    model, layer, W = adapted("lora_xs")
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    same_up_to_signs(layer, Vh[:R], U[:, :R] * S[:R])
    assert 0 < float(value(layer, "core").abs().max()) < 1e-4
    near(part(layer, X), X.double() @ (value(layer, "B") @ value(layer, "core") @ value(layer, "A")).T)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == R * R


@pytest.mark.parametrize("where", ["left", "right", "split"])
def test_where_the_singular_values_go(where):
    """NoRA paper, Table 8; Table 7's presets w_a and w_b of a serial core are `left` and `right`."""
    _, layer, W = adapted("lora_xs", singular_values=where)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    U, S, Vh = U[:, :R], S[:R], Vh[:R]
    a, b = {"left": (0.0, 1.0), "right": (1.0, 0.0), "split": (0.5, 0.5)}[where]
    same_up_to_signs(layer, S[:, None] ** a * Vh, U * S**b)


def test_moslora_mixes_with_an_orthogonal_core():
    """Wu 2024: the mixer is orthogonal, B zero."""
    _, layer, _ = adapted("moslora")
    mixer = value(layer, "core")
    near(mixer @ mixer.T, torch.eye(R).double())
    assert not value(layer, "B").any()


def test_flora_has_a_zero_core_between_normal_factors():
    """Si 2024: the Tucker core begins at zero; both factors normal with std sqrt(1/2)/sqrt(r)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 192))
    layer = get_peft_model(net, CoreLoraConfig(method="flora", r=32, target_modules=["0"])).base_model.model[0]
    assert not value(layer, "core").any()
    for slot in ("A", "B"):
        assert float(value(layer, slot).std()) == pytest.approx((0.5 / 32) ** 0.5, rel=0.05)


@pytest.mark.parametrize("position", ["w_a", "both"])
@pytest.mark.parametrize("core", ["parallel_b", "parallel_a", "nested"])
def test_parallel_forms_and_positions(core, position):
    """NoRA paper, Eq. 8, dW = (B + C A') A, its mirror B (A + C A'), and both at once; nested twice in a row."""
    _, layer, _ = adapted("nora", stats="weight", core=core, position=position, core_std=0.3)
    A, B = value(layer, "A"), value(layer, "B")
    inner = value(layer, "core_b") @ value(layer, "core_a")
    second = value(layer, "core2_b") @ value(layer, "core2_a") if position == "both" else None
    if core == "nested":
        delta = B @ inner @ A if second is None else B @ second @ inner @ A
    elif second is not None:
        delta = (B + second) @ (A + inner)
    else:
        delta = (B + inner) @ A if core == "parallel_b" else B @ (A + inner)
    near(part(layer, X), X.double() @ delta.T)


def test_w_a_and_w_b_are_one_function_for_a_serial_core():
    """With a serial core the position alone changes nothing."""
    outputs = [part(adapted("nora", stats="weight", position=p)[1], X) for p in ("w_a", "w_b")]
    assert torch.equal(*outputs)


def test_the_dead_channel_of_awsvd_cannot_divide_by_zero():
    """A channel that no token ever lit gets a small part of the mean instead of zero."""
    d = torch.rand(IN) + 0.5
    d[3] = 0
    _, layer, _ = adapted("nora", stats=InputStats({"layer": d}))
    assert bool(value(layer, "A").isfinite().all())
    assert bool(part(layer, X).isfinite().all())
    with pytest.raises(CoreLoraError, match="not all zero"):
        adapted("nora", stats=InputStats({"layer": torch.zeros(IN)}))
