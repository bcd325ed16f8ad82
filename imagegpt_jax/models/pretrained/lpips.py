"""LPIPS, the learned perceptual distance between images (Zhang et al. 2018, arXiv:1801.03924).

Weights come from a safetensors file that `tools/convert_lpips.py` makes once, or from the two files that everybody has:
torchvision's classifier and the linear heads of PyPI's `lpips`.
Shapes: B batch, H W pixels, C channels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from imagegpt_jax.config import choose
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.conv import Conv
from imagegpt_jax.models.pretrained import weights

# ImageNet's mean and deviation, for pixels in [-1, 1]; the rounding is LPIPS's own and belongs to its weights.
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution with ReLU, perhaps after max pooling; `tap` layers are compared."""

    width: int
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0  # window of the max pooling of stride 2 before the convolution; 0 is none
    tap: bool = True


# The convolutions of torchvision's classifiers, up to the last that LPIPS compares.
NETWORKS: Mapping[str, tuple[Layer, ...]] = {
    "alexnet": (
        Layer(64, kernel_size=11, stride=4, padding=2),
        Layer(192, kernel_size=5, padding=2, pool=3),
        Layer(384, pool=3),
        Layer(256),
        Layer(256),
    ),
    "vgg16": (
        Layer(64, tap=False),
        Layer(64),
        Layer(128, pool=2, tap=False),
        Layer(128),
        Layer(256, pool=2, tap=False),
        Layer(256, tap=False),
        Layer(256),
        Layer(512, pool=2, tap=False),
        Layer(512, tap=False),
        Layer(512),
        Layer(512, pool=2, tap=False),
        Layer(512, tap=False),
        Layer(512),
    ),
}
# Numbers of torchvision's convolutions within `features`, and what the heads' file of `lpips` is called.
_TORCHVISION: Mapping[str, tuple[tuple[int, ...], str]] = {
    "alexnet": ((0, 3, 6, 8, 10), "alex.pth"),
    "vgg16": ((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "vgg.pth"),
}
MIN_SIZE = {"alexnet": 31, "vgg16": 16}  # smaller images have no pixel left at the last layer


class LPIPS(nnx.Module):
    """Perceptual distance by the features of a frozen classifier; gradients reach the images only."""

    def __init__(self, network: str = "vgg16", *, dtype: Any = "float32", key: jax.Array):
        """Makes the network with random float32 weights, to compute in `dtype`; `load` makes the trained one."""
        layers = choose("LPIPS network", network, NETWORKS)
        keys = jax.random.split(key, len(layers))
        widths = [3, *(layer.width for layer in layers)]
        self.convs = nnx.List(
            Conv(
                widths[i],
                layer.width,
                layer.kernel_size,
                stride=layer.stride,
                padding=(layer.padding, layer.padding),
                dtype=dtype,
                key=keys[i],
            )
            for i, layer in enumerate(layers)
        )
        self.heads = nnx.List(
            nnx.Param(jnp.full(layer.width, 1 / layer.width, jnp.float32), axes=(None,))
            for layer in layers
            if layer.tap
        )
        self.network, self.dtype = network, dtype

    @classmethod
    def load(cls, path: epath.PathLike) -> "LPIPS":
        """Reads weights made by `tools/convert_lpips.py`, or a folder with torchvision's file and the heads of `lpips`.

        The folder holds `vgg16-397923af.pth` and `vgg.pth`, or `alexnet-owt-7be5be79.pth` and `alex.pth`.

        Raises:
          UserError: if the file is missing, is not such a file, or its arrays are not exactly those of the network.
        """
        file = epath.Path(path)
        if file.is_dir():
            return cls._load_torchvision(file)
        command = f"python tools/convert_lpips.py --network=vgg16 --output={file}"
        if not file.is_file():
            raise UserError(f"there are no LPIPS weights at {file}: make them with `{command}`.")
        try:
            arrays = safetensors.numpy.load(file.read_bytes())
        except safetensors.SafetensorError as e:
            raise UserError(f"{file} is not a whole safetensors file ({e}): make it again with `{command}`.") from e
        layers = sum(name.endswith(".kernel") for name in arrays)
        network = next((name for name, known in NETWORKS.items() if len(known) == layers), None)
        if network is None:
            raise UserError(f"{file} does not hold LPIPS weights: make them with `{command}`.")
        model = nnx.eval_shape(lambda: cls(network, key=jax.random.key(0)))
        model.set_arrays(arrays, str(file))
        return model

    @classmethod
    def _load_torchvision(cls, folder: epath.Path) -> "LPIPS":
        for network, (numbers, heads) in _TORCHVISION.items():
            backbone = next(iter(sorted(folder.glob(f"{network}*.pth"))), None)
            if backbone is None or not (folder / heads).exists():
                continue
            features, linear = weights.read(backbone), weights.read(folder / heads)
            arrays = {f"heads.{i}": linear[name].reshape(-1) for i, name in enumerate(sorted(linear))}
            for i, number in enumerate(numbers):
                names = [f"features.{number}.{part}" for part in ("weight", "bias")]
                if not set(names) <= features.keys():
                    raise UserError(f"{backbone} has no {names[0]}: give torchvision's file of {network}.")
                arrays[f"convs.{i}.kernel"] = features[names[0]].transpose(2, 3, 1, 0)
                arrays[f"convs.{i}.bias"] = features[names[1]]
            model = nnx.eval_shape(lambda network=network: cls(network, key=jax.random.key(0)))
            model.set_arrays(arrays, f"{backbone} and {heads}")
            return model
        raise UserError(
            f"{folder} does not hold the weights of LPIPS: vgg16-397923af.pth and vgg.pth, or alexnet-owt-7be5be79.pth"
            " and alex.pth."
        )

    def parameters(self) -> dict[str, nnx.Param]:
        """The parameters by their names in the weight file: `convs.<i>.kernel`, `convs.<i>.bias`, `heads.<i>`."""
        named: dict[str, Any] = {f"heads.{i}": head for i, head in enumerate(self.heads)}
        for i, conv in enumerate(self.convs):
            named |= {f"convs.{i}.kernel": conv.kernel, f"convs.{i}.bias": conv.bias}
        return named

    def set_arrays(self, arrays: Mapping[str, np.ndarray], source: str) -> None:
        """Replaces all parameters; raises UserError naming arrays that are missing, unknown or of another shape."""
        params = self.parameters()
        weights.check(arrays, {name: param.shape for name, param in params.items()}, source, f"LPIPS {self.network}")
        for name, param in params.items():
            param.set_value(jnp.asarray(arrays[name], jnp.float32))

    def __call__(self, a_BHWC: Float[Array, "B H W 3"], b_BHWC: Float[Array, "B H W 3"]) -> Float[Array, "B"]:
        """Distance of each pair of images in [-1, 1], 0 for equal ones; raises UserError below `MIN_SIZE`."""
        _, H, W, _ = a_BHWC.shape
        if min(H, W) < MIN_SIZE[self.network]:
            raise UserError(
                f"images of {H} x {W} pixels are too small for LPIPS {self.network}: it needs {MIN_SIZE[self.network]}"
                " pixels or more, so set loss.lpips=0 or train on larger images."
            )
        frozen = jax.tree.map(lax.stop_gradient, self)
        pairs = zip(frozen._features(a_BHWC), frozen._features(b_BHWC), frozen.heads, strict=True)
        # Unit vectors at each position, squared differences weighted per channel, averaged over positions, summed.
        return sum(  # type: ignore[return-value]
            jnp.mean(jnp.square(_unit(a) - _unit(b)) @ head[...], axis=(1, 2)) for a, b, head in pairs
        )

    def _features(self, x_BHWC: Array) -> list[Array]:
        taps = []
        x = (x_BHWC.astype(self.dtype) - SHIFT) / SCALE
        for layer, conv in zip(NETWORKS[self.network], self.convs, strict=True):
            if layer.pool:
                x = nnx.max_pool(x, (layer.pool, layer.pool), (2, 2))
            x = nnx.relu(conv(x))
            if layer.tap:
                taps.append(x)
        return taps


def _unit(x_BHWC: Array) -> Array:
    # Where all features are off, the bound keeps the square root's gradient finite.
    square = jnp.maximum(jnp.sum(jnp.square(x_BHWC), axis=-1, keepdims=True), 1e-20)
    return x_BHWC / (jnp.sqrt(square) + 1e-10)
