"""How one layer takes the fused path (kernels/fast.py): what makes each adapter's form, kept between forward passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from corelora.kernels.fast import fits, pays, suits
from corelora.kernels.form import FormMaker


class Fusable:
    """What a tuner layer needs for the fused path."""

    def forget_forms(self: Any) -> None:
        """Drop what is kept between forward passes: values that it was made from have changed."""
        self._makers.clear()

    def form_maker(self: Any, x: Tensor) -> FormMaker | None:
        """What the fused operation needs for this forward pass, None where it does not apply.

        Runs in every forward pass of every layer, where the host must keep ahead of a GPU: attributes are read from
        where they are, past properties and nn.Module.__getattr__.
        """
        base = self._modules["base_layer"]
        if self._disable_adapters or self.merged_adapters or base is None or not fits(base, x):
            return None
        active = self._mine()
        if len(active) != 1:
            return None
        name = active[0]
        if name in self.unchecked:  # now, not on the reference path: the first pass is to be as the second
            self.complete(name)
        if torch.compiler.is_compiling():
            self._prepare(name)
        maker: FormMaker | None = self._maker(name)
        return None if maker is None or (self.training and maker.drops) or not pays(x, maker) else maker

    def _maker(self: Any, name: str) -> FormMaker | None:
        """Kept, or made anew for another scale."""
        maker: FormMaker | None = self._makers.get(name)
        if maker is None or maker.scale != self.scaling[name]:
            core = self.cores[name]
            if not suits(self.view, self._modules["base_layer"], core):
                return None
            maker = self._makers[name] = FormMaker(core, self.factors(name), self.scaling[name])
        return maker

    @torch.compiler.assume_constant_result
    def _prepare(self: Any, name: str) -> None:
        """Runs while a compiler looks at the layer, which then finds a maker with all that makers keep.

        It would walk through the making of one step by step, and compile twice: for layers without a maker and for
        those with one. And the maker would keep tensors of its graphs.
        """
        maker = self._maker(name)
        if maker is not None:
            maker.prepare()
