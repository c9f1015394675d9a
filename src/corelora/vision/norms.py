"""Batch norms of a frozen body keep their statistics, in training too."""

from __future__ import annotations

from torch import nn


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that always normalises by its running statistics and never changes them.

    An adapter's folder does not hold a body's running statistics: if training moved them, the saved adapter would sit
    on another model than the one that was trained, and features would not be frozen at all.
    """

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Evaluation mode, whatever is asked for."""
        super().train(False)
        return self


def freeze_batch_norms(model: nn.Module) -> int:
    """Put a frozen one in each batch norm's place, with its tensors; names stay.

    Returns:
        How many there are.
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    for name, old in found:
        above, _, last = name.rpartition(".")
        setattr(model.get_submodule(above), last, _frozen(old))
    return len(found)


def _frozen(old: nn.BatchNorm2d) -> FrozenBatchNorm2d:
    new = FrozenBatchNorm2d(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats, device="meta")
    for name, parameter in old.named_parameters(recurse=False):
        setattr(new, name, parameter)
    for name, buffer in old.named_buffers(recurse=False):
        setattr(new, name, buffer)
    return new.eval()
