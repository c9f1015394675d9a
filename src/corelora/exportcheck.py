"""Load an export back with plain PEFT, on the same base, and compare before it is called good.

The base is not loaded twice: models are compared in copies of their structure that share every float tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from corelora.errors import CoreLoraError
from corelora.tuner_layer import CoreLoraLayer

# Relative to the largest output (at least 1). bfloat16 and float16: each layer's output is rounded, in another order.
OUTPUT_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
ROUNDED_TOLERANCE = 5e-2  # the same where weights are quantised: 8-bit layers round their inputs too
# Of one layer's change of the weight, as written: a rounding of each number of the two factors.
LAYER_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check_export(
    model: nn.Module,
    adapter_name: str,
    folder: Path,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    inputs: Mapping[str, Any] | None = None,
    exact: bool = True,
) -> float | None:
    """Compare the folder, loaded with plain PEFT, with the adapter.

    Args:
        model: the model under PEFT's wrapper, with the adapter.
        adapter_name: the adapter's name.
        folder: the export.
        pairs: what each layer should hold, (A[q,i], B[o,q]) by the layer's name.
        inputs: model inputs to compare on; None takes random token ids.
        exact: the outputs must agree; False where the pairs were cut to a smaller rank.

    Returns:
        The largest difference of an output, or None where the model does not run on token ids alone.

    Raises:
        CoreLoraError: keys were not loaded, a layer's change differs, or the outputs do.
    """
    with _flags_kept(model):
        expected = _expected(model, adapter_name, inputs)
        plain = PeftModel.from_pretrained(bare(model), folder).eval()
        file = load_file(folder / "adapter_model.safetensors")
        _check_keys(plain, file)
        _check_layers(plain, pairs, file)
        found = None if expected is None else _outputs(plain, inputs)
    return None if expected is None else _compared(expected, found, exact, _tolerance(model, expected.dtype))


def check_outputs(model: nn.Module, adapter_name: str, other: nn.Module) -> float | None:
    """The largest difference of another model's outputs from the adapter's; None for a model that takes no ids.

    Args:
        model: the model under PEFT's wrapper, with the adapter.
        adapter_name: the adapter's name.
        other: the model to compare, on the same device.

    Raises:
        CoreLoraError: they differ by more than the type's rounding explains.
    """
    with _flags_kept(model):
        expected = _expected(model, adapter_name, None)
    if expected is None:
        return None
    return _compared(expected, _outputs(other.eval(), None), True, _tolerance(model, expected.dtype))


def _tolerance(model: nn.Module, dtype: torch.dtype) -> float:
    quantised = any(m.weight_access.is_quantized for m in model.modules() if isinstance(m, CoreLoraLayer))
    return ROUNDED_TOLERANCE if quantised else OUTPUT_TOLERANCE.get(dtype, 1e-4)


def _compared(expected: Tensor, found: Tensor | None, exact: bool, tolerance: float) -> float:
    assert found is not None
    error = float((found - expected).abs().max())
    allowed = tolerance * max(1.0, float(expected.abs().max()))
    if exact and not error <= allowed:
        raise CoreLoraError(f"the export's outputs differ by {error:.2e} from the adapter's; {allowed:.2e} is allowed")
    return error


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of a model's structure with the same tensors in it, none of them copied but quantised weights.

    bitsandbytes changes those when they are first used: scales move from the parameter into its layer.
    """
    memo = {id(t): t for t in (*model.parameters(), *model.buffers()) if type(t) in (nn.Parameter, Tensor)}
    return copy.deepcopy(model, memo)


def bare(model: nn.Module) -> nn.Module:
    """A shared copy of a model without its adapters."""
    plain = shared_copy(model)
    for key, layer in list(plain.named_modules()):
        if isinstance(layer, CoreLoraLayer):
            plain.set_submodule(key, layer.base_layer)
    vars(plain).pop("peft_config", None)
    return plain


def _ours(model: nn.Module, adapter_name: str) -> nn.Module:
    ours = shared_copy(model)
    for layer in ours.modules():
        if isinstance(layer, CoreLoraLayer):
            layer.enable_adapters(True)
            layer.set_adapter([adapter_name])
    return ours.eval()


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """Which parameters train is a flag on tensors that the copies share: put it back."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _expected(model: nn.Module, adapter_name: str, inputs: Mapping[str, Any] | None) -> Tensor | None:
    """The adapter's outputs; None where no inputs are given and the model wants more than token ids."""
    ours = _ours(model, adapter_name)
    try:
        return _outputs(ours, inputs)
    except (TypeError, ValueError, AttributeError, IndexError, NotImplementedError):
        # What models raise that want images too, or have no place for 16 tokens, or name no embedding (CLIP).
        if inputs is not None:
            raise
        return None


def _outputs(model: nn.Module, inputs: Mapping[str, Any] | None) -> Tensor | None:
    """The first output on the given inputs or on random token ids, None for a model that takes no ids."""
    if inputs is None:
        inputs = _random_ids(model)
        if inputs is None:
            return None
    result = model(**inputs)
    if isinstance(result, Tensor):
        return result
    return result.logits if "logits" in result else result[0]


def _random_ids(model: nn.Module) -> dict[str, Tensor] | None:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel) or inner.main_input_name != "input_ids":
        return None
    table: Any = inner.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, table.shape[0], (1, 16), generator=generator).to(table.device)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if inner.config.is_encoder_decoder else {})


def _check_keys(plain: PeftModel, file: Mapping[str, Tensor]) -> None:
    loaded = set(get_peft_model_state_dict(plain, save_embedding_layers=False))
    written = set(file) - {key for key in plain.state_dict() if key not in loaded}  # resized embeddings are the base's
    if written != loaded:
        odd = sorted(written ^ loaded)
        raise CoreLoraError(f"plain PEFT reads other keys than were written: {', '.join(odd[:4])}")


def _check_layers(plain: PeftModel, pairs: Mapping[str, tuple[Tensor, Tensor]], file: Mapping[str, Tensor]) -> None:
    """Each loaded layer's scale * B A against the exact pair, on random vectors."""
    layers: dict[str, Any] = dict(plain.get_base_model().named_modules())
    state = get_peft_model_state_dict(plain, save_embedding_layers=False)
    for name, (A, B) in pairs.items():
        key = f"base_model.model.{name}"
        a, b = (_factor(state, key, side).to(A) for side in "AB")
        probe = torch.randn(A.shape[1], 4, generator=torch.Generator().manual_seed(0)).to(A)
        right = B @ (A @ probe)
        error = float((layers[name].scaling["default"] * (b @ (a @ probe)) - right).norm())
        tolerance = LAYER_TOLERANCE[_factor(file, key, "A").dtype]
        if not error <= tolerance * max(float(right.norm()), 1e-30):
            raise CoreLoraError(
                f"{name}: the change as loaded differs by {error:.1e} from the adapter's {float(right.norm()):.1e}"
            )


def _factor(state: Mapping[str, Tensor], key: str, side: str) -> Tensor:
    """lora_A or lora_B of a layer as a matrix."""
    embedding = state.get(f"{key}.lora_embedding_{side}")
    return (state[f"{key}.lora_{side}.weight"] if embedding is None else embedding).flatten(1)
