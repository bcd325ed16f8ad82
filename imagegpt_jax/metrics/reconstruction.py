"""How well a tokenizer reproduces images, and how much of its codebook it uses.

Shapes: B batch, H W C image, h w code grid, K codes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imagegpt_jax.metrics import common, protocols, score
from imagegpt_jax.metrics.evaluator import Evaluation
from imagegpt_jax.metrics.feature_statistics import MOMENTS, ROWS, FeatureStatistics
from imagegpt_jax.metrics.features import Network
from imagegpt_jax.parallel import sharding

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


def _features(network: Network, params: Any, levels_BHWC: jax.Array) -> jax.Array:
    """Features on the device, of images that are resized there as `prepare` does on the host."""
    if network.size:
        shape = (levels_BHWC.shape[0], network.size, network.size, levels_BHWC.shape[3])
        levels_BHWC = jnp.clip(jax.image.resize(levels_BHWC, shape, "cubic"), 0, 255)
    return network.apply(params, levels_BHWC)["pool"]


def _measure(
    reconstruct: Callable[..., Any],
    num_codes: int,
    num_shown: int,
    num_worst: int,
    network: Network | None,
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
    if network is not None:
        compared["features"] = jnp.stack([_features(network, feature_params, x) for x in (real_levels, fake_levels)])
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


def _worst(out: Mapping[str, Any]) -> list[tuple[float, np.ndarray]]:
    """(PSNR, pair) of a batch's worst pairs, of which those of rows that only fill it up come last and are left out."""
    lowest = np.sort(np.where(out["mask"], out["per_image"]["psnr"], np.inf))[: len(out["worst"])]
    real = np.isfinite(lowest)
    return list(zip(lowest[real].tolist(), out["worst"][real], strict=True))


def _set_scores(network: str, real: FeatureStatistics, fake: FeatureStatistics) -> dict[str, float]:
    """KID, and rFID of the FID Inception, of reconstructions; frees the features."""
    protocol = dataclasses.replace(protocols.find("emoji"), features=network)
    scores = {"kid": score.compute(["kid"], fake, real, protocol)["kid"]["value"]}
    if real.moments:  # the distance is symmetric, but for its last bits
        scores["rfid"] = score.compute(["fid"], real, fake, protocol)["fid"]["value"]
    for gathered in (real, fake):
        gathered.close()
    return scores


class ReconstructionEvaluator:
    """Scores a tokenizer by its reconstructions of a whole split, and by how much of its codebook it uses."""

    def __init__(
        self,
        reconstruct: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]],
        batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
        num_codes: int,
        mesh: Mesh,
        *,
        name: str = "generator",
        network: Network | None = None,
        prefix: str = "",
        rows: int = 0,
        num_shown: int = 16,
        num_worst: int = 0,
    ):
        """Compiles nothing yet.

        Args:
          reconstruct: pure function (params, images_BHWC in [-1, 1]) -> (images_BHWC, codes_Bhw).
          batches: {"image": [B, H, W, C] in [-1, 1], "mask": [B]} batches of this process's rows, every example once.
          num_codes: size of the codebook.
          mesh: devices to run on.
          name: of the network whose parameters `reconstruct` takes.
          network: by whose features the reconstructions are compared with the images as sets; None leaves that out.
          prefix: of the names of scores and images.
          rows: of a device at once, see `common.outputs`.
          num_shown: at most so many images, the first ones, go into the grid.
          num_worst: so many pairs of the lowest PSNR are kept.
        """
        self._batches, self._num_codes, self._mesh, self._rows = batches, num_codes, mesh, rows
        self._name, self._prefix, self._num_shown, self._num_worst = name, prefix, num_shown, num_worst
        self._network, replicated = network, sharding.replicated(mesh)
        self._feature_params = None if network is None else jax.device_put(network.params, replicated)
        self._measure = jax.jit(functools.partial(_measure, reconstruct, num_codes, num_shown, num_worst, network))

    def evaluate(self, params: Mapping[str, Any], step: int) -> Evaluation:
        """Scores reconstructions.

        Returns:
          Scores: `psnr`, the mean over images of each image's PSNR in dB, rounded to 256 levels; its control
          `psnr_mean_color`, the same with every image replaced by its own mean colour; `l1` and `mse` of unrounded
          values in [-1, 1]; `codebook_usage`, the share of codes used over the whole split; `codebook_perplexity`, 2 to
          the entropy of code use; `images`, how many were scored; with a feature network `kid`, and of the FID
          Inception `rfid`. Image `reconstructions`: [1, 2 H, n W, C], inputs over reconstructions. Details: `counts_K`,
          int64 [K], how often each code was used; `worst`, uint8 [n, 2, H, W, C], images and reconstructions of the
          lowest PSNR, worst first; `worst_psnr`, [n], of these.

        Raises:
          UserError: if there is no image.
        """
        del step
        worst: list[tuple[float, np.ndarray]] = []
        means, images, counts_K = common.Mean(), 0, np.zeros(self._num_codes, np.int64)
        shown: list[np.ndarray] = []
        # Of images and of their reconstructions, whose pixels are not hashed.
        network = "" if self._network is None else self._network.name
        sets = [FeatureStatistics(np.zeros((0, 32), np.uint8)) for _ in range(2 if network else 0)]
        forms = (ROWS, MOMENTS) if network == "inception" else (ROWS,)
        both = (params[self._name], self._feature_params)
        columns = ("image", "mask")
        for out in common.outputs(self._measure, both, self._batches(), columns, self._mesh, self._rows):
            for gathered, features_BD in zip(sets, out.get("features", ()), strict=True):
                for form in forms:
                    gathered.add(form, (network, "pool"), features_BD[out["mask"]])
            means.add(out["per_image"], out["mask"])
            images += int(out["mask"].sum())
            counts_K += out["counts_K"]
            if self._num_worst:
                worst = sorted([*worst, *_worst(out)], key=lambda kept: kept[0])[: self._num_worst]
            if sum(part.shape[1] for part in shown) < self._num_shown:
                shown.append(out["shown"][:, out["mask"][: out["shown"].shape[1]]])
        scores = means.result() | {
            "codebook_usage": float(np.mean(counts_K > 0)),
            "codebook_perplexity": 2.0 ** common.entropy_bits(counts_K),
            "images": float(images),
        }
        if network:
            scores |= _set_scores(network, *sets)
        rows = np.concatenate(shown, axis=1)[:, : self._num_shown]
        grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
        return Evaluation(
            {f"{self._prefix}{name}": value for name, value in scores.items()},
            {f"{self._prefix}reconstructions": grid[None]},
            {
                "counts_K": counts_K,
                "worst": np.array([pair for _, pair in worst]),
                "worst_psnr": np.array([psnr for psnr, _ in worst]),
            },
        )
