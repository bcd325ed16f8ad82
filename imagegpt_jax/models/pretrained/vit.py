"""What the frozen networks CLIP and DINOv2 share: pre-norm blocks, stacked and scanned, and reading of their files.

Shapes: B batch, N positions, D width, F hidden width, L layers, H heads, h width of a head.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from imagegpt_jax.errors import UserError
from imagegpt_jax.models.layers import ACTIVATIONS
from imagegpt_jax.models.pretrained import weights

HEAD = 64  # width of a head in every published CLIP and DINOv2


@dataclasses.dataclass(frozen=True)
class Names:
    """What the parts of a block are called in a file, after the prefix and the layer's number.

    Attributes:
      norms: the two layer norms.
      qkv: projections to queries, keys and values.
      out: projection of attention's output.
      mlp: the two layers of the MLP.
      scales: factors of the two branches; () for none.
    """

    norms: tuple[str, str]
    qkv: tuple[str, str, str]
    out: str
    mlp: tuple[str, str]
    scales: tuple[str, ...] = ()


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """Layer normalisation over the last axis, in float32."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + eps) * scale + bias


class Transformer(nnx.Module):
    """Blocks of x + attention(norm(x)), x + mlp(norm(x)), with biases everywhere."""

    def __init__(
        self, layers: int, width: int, hidden: int, *, activation: str, eps: float, scaled: bool, key: jax.Array
    ):
        """Makes random weights.

        `width` is a multiple of `HEAD`, `activation` one of `layers.ACTIVATIONS`, `eps` that of the norms; with
        `scaled` each branch has a factor per channel (LayerScale).
        """
        keys = jax.random.split(key, 4)

        def kernel(key: jax.Array, d_in: int, d_out: int) -> nnx.Param:
            return _param(jax.random.normal(key, (layers, d_in, d_out)) * d_in**-0.5)

        def vector(size: int, value: float) -> nnx.Param:
            return _param(jnp.full((layers, size), value))

        self.norm1_scale, self.norm1_bias = vector(width, 1.0), vector(width, 0.0)
        self.qkv_kernel, self.qkv_bias = kernel(keys[0], width, 3 * width), vector(3 * width, 0.0)
        self.out_kernel, self.out_bias = kernel(keys[1], width, width), vector(width, 0.0)
        self.norm2_scale, self.norm2_bias = vector(width, 1.0), vector(width, 0.0)
        self.fc1_kernel, self.fc1_bias = kernel(keys[2], width, hidden), vector(hidden, 0.0)
        self.fc2_kernel, self.fc2_bias = kernel(keys[3], hidden, width), vector(width, 0.0)
        if scaled:
            self.scale1, self.scale2 = vector(width, 1.0), vector(width, 1.0)
        self.activation, self.eps, self.scaled = activation, eps, scaled

    def __call__(self, x_BND: Float[Array, "B N D"], *, causal: bool = False) -> Float[Array, "B N D"]:
        """Runs all blocks; `causal` positions see only those before them."""
        stacked = {name: part[...] for name, part in vars(self).items() if isinstance(part, nnx.Param)}

        def block(x: Array, p: Mapping[str, Array]) -> tuple[Array, None]:
            y = self._attention(layer_norm(x, p["norm1_scale"], p["norm1_bias"], self.eps), p, causal)
            x = x + (y * p["scale1"] if self.scaled else y)
            y = layer_norm(x, p["norm2_scale"], p["norm2_bias"], self.eps) @ p["fc1_kernel"] + p["fc1_bias"]
            y = ACTIVATIONS[self.activation](y) @ p["fc2_kernel"] + p["fc2_bias"]
            return x + (y * p["scale2"] if self.scaled else y), None

        return lax.scan(block, x_BND, stacked)[0]

    def _attention(self, x: Array, p: Mapping[str, Array], causal: bool) -> Array:
        B, N, D = x.shape
        q, k, v = jnp.split(x @ p["qkv_kernel"] + p["qkv_bias"], 3, axis=-1)
        q, k, v = (part.reshape(B, N, D // HEAD, HEAD) for part in (q, k, v))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        return y.reshape(B, N, D) @ p["out_kernel"] + p["out_bias"]

    def expected(self, prefix: str, names: Names) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the arrays that a file holds for these blocks."""
        layers, width = self.norm1_scale.shape
        hidden = self.fc1_bias.shape[1]
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(layers):
            linear = dict.fromkeys((*names.qkv, names.out), (width, width))
            linear |= {names.mlp[0]: (hidden, width), names.mlp[1]: (width, hidden)}
            for name, shape in linear.items():
                shapes |= {f"{prefix}{i}.{name}.weight": shape, f"{prefix}{i}.{name}.bias": shape[:1]}
            for name in names.norms:
                shapes |= {f"{prefix}{i}.{name}.weight": (width,), f"{prefix}{i}.{name}.bias": (width,)}
            shapes |= {f"{prefix}{i}.{name}": (width,) for name in names.scales}
        return shapes

    def set_arrays(self, arrays: Mapping[str, np.ndarray], prefix: str, names: Names) -> None:
        """Fills the blocks from arrays that have been checked."""
        layers = self.norm1_scale.shape[0]

        def put(param: nnx.Param, parts: Sequence[str]) -> None:
            rows = []
            for i in range(layers):
                pieces = [np.asarray(arrays[f"{prefix}{i}.{part}"], np.float32) for part in parts]
                rows.append(np.concatenate([part.T if part.ndim == 2 else part for part in pieces], axis=-1))
            param.set_value(jnp.asarray(np.stack(rows)))

        linear = {"qkv": names.qkv, "out": (names.out,), "fc1": names.mlp[:1], "fc2": names.mlp[1:]}
        for ours, theirs in linear.items():
            put(getattr(self, f"{ours}_kernel"), [f"{name}.weight" for name in theirs])
            put(getattr(self, f"{ours}_bias"), [f"{name}.bias" for name in theirs])
        for i, name in enumerate(names.norms, start=1):
            put(getattr(self, f"norm{i}_scale"), [f"{name}.weight"])
            put(getattr(self, f"norm{i}_bias"), [f"{name}.bias"])
        for i, name in enumerate(names.scales, start=1):
            put(getattr(self, f"scale{i}"), [name])


def _param(value: Array) -> nnx.Param:
    return nnx.Param(value, axes=(None,) * value.ndim)


# ---------------------------------------------------------------------------------------------------- whole networks

# Our parameter -> (its name in a file, the file's axes in our order).
Table = Mapping[str, tuple[str, tuple[int, ...]]]
Shapes = Mapping[str, tuple[int, ...]]


def add_parameters(module: nnx.Module, table: Table, shapes: Shapes, network: str, *, key: jax.Array) -> None:
    """Gives a module random parameters in the shapes of a file; raises UserError if the file is of another network."""
    for (ours, (theirs, order)), part in zip(table.items(), jax.random.split(key, len(table)), strict=True):
        if len(_shape(shapes, theirs, network)) != len(order):
            raise UserError(f"these are not weights of {network}: {theirs} has the shape {shapes[theirs]}.")
        shape = tuple(shapes[theirs][axis] for axis in order)
        setattr(module, ours, _param(jax.random.normal(part, shape) * 0.02))


def tower(shapes: Shapes, prefix: str, names: Names, network: str, *, key: jax.Array, **kind: Any) -> Transformer:
    """The blocks that a file has under a prefix; `kind` as in `Transformer`, errors as in `add_parameters`."""
    hidden, width = _shape(shapes, f"{prefix}0.{names.mlp[0]}.weight", network)
    return Transformer(count_layers(list(shapes), prefix), width, hidden, key=key, **kind)


def _shape(shapes: Shapes, name: str, network: str) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"these are not weights of {network}: {name} is missing. Give the file of `transformers`.")
    return shapes[name]


def load(
    make: Callable[..., Any],
    path: epath.PathLike,
    network: str,
    table: Table,
    towers: Mapping[str, str],
    names: Names,
    unused: str,
) -> Any:
    """Makes a network of the arrays of a file, `.safetensors` or PyTorch's, or of the folder that holds it.

    Args:
      make: (shapes of the file, key=) -> the network.
      path: the file.
      network: the network's name.
      table: of its parameters outside the blocks.
      towers: prefix in the file -> attribute of the network that has the blocks.
      names: of the parts of a block.
      unused: how names end that the network has no use for.

    Raises:
      UserError: if the file is missing, damaged, or its arrays are not exactly those of the network, naming them.
    """
    arrays = {name: array for name, array in weights.read(path).items() if not name.endswith(unused)}
    shapes = {name: array.shape for name, array in arrays.items()}
    module = nnx.eval_shape(lambda: make(shapes, key=jax.random.key(0)))
    blocks = {prefix: getattr(module, attribute) for prefix, attribute in towers.items()}
    expected = {name: shapes[name] for name, _ in table.values()}
    for prefix, transformer in blocks.items():
        expected |= transformer.expected(prefix, names)
    weights.check(arrays, expected, str(path), network)
    for ours, (theirs, order) in table.items():
        getattr(module, ours).set_value(jnp.asarray(np.asarray(arrays[theirs], np.float32).transpose(order)))
    for prefix, transformer in blocks.items():
        transformer.set_arrays(arrays, prefix, names)
    return module


def patches(images_BHWC: Float[Array, "B H W C"], kernel: Float[Array, "P P C D"]) -> Float[Array, "B N D"]:
    """Embeds square patches, which do not overlap; what does not fill a patch is left out."""
    size = kernel.shape[0]
    B, H, W, C = images_BHWC.shape
    rows, columns = H // size, W // size
    x = images_BHWC[:, : rows * size, : columns * size].reshape(B, rows, size, columns, size, C)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(B, rows * columns, -1)
    return x @ kernel.reshape(-1, kernel.shape[-1])


def count_layers(names: Sequence[str], prefix: str) -> int:
    """How many layers the names of a file speak of."""
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)}
    return len({number for number in numbers if number.isdecimal()})
