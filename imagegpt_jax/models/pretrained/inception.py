"""Inception-v3 of the TensorFlow graph of 2015-12-05, the network that FID, IS and KID are defined by.

It differs from Szegedy et al. 2015 (arXiv:1512.00567) and from torchvision's in its poolings (averages leave the
padding out; the last block takes maxima) and in its 1008 classes. Batch normalisation is folded into the convolutions.

Shapes: B batch, H W pixels, C O channels, D = 2048 pooled features, S = 17 * 17 * 7 spatial features, K = 1008 classes.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from imagegpt_jax.models import winograd
from imagegpt_jax.models.pretrained import inception_torchscript, weights
from imagegpt_jax.parallel import sharding

SIZE = 299  # pixels of a side that the network works on
NUM_FEATURES, NUM_CLASSES = 2048, 1008
SPATIAL_CHANNELS = 7  # of Mixed_6d.branch1x1, what sFID is computed from (Nash et al. 2021, arXiv:2103.03841)
_BATCH_NORM_EPS = 1e-3
# On CPU Winograd is faster than XLA's convolution where images are large and channels few.
_WINOGRAD_MIN_SIDE = 30

FILE = weights.File(
    name="pt_inception-2015-12-05-6726825d.pth",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """What the network says of images.

    Attributes:
      pool: [B, D], the mean of the last layer over positions: FID, KID, precision and recall.
      spatial: [B, S], seven channels of Mixed_6d: sFID.
      logits: [B, K], class scores without their bias, as the Inception Score is defined by.
    """

    pool: Float[Array, "B D"]
    spatial: Float[Array, "B S"]
    logits: Float[Array, "B K"]


def resize(x_BHWC: Float[Array, "B H W C"], size: int = SIZE) -> Float[Array, "B size size C"]:
    """TensorFlow 1's `resize_bilinear`: corners are not aligned, pixels not centred, and nothing is averaged."""
    for axis in (1, 2):
        length = x_BHWC.shape[axis]
        place = np.arange(size, dtype=np.float32) * np.float32(length / size)
        low = place.astype(np.int32)
        shape = [1, 1, 1, 1]
        shape[axis] = size
        share = (place - low.astype(np.float32)).reshape(shape)
        before = jnp.take(x_BHWC, low, axis=axis)
        x_BHWC = before + (jnp.take(x_BHWC, np.minimum(low + 1, length - 1), axis=axis) - before) * share
    return x_BHWC


# ------------------------------------------------------------------------------------------------------------ pooling
# As maxima and sums of shifted slices, which XLA fuses: its own window reductions are four times as slow on CPU.


def _max_pool(x_BHWC: Array, stride: int) -> Array:
    """3x3 maxima; with stride 1 the sides keep their length."""
    for axis in (1, 2):
        if stride == 1:
            padding = [(0, 0)] * 4
            padding[axis] = (1, 1)
            x_BHWC = jnp.pad(x_BHWC, padding, constant_values=-jnp.inf)
        last = x_BHWC.shape[axis] - 2
        parts = [lax.slice_in_dim(x_BHWC, i, i + last, stride, axis) for i in range(3)]
        x_BHWC = jnp.maximum(jnp.maximum(parts[0], parts[1]), parts[2])
    return x_BHWC


def _avg_pool(x_BHWC: Array) -> Array:
    """3x3 means with stride 1 over the pixels that are there."""
    for axis in (1, 2):
        length = x_BHWC.shape[axis]
        padding = [(0, 0)] * 4
        padding[axis] = (1, 1)
        padded = jnp.pad(x_BHWC, padding)
        parts = [lax.slice_in_dim(padded, i, i + length, 1, axis) for i in range(3)]
        shape = [1, 1, 1, 1]
        shape[axis] = length
        count = np.full(length, 3, np.float32)
        count[[0, -1]] -= 1
        x_BHWC = (parts[0] + parts[1] + parts[2]) * (1 / count).reshape(shape)
    return x_BHWC


# ------------------------------------------------------------------------------------------------------------- blocks


