"""How well a tokenizer reproduces images, and how much of its codebook it uses.

Shapes: B batch, H W C image, h w code grid, K codes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imagegpt_jax.metrics import common, frechet, kernels, protocols, statistics
from imagegpt_jax.parallel import sharding

if TYPE_CHECKING:
    from imagegpt_jax.metrics.features import Network

# PSNR of two equal images is infinite; it is counted as this, so that a mean over images exists.
MAX_PSNR = 100.0


def psnr_B(real_BHWC: jax.Array, fake_BHWC: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio of each image in dB, for values in [0, 255]; at most `MAX_PSNR`."""
    mse_B = jnp.mean(jnp.square(real_BHWC - fake_BHWC), axis=(1, 2, 3))
    peak = 255.0**2
    return 10 * jnp.log10(peak / jnp.maximum(mse_B, peak * 10 ** (-MAX_PSNR / 10)))


def _levels(images_BHWC: jax.Array) -> jax.Array:
    """[-1, 1] -> the 256 levels that a PNG would hold, as float32."""
    return jnp.round((jnp.clip(images_BHWC.astype(jnp.float32), -1, 1) + 1) * 127.5)


def _features(network: "Network", params: Any, levels_BHWC: jax.Array) -> jax.Array:
    """Features on the device, of images that are resized there as `prepare` does on the host."""
    if network.size:
        shape = (levels_BHWC.shape[0], network.size, network.size, levels_BHWC.shape[3])
        levels_BHWC = jnp.clip(jax.image.resize(levels_BHWC, shape, "cubic"), 0, 255)
    return network.apply(params, levels_BHWC)["pool"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _measure(
    reconstruct: Callable[..., Any],
    num_codes: int,
    num_shown: int,
    num_worst: int,
    features: Callable[[Any, jax.Array], jax.Array] | None,
    params: Any,
    batch: Any,
) -> dict[str, Any]:
    params, feature_params = params
    real_BHWC, mask_B = batch["image"], batch["mask"]
    fake_BHWC, codes_Bhw = reconstruct(params, real_BHWC)
    difference = fake_BHWC.astype(jnp.float32) - real_BHWC
    real_levels, fake_levels = _levels(real_BHWC), _levels(fake_BHWC)
    flat_levels = jnp.broadcast_to(jnp.round(jnp.mean(real_levels, axis=(1, 2), keepdims=True)), real_levels.shape)
    used = jnp.broadcast_to(mask_B[:, None], (mask_B.shape[0], codes_Bhw[0].size)).astype(jnp.int32)
    psnr = psnr_B(real_levels, fake_levels)
    compared = {}
    if num_worst:
        _, worst_n = jax.lax.top_k(jnp.where(mask_B, -psnr, -jnp.inf), min(num_worst, len(psnr)))
        compared["worst"] = jnp.stack([real_levels, fake_levels], axis=1)[worst_n].astype(jnp.uint8)
    if features is not None:
        compared["features"] = jnp.stack([features(feature_params, x) for x in (real_levels, fake_levels)])
    return compared | {
        "per_image": {
            "psnr": psnr,
            "psnr_mean_color": psnr_B(real_levels, flat_levels),
            "l1": jnp.mean(jnp.abs(difference), axis=(1, 2, 3)),
            "mse": jnp.mean(jnp.square(difference), axis=(1, 2, 3)),
        },
        "mask": mask_B,
        "counts_K": jnp.zeros(num_codes, jnp.int32).at[codes_Bhw.reshape(-1)].add(used.reshape(-1)),
        "shown": jnp.stack([real_levels, fake_levels])[:, :num_shown].astype(jnp.uint8),
    }


@dataclasses.dataclass(frozen=True)
class Details:
    """What scores of reconstructions were made of.

    Attributes:
      counts_K: int64 [K], how often each code was used.
      worst: uint8 [n, 2, H, W, C], images and reconstructions of the lowest PSNR, worst first, if they were asked for.
      psnr: float [n], of these.
    """

    counts_K: np.ndarray
    worst: np.ndarray
    psnr: np.ndarray


class _Worst:
    """The worst pairs so far."""

    def __init__(self, count: int):
        self._count = count
        self._pairs: list[np.ndarray] = []
        self._psnr: list[float] = []

    def add(self, psnr_B: np.ndarray, mask_B: np.ndarray, pairs_n: np.ndarray) -> None:
        """Takes a batch's worst pairs, of which those of rows that only fill it up come last."""
        found = np.sort(np.where(mask_B, psnr_B, np.inf))[: len(pairs_n)]
        real = np.isfinite(found)
        order = np.argsort([*self._psnr, *found[real]], kind="stable")[: self._count]
        pairs = [*self._pairs, *pairs_n[real]]
        values = [*self._psnr, *found[real].tolist()]
        self._pairs, self._psnr = [pairs[i] for i in order], [values[i] for i in order]

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(pairs, PSNR), worst first."""
        return np.array(self._pairs), np.array(self._psnr)


class Comparison:
    """A network that compares images with reconstructions, on the devices of a mesh."""

    def __init__(self, network: "Network", mesh: Mesh):
        self.network = network
        self.params = jax.device_put(network.params, sharding.replicated(mesh))
        # The same object every time, with which the compiled program is kept.
        self.features = functools.partial(_features, network)


class _Sets:
    """Features of images and of their reconstructions."""

    def __init__(self, name: str):
        self._name, self._moments, self._rows = name, [], []

    def add(self, features_2BD: np.ndarray) -> None:
        size = features_2BD.shape[-1]
        if not self._rows:
            self._moments = [statistics.Moments(size) for _ in range(2)]
            self._rows = [statistics.Rows(size) for _ in range(2)]
        for moments, rows, features in zip(self._moments, self._rows, features_2BD, strict=True):
            moments.add(features)
            rows.add(features)

    def result(self) -> dict[str, float]:
        real, fake = self._rows
        scores = {"kid": float(kernels.kid(fake, real, protocols.find("emoji").kid).mean())}
        if self._name == "inception":
            gaussians = [frechet.Gaussian.of(moments) for moments in self._moments]
            scores["rfid"] = frechet.distance(*gaussians)
        for rows in self._rows:
            rows.close()
        return scores


def evaluate(
    reconstruct: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]],
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    num_codes: int,
    mesh: Mesh,
    num_shown: int = 16,
    num_worst: int = 0,
    tell: Callable[["Details"], Any] = lambda details: None,
    compare: "Comparison | None" = None,
) -> tuple[dict[str, float], np.ndarray]:
    """Scores reconstructions of a whole split.

    Args:
      reconstruct: pure function (params, images_BHWC in [-1, 1]) -> (images_BHWC, codes_Bhw). Give the same function
        object every time: the compiled program is kept with it.
      params: its first argument.
      batches: {"image": [B, H, W, C] in [-1, 1], "mask": [B]} batches of this process's rows, every example once.
      num_codes: size of the codebook.
      mesh: devices to run on.
      num_shown: at most so many images, the first ones, go into the grid.
      num_worst: so many pairs of the lowest PSNR are told.
      tell: told what the scores were made of.
      compare: by whose features the reconstructions are compared with the images as sets; None leaves that out.

    Returns:
      (scores, grid). Scores: `psnr`, the mean over images of each image's PSNR in dB, rounded to 256 levels; its
      control `psnr_mean_color`, the same with every image replaced by its own mean colour; `l1` and `mse` of unrounded
      values in [-1, 1]; `codebook_usage`, the share of codes used over the whole split; `codebook_perplexity`, 2 to the
      entropy of code use; `images`, how many were scored; with `compare` `kid`, and of the FID Inception `rfid`.
      Grid: uint8 [2 H, n W, C], inputs over reconstructions.

    Raises:
      UserError: if there is no image.
    """
    worst = _Worst(num_worst)
    means, images, counts_K = common.Mean(), 0, np.zeros(num_codes, np.int64)
    shown: list[np.ndarray] = []
    features = None if compare is None else compare.features
    measure = functools.partial(_measure, reconstruct, num_codes, num_shown, num_worst, features)
    both = (params, None if compare is None else compare.params)
    compared = None if compare is None else _Sets(compare.network.name)
    for out in common.outputs(measure, both, batches, ("image", "mask"), mesh):
        if compared is not None:
            compared.add(out["features"][:, out["mask"]])
        means.add(out["per_image"], out["mask"])
        images += int(out["mask"].sum())
        counts_K += out["counts_K"]
        if num_worst:
            worst.add(out["per_image"]["psnr"], out["mask"], out["worst"])
        if sum(part.shape[1] for part in shown) < num_shown:
            shown.append(out["shown"][:, out["mask"][: out["shown"].shape[1]]])
    tell(Details(counts_K, *worst.pairs()))
    scores = means.result() | {
        "codebook_usage": float(np.mean(counts_K > 0)),
        "codebook_perplexity": 2.0 ** common.entropy_bits(counts_K),
        "images": float(images),
    }
    if compared is not None:
        scores |= compared.result()
    rows = np.concatenate(shown, axis=1)[:, :num_shown]
    return scores, np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
