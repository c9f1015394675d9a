"""Output error of rank-r decompositions of a real model's weights on real inputs: SVD against activation-aware SVD.

    python benchmarks/decomposition.py --train FILE --test FILE [--out docs/results/decomposition-smollm2.json]

For every linear layer W[o,i] and rank r, W_r is the best rank-r matrix in the plain norm (SVD) or under the input
scaling d[i] = mean |x_j| ^ power of NoRA's Eq. 3 (AwSVD). "optimal" is the best that any rank-r matrix can do on the
calibration inputs, the SVD of W C^(1/2) with their covariance C, for which the AwSVD is a cheap stand-in. The error is
|(W - W_r) X| / |W X| (Frobenius), on inputs X of other rows than d and C come from. The NoRA paper's figure 7.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from corelora.data.collate import ReplyCollator
from corelora.data.replies import encode_replies
from corelora.recipe import Recipe, load_recipe
from corelora.train import dry_run as _tasks  # noqa: F401  (the tasks register themselves)
from corelora.train.folder import versions
from corelora.train.tasks import TASKS

RANKS = (16, 32, 64, 128)
POWERS = (0.5, 1.0)
DAMP = 1e-6  # of the covariance's mean, so that its root can be inverted
RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "smollm2-gsm8k" / "base.yaml"


class Inputs:
    """Sums over the inputs of every linear layer: covariance [i,i] and mean magnitude [i], padding left out."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}
        self.covariance: dict[str, Tensor] = {}
        self.magnitude: dict[str, Tensor] = {}
        self.count = 0
        self.device = next(model.parameters()).device
        self.mask = torch.empty(0)
        for name, layer in self.layers.items():
            layer.register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0][self.mask].float()
            self.covariance[name] = self.covariance.get(name, 0) + (x.T @ x).double()
            self.magnitude[name] = self.magnitude.get(name, 0) + x.abs().sum(0).double()

        return record

    @torch.no_grad()
    def read(self, model: nn.Module, batches: Iterator[dict[str, Tensor]], total: int) -> None:
        """Run the model over batches."""
        self.covariance, self.magnitude, self.count = {}, {}, 0
        for batch in tqdm(batches, total=total, desc="inputs", unit="batch"):
            batch = {name: value.to(self.device) for name, value in batch.items()}
            self.mask = batch["attention_mask"].bool()
            self.count += int(self.mask.sum())
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def batches(recipe: Recipe, which: str, tokenizer: Any, rows: int) -> Iterator[dict[str, Tensor]]:
    """The first rows, four a batch."""
    dataset = encode_replies(recipe.data, which, tokenizer, 0).dataset
    collate = ReplyCollator(tokenizer.pad_token_id)
    for start in range(0, rows, 4):
        yield collate([dataset[n] for n in range(start, start + 4)])


def scalings(covariance: Tensor, magnitude: Tensor, count: int) -> dict[str, Tensor]:
    """Name -> S[i,i], under which the truncated SVD of W S is taken."""
    d = (magnitude / count).clamp_min(1e-8)
    values, vectors = torch.linalg.eigh(covariance / count)
    root = (values.clamp_min(0) + DAMP * values.mean()).sqrt()
    size = len(d)
    found = {"SVD": torch.eye(size, dtype=torch.float64, device=d.device)}
    found |= {f"AwSVD, power {p:g}": torch.diag(d**p) for p in POWERS}
    return found | {"optimal": vectors * root @ vectors.T}


@torch.no_grad()
def errors(W: Tensor, S: Tensor, test: Tensor) -> list[float]:
    """|(W - W_r) X| / |W X| for each rank, W_r S the truncated SVD of W S.

    Args:
        W: [o,i], float64.
        S: [i,i], invertible.
        test: covariance of the test inputs [i,i].
    """
    U, values, Vh = torch.linalg.svd(W @ S, full_matrices=False)
    right = torch.linalg.solve(S, Vh, left=False)
    whole = ((W @ test) * W).sum()
    found = []
    for r in RANKS:
        left = W - (U[:, :r] * values[:r]) @ right[:r]
        found.append(float((((left @ test) * left).sum() / whole).clamp_min(0).sqrt()))
    return found


def main() -> int:
    """Measure, print means by kind of layer, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--train", required=True, help="rows of GSM8K that scalings come from")
    parser.add_argument("--test", required=True, help="rows that errors are measured on")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    words = [f"data.train.path={arguments.train}", f"data.test.path={arguments.test}", "data.test.split=train"]
    recipe = load_recipe(Recipe, RECIPE, [*words, "model.dtype=float32", "method.name=full"])
    task = TASKS["instruct"]
    tokenizer, config = task.load_processor(recipe), task.load_config(recipe)
    model = task.load_model(recipe, config, tokenizer, None).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    inputs = Inputs(model)
    total = -(-arguments.rows // 4)
    inputs.read(model, batches(recipe, "test", tokenizer, arguments.rows), total)
    test = inputs.covariance
    inputs.read(model, batches(recipe, "train", tokenizer, arguments.rows), total)
    layers = []
    for name, layer in tqdm(inputs.layers.items(), desc="decompositions", unit="layer"):
        ways = scalings(inputs.covariance[name], inputs.magnitude[name], inputs.count)
        found = {way: errors(layer.weight.double(), S, test[name]) for way, S in ways.items()}
        layers.append({"layer": name, "errors": {way: [round(e, 5) for e in es] for way, es in found.items()}})
    data = {
        "what": "SmolLM2-135M-Instruct on GSM8K: relative error of the outputs of rank-r decompositions",
        "ranks": list(RANKS),
        "rows": arguments.rows,
        "tokens": inputs.count,
        "versions": versions(),
        "layers": layers,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(data) + "\n")
    kinds = sorted({x["layer"].rpartition(".")[2] for x in layers})
    for kind in kinds:
        own = [x["errors"] for x in layers if x["layer"].endswith(kind)]
        means = {way: [round(sum(e[way][n] for e in own) / len(own), 4) for n in range(len(RANKS))] for way in own[0]}
        print(json.dumps({"kind": kind, **means}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
