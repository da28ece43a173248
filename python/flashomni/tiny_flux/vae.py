"""An exact "VAE" without weights: pixels moved into channels, so that FluxPipeline works in pixel space."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin


class PixelVAE(ModelMixin, ConfigMixin):
    """Space to depth by 2 and back: RGB [B, 3, H, W] in [-1, 1] <-> latents [B, 12, H/2, W/2].

    FluxPipeline packs 2x2 latents into a token of 48 channels: a patch of 4x4 pixels.
    """

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (12, 12),  # its length tells FluxPipeline a scale factor of 2
        latent_channels: int = 12,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ):
        super().__init__()
        # diffusers asks every model for its device and dtype.
        self.register_buffer("anchor", torch.zeros(1), persistent=False)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Latents of RGB images."""
        return torch.nn.functional.pixel_unshuffle(image, 2)

    def decode(self, latents: torch.Tensor, return_dict: bool = True):
        """RGB images of latents, as diffusers' VAEs return them."""
        image = torch.nn.functional.pixel_shuffle(latents, 2)
        return DecoderOutput(sample=image) if return_dict else (image,)
