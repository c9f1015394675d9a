"""Layers that read one input, in compiled code: one operation for them, put in by a pass over the graph.

Eager code sees from call to call which layers these are (groups.py). A graph shows it at once: nodes of
`corelora::linear` that read the same node. The pass runs on inductor's graphs before autograd's (`install`) and changes
nothing else; with another backend the layers stay apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import getitem
from typing import Any

import torch
import torch._inductor.config as inductor
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from corelora.kernels.core_linear import linear_op, operation
from corelora.kernels.form import Layout
from corelora.kernels.narrow import typed
from corelora.kernels.siblings import backward_all, forward_all
from corelora.kernels.team import Team, make_team

LINEAR_ARGUMENTS = ("x", "W", "bias", "R", "L", "G", "rows", "row_index", "cols", "col_index", "scale")


@operation("corelora::siblings")
def siblings_op(
    x: Tensor,
    W: list[Tensor],
    bias: list[Tensor],
    R: list[Tensor],
    L: list[Tensor],
    G: Tensor | None,
    rows: list[int],
    cols: list[int],
    scales: list[float],
) -> list[Tensor]:
    """[y[..., o], ... of each layer, U[T, sum p]], with G[n,q,p]; a list is empty where no layer has of its kind."""
    flat = x.reshape(-1, x.shape[-1])
    ys, features = forward_all(flat, _team(x.dtype, (W, bias, R, L), G, (rows, cols, scales), (False, False, False)))
    U = features[0] if len(features) == 1 else torch.cat(features, dim=1)
    return [*(y.view(*x.shape[:-1], y.shape[1]) for y in ys), U]


@torch.library.register_fake("corelora::siblings")
def _(x, W, bias, R, L, G, rows, cols, scales):
    width = sum(rows) + sum(r.shape[0] for r in R)
    return [*(x.new_empty(*x.shape[:-1], w.shape[0]) for w in W), x.new_empty(x.numel() // x.shape[-1], width)]


@operation("corelora::siblings_backward")
def siblings_backward_op(
    dys: list[Tensor],
    x: Tensor | None,
    W: list[Tensor],
    R: list[Tensor],
    L: list[Tensor],
    G: Tensor | None,
    U: Tensor,
    rows: list[int],
    cols: list[int],
    scales: list[float],
    needs: list[bool],
) -> list[Tensor]:
    """[dx, [dR1 ; dR2 ; ..], dG[n,q,p], dL, ...]; `needs` is of x, R, L, G, and what nobody asks for is empty ([0])."""
    flat = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    team = _team(flat[0].dtype, (W, [], R, L), G, (rows, cols, scales), needs[1:])
    read = None if x is None else x.reshape(-1, x.shape[-1])
    dx, dR, dLs, dGs = backward_all(flat, team, read, [U], needs[0])
    dx = None if dx is None else dx.view(*dys[0].shape[:-1], dx.shape[1])
    dG: Any = (
        None if not needs[3] else dGs if isinstance(dGs, Tensor) else torch.stack([g for g in dGs if g is not None])
    )
    return [flat[0].new_empty(0) if t is None else t for t in (dx, dR, dG, *dLs)]


@torch.library.register_fake("corelora::siblings_backward")
def _(dys, x, W, R, L, G, U, rows, cols, scales, needs):
    dy, nothing = dys[0], dys[0].new_empty(0)
    dx = dy.new_empty(*dy.shape[:-1], W[0].shape[1]) if needs[0] else nothing
    dR = R[0].new_empty(sum(r.shape[0] for r in R), W[0].shape[1]) if needs[1] else nothing
    dG = G.new_empty(G.shape) if needs[3] else nothing
    dLs = [t.new_empty(t.shape) if needs[2] else dy.new_empty(0) for t in L] or [dy.new_empty(0) for _ in W]
    return [dx, dR, dG, *dLs]


def _setup(ctx, inputs, output):
    x, W, _, R, L, G, rows, cols, scales = inputs
    keep_x = any(t.requires_grad for t in R)
    ctx.save_for_backward(x if keep_x else None, G, output[-1], *W, *R, *L)
    ctx.sizes = [len(W), len(R), len(L)]
    ctx.numbers = (rows, cols, scales)


def _backward(ctx, grads):
    x, G, U, *rest = ctx.saved_tensors
    parts = iter(rest)
    W, R, L = ([next(parts) for _ in range(size)] for size in ctx.sizes)
    rows, cols, scales = ctx.numbers
    n = ctx.needs_input_grad
    needs = [n[0], any(n[3]), any(n[4]), n[5]]
    dx, dR, dG, *others = siblings_backward_op(list(grads[:-1]), x, W, R, L, G, U, rows, cols, scales, needs)
    dRs = list(dR.split([t.shape[0] for t in R])) if needs[1] else [None] * len(R)
    dLs = [dL if needs[2] else None for _, dL in zip(L, others, strict=False)]
    fixed = [None] * len(W), [None] * len(n[2])
    return dx if needs[0] else None, *fixed, dRs, dLs, dG if needs[3] else None, None, None, None


torch.library.register_autograd("corelora::siblings", _backward, setup_context=_setup)


def _team(
    dtype: torch.dtype,
    tensors: Sequence[Sequence[Tensor]],
    G: Tensor | None,
    numbers: Sequence[Sequence[Any]],
    learn: Sequence[bool],
) -> Team:
    """The layers of the operation's lists: W, bias, R, L; G; rows, cols, scales; what learns of R, L and G."""
    count = len(tensors[0])
    whole: list[Sequence[Any]] = [list(given) or [None] * count for given in tensors]
    cores: Sequence[Any] = [None] * count if G is None else G.unbind()
    cast = None if G is None else typed(G, dtype)
    layouts = [Layout(n, None, m, None, scale) for n, m, scale in zip(*numbers, strict=True)]
    given = list(zip(*whole, cores, strict=True))
    team = make_team(given, cores if cast is None else cast.unbind(), layouts, dtype, [learn] * count)
    team.grams = cast
    return team


