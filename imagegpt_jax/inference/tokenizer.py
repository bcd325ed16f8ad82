"""A loaded image tokenizer: images to codes and back.

Everything runs in batches of a fixed number of rows per device, the last one padded, so that what happens to an image
does not depend on what else is in the call.

Shapes: B batch, H W C image, h w code grid, L = h * w codes in raster order.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from imagegpt_jax import images as images_lib
from imagegpt_jax import train_state
from imagegpt_jax.convert import reading
from imagegpt_jax.errors import UserError
from imagegpt_jax.inference import runs
from imagegpt_jax.parallel import padding, sharding
from imagegpt_jax.tasks import tokenizer as tokenizer_task

# Images that run at once on each device. A multiple of 3: on CPU, products round what is left over of 24 or 48 rows (of
# pixels) another way, and an image's bits would depend on whether it is the last of the batch.
BATCH_SIZE = 9

Images = np.ndarray | jax.Array


class Tokenizer:
    """An image tokenizer: images to codes and back. Made by `load_tokenizer`.

    Attributes:
      config: its model's config (`models.vq.VQConfig`).
      path: workdir it was loaded from; "" for an untrained one.
      step: its checkpoint; 0 for an untrained one.
      downsample: pixels per code along each side.
      num_codes: number of different codes.
      batch_size: images that run at once, on all devices.
    """

    def __init__(
        self,
        setup: tokenizer_task.Setup,
        params: train_state.Params,
        *,
        path: str,
        step: int,
        batch_size: int = BATCH_SIZE,
    ):
        """Puts the parameters of "generator" onto every device of this process; `batch_size` is of each device."""
        self._mesh = mesh = sharding.local_mesh()
        self.config = setup.model
        self.path, self.step = path, step
        self.downsample, self.num_codes = self.config.downsample, self.config.quantizer.num_ids
        self.batch_size = batch_size * mesh.size
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._sharding = sharding.batch_sharding(mesh)
        predict = tokenizer_task.predict_fns(setup)
        self._encode, self._decode = jax.jit(predict["encode"]), jax.jit(predict["decode"])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies architecture and parameters: 16 hexadecimal digits of a SHA-256."""
        return fingerprint(self.config, self._params)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the codes of an image; where a vector has several codes, they stand beside each other."""
        per_vector = self.config.quantizer.codes_per_vector
        return height // self.downsample, width // self.downsample * per_vector

    def __repr__(self) -> str:
        about = f"step={self.step}, downsample={self.downsample}, num_codes={self.num_codes}"
        return f"Tokenizer({self.path!r}, {about})"

    def encode(self, images_BHWC: Any, *, value_range: tuple[int, int] | None = None) -> np.ndarray:
        """Images to codes.

        Args:
          images_BHWC: uint8, float in [-1, 1], or one or many of Pillow's pictures; height and width are multiples of
            `downsample`.
          value_range: of floats, (-1, 1) or (0, 1). By default they are taken to lie in [-1, 1], and images that might
            as well lie in [0, 1] are refused.

        Returns:
          int32 [B, L], the codes in raster order.

        Raises:
          UserError: for images of another shape, type or range.
        """
        images = _array(images_BHWC)
        if images.ndim != 4 or not len(images):
            raise UserError(f"images are [B, H, W, C] with B >= 1, and these have the shape {images.shape}.")
        if images.dtype == np.uint8:
            images = images.astype(np.float32) * np.float32(2 / 255) - np.float32(1)
        elif images.dtype.kind != "f" and images.dtype != jnp.bfloat16:
            raise UserError(f"images are uint8, or float in [-1, 1], and these are {images.dtype}.")
        elif value_range not in (None, (-1, 1), (0, 1)):
            raise UserError(f"value_range={value_range} must be (-1, 1) or (0, 1).")
        elif not (np.min(images) >= (low := value_range[0] if value_range else -1) - 0.001 and np.max(images) <= 1.001):
            raise UserError(
                f"float images lie in [{low}, 1], and these in [{np.min(images):g}, {np.max(images):g}]: give uint8, or"
                " divide by 127.5 and subtract 1."
            )
        elif value_range is None and np.min(images) >= 0:
            raise UserError(
                "float images of which no value is below 0 may lie in [0, 1] or in [-1, 1]: give uint8, or say"
                " value_range=(0, 1) or value_range=(-1, 1)."
            )
        elif value_range == (0, 1):
            images = images.astype(np.float32) * 2 - 1
        codes_Bhw = self._in_tiles(self._encode, images.astype(np.float32))
        return codes_Bhw.reshape(len(codes_Bhw), -1)

    def decode(self, codes_BL: Images, grid: tuple[int, int] | None = None) -> np.ndarray:
        """Codes to images.

        Args:
          codes_BL: integers in [0, num_codes), raster order.
          grid: (rows, columns) of the codes; square by default.

        Returns:
          float32 [B, H, W, C] in [-1, 1].

        Raises:
          UserError: for codes outside the codebook, or that do not fill the grid.
        """
        codes = np.asarray(codes_BL)
        if codes.ndim != 2 or not codes.size or codes.dtype.kind not in "iu":
            raise UserError(f"codes are integers [B, L], and these are {codes.dtype} of shape {codes.shape}.")
        side = math.isqrt(codes.shape[1] // self.config.quantizer.codes_per_vector)
        rows, columns = grid or (side, side * self.config.quantizer.codes_per_vector)
        if rows * columns != codes.shape[1]:
            given = f"the grid {rows} x {columns}" if grid else "a square: give grid=(rows, columns)"
            raise UserError(f"{codes.shape[1]} codes do not fill {given}.")
        if codes.min() < 0 or codes.max() >= self.num_codes:
            raise UserError(f"codes lie in 0 to {self.num_codes - 1}, and these in {codes.min()} to {codes.max()}.")
        images_BHWC = self._in_tiles(self._decode, codes.astype(np.int32).reshape(-1, rows, columns))
        return np.clip(images_BHWC, -1, 1)

    def _in_tiles(self, fn: Callable[..., jax.Array], inputs: np.ndarray) -> np.ndarray:
        """Runs `fn` over batches of rows."""

        def run(batch: np.ndarray) -> jax.Array:
            with jax.set_mesh(self._mesh):  # the caller may be at work on a mesh of all processes' devices
                return fn(self._params, jax.device_put(batch, self._sharding))

        return padding.map_batches(run, self.batch_size, inputs)


def _array(images: Any) -> np.ndarray:
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, list | tuple):
        return np.stack([images_lib.read_picture(i) if isinstance(i, Image.Image) else np.asarray(i) for i in images])
    return np.asarray(images)


def fingerprint(config: Any, params: Any) -> str:
    """Identifies an architecture and its parameters: 16 hexadecimal digits of a SHA-256."""
    digest = hashlib.sha256(repr(config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def read_tokenizer(
    path: epath.PathLike, step: int | None = None
) -> tuple[tokenizer_task.Setup, train_state.Params, int]:
    """Static part, parameters and step of an image tokenizer; errors as in `load_tokenizer`."""
    if reading.is_weights(path):
        loaded = reading.load(path, "tokenizer")
        return tokenizer_task.setup_for_weights(loaded.config, loaded.network), loaded.params, 0
    run = runs.read(path, "tokenizer", step)
    return run.setup, run.params, run.step


def load_tokenizer(path: epath.PathLike, step: int | None = None, *, batch_size: int = BATCH_SIZE) -> Tokenizer:
    """Loads an image tokenizer.

    Args:
      path: workdir of its training run; or weights: a portable folder, or the file or folder of a published system,
        recognised by content (docs/weights.md).
      step: checkpoint of a run; the newest by default.
      batch_size: images that each device runs at once.

    Raises:
      UserError: if there is no such run, checkpoint or tokenizer.
    """
    setup, params, step = read_tokenizer(path, step)
    return Tokenizer(setup, params, path=str(path), step=step, batch_size=batch_size)
