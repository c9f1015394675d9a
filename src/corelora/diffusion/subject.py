"""What trains: a UNet, its text encoders where wanted, and the loss of predicting noise."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corelora.diffusion.parts import encode_text


class Subject(nn.Module):
    """A UNet under the noise-prediction loss; adapters go on the modules inside.

    Args:
        unet: diffusers' UNet2DConditionModel.
        encoders: text encoders that train, by name; empty: prompts come as embeddings.
        schedule: diffusers' scheduler with the training noise (DDPM).
        min_snr: gamma of the min-SNR weights (Hang et al. 2023, arXiv 2303.09556), or None for equal weights.
    """

    alphas: Tensor

    def __init__(
        self, unet: nn.Module, encoders: dict[str, nn.Module], schedule: Any, min_snr: float | None = None
    ) -> None:
        super().__init__()
        self.unet = unet
        for name, encoder in encoders.items():
            self.add_module(name, encoder)
        self.encoder_names = tuple(encoders)
        self.prediction_type, self.min_snr = schedule.config.prediction_type, min_snr
        self.register_buffer("alphas", schedule.alphas_cumprod.float(), persistent=False)
        self.requires_grad_(False)

    def forward(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, weights: Tensor, **condition: Tensor
    ) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            latents: clean, scaled as the VAE says [b, c, h, w].
            noise: as large.
            timesteps: [b].
            weights: of each row's loss [b]; prior preservation's.
            **condition: `prompt`, text embeddings [b, t, d], or `ids`, token ids [b, encoders, t], where the text
                encoders train; SDXL's `pooled` embeddings [b, p], and `sizes` [b, 6]: original height and width, crop
                top and left, target height and width.

        Returns:
            `loss`, the weighted mean over rows, and `rows` [b], each row's mean squared error without weights.
        """
        dtype = next(self.unet.parameters()).dtype
        prompt, pooled = self._text(condition)
        sizes = condition.get("sizes")
        alpha = self.alphas[timesteps].reshape(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        added = None
        if sizes is not None and pooled is not None:
            added = {"text_embeds": pooled.to(dtype), "time_ids": sizes.to(dtype)}
        predicted = self.unet(noisy.to(dtype), timesteps, prompt.to(dtype), added_cond_kwargs=added).sample
        rows = F.mse_loss(predicted.float(), self._target(latents, noise, alpha), reduction="none").flatten(1).mean(1)
        return {"loss": (rows * weights * self._snr_weights(alpha.flatten())).mean(), "rows": rows}

    def unused(self) -> list[str]:
        """Modules that no loss reaches: SDXL reads its first text encoder before the last layer, and no more of it."""
        if len(self.encoder_names) < 2:
            return []
        first = self.encoder_names[0]
        encoder: Any = self.get_submodule(first)
        last = f"layers.{encoder.config.num_hidden_layers - 1}"
        return [f"{first}.{name}" for name, _ in encoder.named_modules() if name.endswith(last)]

    def _text(self, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(embeddings, pooled), by the encoders where they train."""
        ids = condition.get("ids")
        if ids is None:
            return condition["prompt"], condition.get("pooled")
        encoders = [self.get_submodule(name) for name in self.encoder_names]
        return encode_text([ids[:, n] for n in range(ids.shape[1])], encoders)

    def _target(self, latents: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
        """What the UNet should say: the noise, or the velocity (Salimans and Ho 2022, arXiv 2202.00512)."""
        if self.prediction_type == "v_prediction":
            return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        return noise

    def _snr_weights(self, alpha: Tensor) -> Tensor:
        """min(SNR, gamma) / SNR for noise, / (SNR + 1) for velocity."""
        if self.min_snr is None:
            return torch.ones_like(alpha)
        snr = alpha / (1 - alpha)
        return snr.clamp(max=self.min_snr) / (snr + 1 if self.prediction_type == "v_prediction" else snr)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **others: Any) -> None:
        """Recompute activations: what transformers' Trainer calls.

        Args:
            gradient_checkpointing_kwargs: torch's, for the text encoders; diffusers has its own for the UNet.
            **others: transformers' choice of layers, which UNets don't have.
        """
        self.unet.enable_gradient_checkpointing()  # type: ignore[operator]
        for name in self.encoder_names:
            self.get_submodule(name).gradient_checkpointing_enable(gradient_checkpointing_kwargs)  # type: ignore[operator]

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **others: Any) -> None:
        """The same by the name that transformers gives it from 5.20 on."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **others)
