"""The image tokenizer of ImageGPT (Chen et al. 2020): each pixel becomes the nearest of a few colours.

Shapes: B batch, H W pixels, C channels, K colours. Images are float in [-1, 1].
"""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from imagegpt_jax.errors import UserError
from imagegpt_jax.models import layers
from imagegpt_jax.models.quantizers import Quantizer, QuantizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaletteConfig:
    """Shape of a Palette.

    Attributes:
      num_codes: K, colours.
      in_channels: C.
    """

    num_codes: int = 512
    in_channels: int = 3

    @property
    def downsample(self) -> int:
        """Pixels per code along each side: one."""
        return 1

    @property
    def quantizer(self) -> QuantizerConfig:
        """The colours as a codebook."""
        return QuantizerConfig(
            num_codes=self.num_codes, code_dim=self.in_channels, l2_normalize=False, chunk_codes=self.num_codes
        )


class Palette(nnx.Module):
    """A codebook of colours; has no network."""

    def __init__(self, config: PaletteConfig, *, key: jax.Array):
        self.quantize = Quantizer(config.quantizer, key=key)
        self.config = config

    def encode_codes(self, images_BHWC: Float[Array, "B H W C"]) -> Int[Array, "B H W"]:
        """Images in [-1, 1] -> indices of colours; raises UserError if the images have another number of channels."""
        if images_BHWC.shape[-1] != self.config.in_channels:
            raise UserError(f"images of {images_BHWC.shape[-1]} channels have no colours of {self.config.in_channels}.")
        return self.quantize.nearest(images_BHWC)

    def decode_codes(self, codes_BHW: Int[Array, "B H W"]) -> Float[Array, "B H W C"]:
        """Indices of colours -> images."""
        colours = self.quantize.lookup(codes_BHW)
        return colours.astype(layers.accumulation_dtype(colours.dtype))
