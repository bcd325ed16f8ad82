"""DINOv2's image tower (Oquab et al. 2023, arXiv:2304.07193), whose features FD-DINOv2 compares.

Sizes are read off the weights, in the layout of `transformers` (`facebook/dinov2-large`).
Shapes: B batch, N positions, D width, P pixels of a patch's side.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float

from imagegpt_jax.models.pretrained import vit

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
SIZE = 224  # pixels of a side that FD-DINOv2 is computed at (Stein et al. 2023, arXiv:2306.04675)
_EPS = 1e-6
_CUBIC = -0.75  # parameter of the cubic kernel with which positions are resized
_LAYERS = "encoder.layer."
_NAMES = vit.Names(
    norms=("norm1", "norm2"),
    qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    out="attention.output.dense",
    mlp=("mlp.fc1", "mlp.fc2"),
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)
_TABLE: vit.Table = {
    "class_embedding": ("embeddings.cls_token", (0, 1, 2)),
    "positions": ("embeddings.position_embeddings", (0, 1, 2)),
    "patch_kernel": ("embeddings.patch_embeddings.projection.weight", (2, 3, 1, 0)),
    "patch_bias": ("embeddings.patch_embeddings.projection.bias", (0,)),
    "scale": ("layernorm.weight", (0,)),
    "bias": ("layernorm.bias", (0,)),
}
_UNUSED = "embeddings.mask_token"  # stands for hidden patches, in training


class DINOv2(nnx.Module):
    """The tower; its feature is the class token after the last norm."""

    class_embedding: nnx.Param
    positions: nnx.Param
    patch_kernel: nnx.Param
    patch_bias: nnx.Param
    scale: nnx.Param
    bias: nnx.Param

    def __init__(self, shapes: vit.Shapes, *, key: jax.Array):
        """Makes random weights in the shapes of a file's arrays; raises UserError if the names are not DINOv2's."""
        direct, blocks = jax.random.split(key)
        vit.add_parameters(self, _TABLE, shapes, "DINOv2", key=direct)
        kind = {"activation": "gelu", "eps": _EPS, "scaled": True}
        self.tower = vit.tower(shapes, _LAYERS, _NAMES, "DINOv2", key=blocks, **kind)

    @classmethod
    def load(cls, path: epath.PathLike) -> "DINOv2":
        """Reads `model.safetensors` or `pytorch_model.bin` of `transformers`, or the folder; errors as `vit.load`."""
        return vit.load(cls, path, "DINOv2", _TABLE, {_LAYERS: "tower"}, _NAMES, unused=_UNUSED)

    def __call__(self, images_BHWC: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Features of images in [0, 255]; the positions' embeddings are resized to their grid of patches."""
        patch = self.patch_kernel.shape[0]
        x = (images_BHWC.astype(jnp.float32) / 255 - MEAN) / DEVIATION
        grid = (x.shape[1] // patch, x.shape[2] // patch)
        x = vit.patches(x, self.patch_kernel[...]) + self.patch_bias[...]
        first = jnp.broadcast_to(self.class_embedding[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self._positions(grid)
        return vit.layer_norm(self.tower(x)[:, 0], self.scale[...], self.bias[...], _EPS)

    def _positions(self, grid: tuple[int, int]) -> Array:
        first, rest = self.positions[...][:, :1], self.positions[...][:, 1:]
        side = math.isqrt(rest.shape[1])
        rest = rest.reshape(side, side, -1)
        rows, columns = (jnp.asarray(cubic(side, length)) for length in grid)
        rest = jnp.einsum("rh,cw,hwd->rcd", rows, columns, rest)
        return jnp.concatenate([first, rest.reshape(1, grid[0] * grid[1], -1)], axis=1)


def cubic(size: int, target: int) -> Float[np.ndarray, "target size"]:
    """Matrix of bicubic interpolation without antialiasing, pixels centred (Keys 1981), edges repeated."""
    matrix = np.zeros((target, size))
    places = (np.arange(target) + 0.5) * (size / target) - 0.5
    for row, place in enumerate(places):
        start = math.floor(place)
        for pixel in range(start - 1, start + 3):
            distance = abs(place - pixel)
            if distance <= 1:
                weight = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
            else:
                weight = _CUBIC * (((distance - 5) * distance + 8) * distance - 4)
            matrix[row, min(max(pixel, 0), size - 1)] += weight
    return matrix.astype(np.float32)