class Unit(nnx.Module):
    """Convolution, bias, ReLU; the names of its weights in files are those of a convolution and a batch norm."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        same: bool = True,
        key: jax.Array,
    ):
        """Makes the layer; `same` pads with zeros so that stride 1 keeps the sides."""
        height, width = (size, size) if isinstance(size, int) else size
        init = jax.nn.initializers.he_normal(in_axis=(0, 1, 2))
        self.kernel = nnx.Param(init(key, (height, width, c_in, c_out)), axes=(None, None, None, None))
        self.bias = nnx.Param(jnp.zeros(c_out), axes=(None,))
        self.stride = stride
        self.padding = ((height // 2, height // 2), (width // 2, width // 2)) if same else ((0, 0), (0, 0))

    def __call__(self, x_BHWC: Array) -> Array:
        """Applies the layer."""
        kernel = self.kernel[...]
        if kernel.shape[:2] == (1, 1):
            y = x_BHWC @ kernel[0, 0]
        elif kernel.shape[:2] == (3, 3) and self.stride == 1 and self._use_winograd(x_BHWC):
            y = self._winograd(x_BHWC, kernel)
        else:
            y = lax.conv_general_dilated(
                x_BHWC, kernel, (self.stride,) * 2, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return nnx.relu(y + self.bias[...])

    def _use_winograd(self, x_BHWC: Array) -> bool:
        return x_BHWC.shape[1] >= _WINOGRAD_MIN_SIDE and sharding.platform() == "cpu"

    def _winograd(self, x_BHWC: Array, kernel: Array) -> Array:
        # Sides are filled up to whole tiles; without padding the first row and column fall away.
        _, height, width, _ = x_BHWC.shape
        x = jnp.pad(x_BHWC, ((0, 0), (0, -height % winograd.TILE), (0, -width % winograd.TILE), (0, 0)))
        first = 1 - self.padding[0][0]
        return winograd.conv3x3(x, kernel)[:, first : height - first, first : width - first]


class BlockA(nnx.Module):
    """35 x 35 positions."""

    def __init__(self, c_in: int, pool: int, key: jax.Array):
        keys = jax.random.split(key, 7)
        self.branch1x1 = Unit(c_in, 64, key=keys[0])
        self.branch5x5_1 = Unit(c_in, 48, key=keys[1])
        self.branch5x5_2 = Unit(48, 64, 5, key=keys[2])
        self.branch3x3dbl_1 = Unit(c_in, 64, key=keys[3])
        self.branch3x3dbl_2 = Unit(64, 96, 3, key=keys[4])
        self.branch3x3dbl_3 = Unit(96, 96, 3, key=keys[5])
        self.branch_pool = Unit(c_in, pool, key=keys[6])

    def __call__(self, x: Array) -> Array:
        """Applies the block."""
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([self.branch1x1(x), five, three, self.branch_pool(_avg_pool(x))], axis=-1)


class BlockB(nnx.Module):
    """From 35 x 35 to 17 x 17 positions."""

    def __init__(self, c_in: int, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.branch3x3 = Unit(c_in, 384, 3, stride=2, same=False, key=keys[0])
        self.branch3x3dbl_1 = Unit(c_in, 64, key=keys[1])
        self.branch3x3dbl_2 = Unit(64, 96, 3, key=keys[2])
        self.branch3x3dbl_3 = Unit(96, 96, 3, stride=2, same=False, key=keys[3])

    def __call__(self, x: Array) -> Array:
        """Applies the block."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([self.branch3x3(x), double, _max_pool(x, 2)], axis=-1)


class BlockC(nnx.Module):
    """17 x 17 positions."""

    def __init__(self, c_in: int, middle: int, key: jax.Array):
        keys = jax.random.split(key, 10)
        self.branch1x1 = Unit(c_in, 192, key=keys[0])
        self.branch7x7_1 = Unit(c_in, middle, key=keys[1])
        self.branch7x7_2 = Unit(middle, middle, (1, 7), key=keys[2])
        self.branch7x7_3 = Unit(middle, 192, (7, 1), key=keys[3])
        self.branch7x7dbl_1 = Unit(c_in, middle, key=keys[4])
        self.branch7x7dbl_2 = Unit(middle, middle, (7, 1), key=keys[5])
        self.branch7x7dbl_3 = Unit(middle, middle, (1, 7), key=keys[6])
        self.branch7x7dbl_4 = Unit(middle, middle, (7, 1), key=keys[7])
        self.branch7x7dbl_5 = Unit(middle, 192, (1, 7), key=keys[8])
        self.branch_pool = Unit(c_in, 192, key=keys[9])

    def __call__(self, x: Array) -> Array:
        """Applies the block."""
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return jnp.concatenate([self.branch1x1(x), single, double, self.branch_pool(_avg_pool(x))], axis=-1)


class BlockD(nnx.Module):
    """From 17 x 17 to 8 x 8 positions."""

    def __init__(self, c_in: int, key: jax.Array):
        keys = jax.random.split(key, 6)
        self.branch3x3_1 = Unit(c_in, 192, key=keys[0])
        self.branch3x3_2 = Unit(192, 320, 3, stride=2, same=False, key=keys[1])
        self.branch7x7x3_1 = Unit(c_in, 192, key=keys[2])
        self.branch7x7x3_2 = Unit(192, 192, (1, 7), key=keys[3])
        self.branch7x7x3_3 = Unit(192, 192, (7, 1), key=keys[4])
        self.branch7x7x3_4 = Unit(192, 192, 3, stride=2, same=False, key=keys[5])

    def __call__(self, x: Array) -> Array:
        """Applies the block."""
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return jnp.concatenate(
            [self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), _max_pool(x, 2)], axis=-1
        )


