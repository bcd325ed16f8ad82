"""CLIP's image and text towers (Radford et al. 2021, arXiv:2103.00020): ViT-B/32, ViT-L/14 and the like.

Sizes are read off the weights, in the layout of `transformers` (`openai/clip-vit-base-patch32`).
Shapes: B batch, L = 77 tokens, N positions, D width of a tower, E embedding, P pixels of a patch's side.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, Int

from imagegpt_jax.models.pretrained import vit

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_EPS = 1e-5
_NAMES = vit.Names(
    norms=("layer_norm1", "layer_norm2"),
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    mlp=("mlp.fc1", "mlp.fc2"),
)
_IMAGE, _TEXT = "vision_model.encoder.layers.", "text_model.encoder.layers."
_TABLE: vit.Table = {
    "class_embedding": ("vision_model.embeddings.class_embedding", (0,)),
    "patch_kernel": ("vision_model.embeddings.patch_embedding.weight", (2, 3, 1, 0)),
    "image_positions": ("vision_model.embeddings.position_embedding.weight", (0, 1)),
    "pre_scale": ("vision_model.pre_layrnorm.weight", (0,)),
    "pre_bias": ("vision_model.pre_layrnorm.bias", (0,)),
    "image_scale": ("vision_model.post_layernorm.weight", (0,)),
    "image_bias": ("vision_model.post_layernorm.bias", (0,)),
    "image_projection": ("visual_projection.weight", (1, 0)),
    "token_embedding": ("text_model.embeddings.token_embedding.weight", (0, 1)),
    "text_positions": ("text_model.embeddings.position_embedding.weight", (0, 1)),
    "text_scale": ("text_model.final_layer_norm.weight", (0,)),
    "text_bias": ("text_model.final_layer_norm.bias", (0,)),
    "text_projection": ("text_projection.weight", (1, 0)),
    "logit_scale": ("logit_scale", ()),
}


class CLIP(nnx.Module):
    """Both towers; images and texts of the same meaning have embeddings of the same direction."""

    class_embedding: nnx.Param
    patch_kernel: nnx.Param
    image_positions: nnx.Param
    pre_scale: nnx.Param
    pre_bias: nnx.Param
    image_scale: nnx.Param
    image_bias: nnx.Param
    image_projection: nnx.Param
    token_embedding: nnx.Param
    text_positions: nnx.Param
    text_scale: nnx.Param
    text_bias: nnx.Param
    text_projection: nnx.Param
    logit_scale: nnx.Param

    def __init__(self, shapes: vit.Shapes, *, key: jax.Array):
        """Makes random weights in the shapes of a file's arrays; raises UserError if the names are not CLIP's."""
        direct, image, text = jax.random.split(key, 3)
        kind = {"activation": "quick_gelu", "eps": _EPS, "scaled": False}
        vit.add_parameters(self, _TABLE, shapes, "CLIP", key=direct)
        self.image_tower = vit.tower(shapes, _IMAGE, _NAMES, "CLIP", key=image, **kind)
        self.text_tower = vit.tower(shapes, _TEXT, _NAMES, "CLIP", key=text, **kind)
        patch = self.patch_kernel.shape[0]
        self.size = math.isqrt(self.image_positions.shape[0] - 1) * patch
        self.length = self.text_positions.shape[0]

    @classmethod
    def load(cls, path: epath.PathLike) -> "CLIP":
        """Reads `model.safetensors` or `pytorch_model.bin` of `transformers`, or the folder; errors as `vit.load`."""
        towers = {_IMAGE: "image_tower", _TEXT: "text_tower"}
        # Older files keep the numbers of positions beside their embeddings.
        return vit.load(cls, path, "CLIP", _TABLE, towers, _NAMES, unused=".position_ids")

    def embed_images(self, images_BHWC: Float[Array, "B size size 3"]) -> Float[Array, "B E"]:
        """Embeddings, not scaled to unit length, of images in [0, 255] of `size` pixels a side."""
        x = (images_BHWC.astype(jnp.float32) / 255 - MEAN) / DEVIATION
        x = vit.patches(x, self.patch_kernel[...])
        first = jnp.broadcast_to(self.class_embedding[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.image_positions[...]
        x = self.image_tower(vit.layer_norm(x, self.pre_scale[...], self.pre_bias[...], _EPS))
        return vit.layer_norm(x[:, 0], self.image_scale[...], self.image_bias[...], _EPS) @ self.image_projection[...]

    def embed_texts(self, tokens_BL: Int[Array, "B L"]) -> Float[Array, "B E"]:
        """Embeddings, not scaled to unit length, of token ids; the greatest id of each row marks its end."""
        x = self.token_embedding[...][tokens_BL] + self.text_positions[...][: tokens_BL.shape[1]]
        x = self.text_tower(x, causal=True)
        x = vit.layer_norm(x, self.text_scale[...], self.text_bias[...], _EPS)
        ends = jnp.argmax(tokens_BL, axis=1)
        return jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0] @ self.text_projection[...]