def join(graph: fx.Graph) -> int:
    """Put one operation in place of those that read the same node, where nothing between them forbids it.

    Args:
        graph: of `corelora::linear` nodes among others, before autograd's.

    Returns:
        How many groups there are.
    """
    found = 0
    for nodes in list(_groups(graph)):
        ahead = _needed(graph, nodes)
        if ahead is not None:
            for node in ahead:
                nodes[0].prepend(node)
            _replace(graph, nodes)
            found += 1
    return found


def _groups(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Nodes that read one input on a GPU and have the same kinds of factors."""
    by_input: dict[Any, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=linear_op):
        given = _arguments(node)
        value = given["x"].meta.get("example_value")
        indexed = given["row_index"] is not None or given["col_index"] is not None
        if value is None or indexed or not _suits(value) or not all(_is_output(user) for user in node.users):
            continue
        kinds = *(given[name] is None for name in ("bias", "R", "L")), _shape(given["G"])
        by_input.setdefault((_source(given["x"]), kinds), []).append(node)
    return (nodes for nodes in by_input.values() if len(nodes) > 1)


def _source(x: fx.Node) -> Any:
    """What tells inputs apart: under autocast each layer casts for itself, and casts of one tensor are alike."""
    return (*x.args, *x.kwargs.items()) if x.op == "call_method" and x.target == "to" else x


def _shape(G: fx.Node | None) -> Any:
    return None if G is None else (G.meta["example_value"].shape, G.meta["example_value"].dtype)


def _is_output(user: fx.Node) -> bool:
    return user.target is getitem and user.args[1:] == (0,)


def _suits(x: Tensor) -> bool:
    """On a CPU the products have another order, in which reading an input together saves nothing."""
    return x.device.type == "cuda"


def _arguments(node: fx.Node) -> dict[str, Any]:
    return dict(zip(LINEAR_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)


def _needed(graph: fx.Graph, nodes: Sequence[fx.Node]) -> list[fx.Node] | None:
    """What has to be there before the first of some layers can compute for all, in its order.

    Where autocast is on, each layer's casts and core are made in a region without it, and moved into another such.

    Returns:
        None where a layer's factors follow from another's output, or something between them is changed in place.
    """
    order = {node: n for n, node in enumerate(graph.nodes)}
    first, last = order[nodes[0]], order[nodes[-1]]
    if any(_changes(node) for node, n in order.items() if first < n < last):
        return None
    ahead = [given for node in nodes[1:] for given in node.all_input_nodes]
    found = set()
    while ahead:
        node = ahead.pop()
        if node in nodes:
            return None
        if node not in found and order[node] > first:
            found.add(node)
            ahead += node.all_input_nodes
    return sorted(found, key=order.__getitem__)


def _changes(node: fx.Node) -> bool:
    """Whether a node may change a tensor that was there before."""
    if "out" in node.kwargs:
        return True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return node.op in ("call_module", "output")
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return schema.is_mutable
    name = getattr(node.target, "__name__", "")
    return name.endswith("_") or name in ("setitem", "setattr") or (name.startswith("i") and name in _IN_PLACE)


_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imatmul", "iand", "ior", "ixor")


def _replace(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """One node where the first one stands."""
    given = [_arguments(node) for node in nodes]
    lists = [[g[name] for g in given if g[name] is not None] for name in ("W", "bias", "R", "L")]
    numbers = [[g[name] for g in given] for name in ("rows", "cols", "scale")]
    cores = [g["G"] for g in given]
    with graph.inserting_before(nodes[0]):
        G = None if cores[0] is None else graph.call_function(torch.stack, (cores,))
        joined = graph.call_function(siblings_op, (given[0]["x"], *lists, G, *numbers))
        ys = [graph.call_function(getitem, (joined, at)) for at in range(len(nodes))]
    for y, node in zip(ys, nodes, strict=True):
        for old in list(node.users):
            y.meta = dict(old.meta)
            old.replace_all_uses_with(y)
            graph.erase_node(old)
        graph.erase_node(node)


class JoinSiblings(CustomGraphPass):
    """The pass as inductor takes it, after one that was set before."""

    def __init__(self, before: Any = None) -> None:
        self.before = before

    def __call__(self, graph: fx.Graph) -> None:
        if self.before is not None:
            self.before(graph)
        join(graph)

    def uuid(self) -> Any:
        """Of this file and of the pass before; None, which keeps inductor from its cache, where that has none."""
        before = None if self.before is None else getattr(self.before, "uuid", lambda: None)()
        return None if self.before is not None and before is None else (get_hash_for_files((__file__,)), before)


def install() -> None:
    """Have inductor join siblings from here on, in this process."""
    current = inductor.pre_grad_custom_pass
    if not isinstance(current, JoinSiblings):
        inductor.pre_grad_custom_pass = JoinSiblings(current)