class BlockE(nnx.Module):
    """8 x 8 positions. The last of the two pools by maxima, an oddity of the graph that the weights were trained in."""

    def __init__(self, c_in: int, pool: str, key: jax.Array):
        keys = jax.random.split(key, 9)
        self.branch1x1 = Unit(c_in, 320, key=keys[0])
        self.branch3x3_1 = Unit(c_in, 384, key=keys[1])
        self.branch3x3_2a = Unit(384, 384, (1, 3), key=keys[2])
        self.branch3x3_2b = Unit(384, 384, (3, 1), key=keys[3])
        self.branch3x3dbl_1 = Unit(c_in, 448, key=keys[4])
        self.branch3x3dbl_2 = Unit(448, 384, 3, key=keys[5])
        self.branch3x3dbl_3a = Unit(384, 384, (1, 3), key=keys[6])
        self.branch3x3dbl_3b = Unit(384, 384, (3, 1), key=keys[7])
        self.branch_pool = Unit(c_in, 192, key=keys[8])
        self.pool = pool

    def __call__(self, x: Array) -> Array:
        """Applies the block."""
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(_avg_pool(x) if self.pool == "avg" else _max_pool(x, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


# ------------------------------------------------------------------------------------------------------------ network


class Inception(nnx.Module):
    """The frozen network; attributes are named as in the PyTorch files of its weights."""

    def __init__(self, *, key: jax.Array):
        """Makes the network with random weights; `load` makes the trained one."""
        keys = iter(jax.random.split(key, 17))
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2, same=False, key=next(keys))
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, same=False, key=next(keys))
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, key=next(keys))
        self.Conv2d_3b_1x1 = Unit(64, 80, key=next(keys))
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, same=False, key=next(keys))
        self.Mixed_5b = BlockA(192, 32, next(keys))
        self.Mixed_5c = BlockA(256, 64, next(keys))
        self.Mixed_5d = BlockA(288, 64, next(keys))
        self.Mixed_6a = BlockB(288, next(keys))
        self.Mixed_6b = BlockC(768, 128, next(keys))
        self.Mixed_6c = BlockC(768, 160, next(keys))
        self.Mixed_6d = BlockC(768, 160, next(keys))
        self.Mixed_6e = BlockC(768, 192, next(keys))
        self.Mixed_7a = BlockD(768, next(keys))
        self.Mixed_7b = BlockE(1280, "avg", next(keys))
        self.Mixed_7c = BlockE(2048, "max", next(keys))
        init = jax.nn.initializers.normal(NUM_FEATURES**-0.5)
        self.head = nnx.Param(init(next(keys), (NUM_FEATURES, NUM_CLASSES)), axes=(None, None))

    @classmethod
    def load(cls, path: epath.PathLike) -> "Inception":
        """Reads PyTorch's file of the weights (`FILE`), or NVIDIA's TorchScript; errors as `weights.set_units`."""
        model = nnx.eval_shape(lambda: cls(key=jax.random.key(0)))
        arrays = weights.read(path)
        arrays = inception_torchscript.renamed(arrays) if inception_torchscript.is_torchscript(arrays) else arrays
        model.set_arrays(arrays, str(path))
        return model

    def units(self) -> Iterator[tuple[str, Unit]]:
        """The convolutions and their names in files."""
        for name, part in vars(self).items():
            if isinstance(part, Unit):
                yield name, part
            elif isinstance(part, nnx.Module):
                yield from ((f"{name}.{inner}", unit) for inner, unit in vars(part).items() if isinstance(unit, Unit))

    def set_arrays(self, arrays: Mapping[str, np.ndarray], source: str) -> None:
        """Replaces all parameters by those of a PyTorch state dict; errors as `weights.set_units`."""
        units = [(f"{name}.conv", f"{name}.bn", unit) for name, unit in self.units()]
        others = {"fc.weight": (NUM_CLASSES, NUM_FEATURES), "fc.bias": (NUM_CLASSES,)}
        weights.set_units(units, arrays, _BATCH_NORM_EPS, source, "the FID Inception-v3", others)
        self.head.set_value(jnp.asarray(arrays["fc.weight"].T, jnp.float32))

    def __call__(self, images_BHWC: Float[Array, "B H W 3"]) -> Features:
        """Features of images in [0, 255]; sides other than 299 are resized as the graph does."""
        x: Any = images_BHWC.astype(jnp.float32)
        if x.shape[1:3] != (SIZE, SIZE):
            x = resize(x)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = _max_pool(x, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = _max_pool(x, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[..., :SPATIAL_CHANNELS]
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pool = jnp.mean(x, axis=(1, 2))
        return Features(pool, spatial.reshape(len(x), -1), pool @ self.head[...])
