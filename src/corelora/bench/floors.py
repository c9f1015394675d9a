"""What arithmetic allows: operations and saved numbers of an adapted linear layer, counted from the adapter's factors.

Everything is in multiplications of T tokens with W[o,i], A[r,i], B[o,r]; a product of [T,m] and [m,n] is T m n.

    frozen base     W x and W^T dy                                      2 o i
    A               A x, A^T dz into dx, and dz^T x where it trains     2 r i or 3 r i
                    a slice of W: A x is some of W x, so A^T dz alone     r i
    B               B u, B^T dy, and dy^T u where it trains             2 r o or 3 r o
                    a slice of W: B^T dy is some of W^T dy                r o
    core            its products with u and with dz, and dz^T u         3 r r, and less where k < r

A factor that trains as an offset from a start counts for both. The floor is the sum over a model's layers, over the
base's. It knows no memory, no launches, no attention and no output embeddings: a measured ratio may even lie below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from corelora.adapter import CoreAdapter
from corelora.bench.peers import Ranks
from corelora.bench.shapes import shape_config
from corelora.factor import FactorPlan
from corelora.layers import LinearView
from corelora.plan import build_on_meta
from corelora.registry import METHODS
from corelora.spec import AdapterSpec


@dataclass(frozen=True, kw_only=True)
class Floor:
    """One method on one model.

    Attributes:
        times_base: multiplications of all adapted layers over those of the frozen base.
        saves_input: the layer's input is kept for the backward pass.
        saved: numbers a token and layer that are kept besides: thin features.
    """

    times_base: float
    saves_input: bool
    saved: int


def all_shapes(model: str) -> list[tuple[int, int]]:
    """(o, i) of each linear layer of a model but the output embeddings, repeats included."""
    built: Any = build_on_meta(shape_config(model, 1))
    head = built.get_output_embeddings()
    return [(m.out_features, m.in_features) for m in built.modules() if isinstance(m, nn.Linear) and m is not head]


def floor(method: str, shapes: list[tuple[int, int]], ranks: Ranks) -> Floor:
    """The floor of a method's default on linear layers of these shapes (o, i).

    Args:
        method: its name.
        shapes: one a layer.
        ranks: r and k.
    """
    spec = AdapterSpec(choices=METHODS[method].default, r=ranks.r, inner_r=ranks.k, scale=1.0)
    base = extra = 0
    for o, i in shapes:
        plans = CoreAdapter.of(spec, LinearView((o, i))).plans
        base += 2 * o * i
        extra += sum(_products(plan) * _numel(plan) for plan in plans.values())
    A = plans["A"]
    parts = int(A.trained) + int(A.needs_start)
    return Floor(times_base=1 + extra / base, saves_input=A.trained, saved=parts * spec.r)


def _products(plan: FactorPlan) -> int:
    """How many products a token costs with each number of a factor: forward, input gradient, own gradient."""
    trained = 3 if plan.trained else 0
    if not plan.needs_start:
        return trained
    return trained + (1 if plan.source else 2)


def _numel(plan: FactorPlan) -> int:
    rows, cols = plan.shape[0], plan.shape[-1] if len(plan.shape) == 2 else 1
    return rows * cols
