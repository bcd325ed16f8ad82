"""Scores of a tokenizer: how well it reproduces images, and how much of its codebook it uses."""

import jax
import numpy as np
from jax.sharding import Mesh

from imagegpt_jax.evaluation import checkpoint_data
from imagegpt_jax.evaluation.checkpoint_data import Page, Scores, Settings
from imagegpt_jax.evaluation.image_sets import score_sets
from imagegpt_jax.inference import loading
from imagegpt_jax.inference.tokenizer import read_tokenizer
from imagegpt_jax.metrics import common
from imagegpt_jax.metrics.reconstruction import ReconstructionEvaluator
from imagegpt_jax.metrics.sets import SourceImages
from imagegpt_jax.parallel import sharding
from imagegpt_jax.tasks import tokenizer as task

NUM_WORST = 12  # on a page


class TokenizerScorer:
    """A tokenizer and the data that it is scored on."""

    def __init__(self, settings: Settings, path: str):
        """Opens the data; raises UserError if they are not there, or nothing says which they are."""
        self._settings, self._path = settings, path
        self._data = checkpoint_data.open_data(settings, path, "image")

    def score(self, mesh: Mesh, page: Page) -> Scores:
        """Scores of reconstructions, one by one, and as a set where metrics of sets are asked for."""
        settings, path, data = self._settings, self._path, self._data
        setup, params, step = read_tokenizer(path, settings.step)
        ops = settings.ops or checkpoint_data.config_of(path).data.eval_ops
        num_codes = setup.model.quantizer.num_ids
        evaluator = ReconstructionEvaluator(
            task.predict_fns(setup)["reconstruct"],
            lambda: checkpoint_data.batches(settings, "tokenizer", data, ops, mesh, columns=("image",)),
            num_codes,
            mesh,
            rows=checkpoint_data.ROWS,
            num_worst=NUM_WORST if settings.report else 0,
        )
        with jax.set_mesh(mesh):
            whole = jax.device_put(common.to_host(params), sharding.replicated(mesh))
            evaluation = evaluator.evaluate({"generator": whole}, step)
        page.pictures["reconstructions"], page.details = evaluation.images["reconstructions"][0], evaluation.details
        about = {
            "checkpoint": path,
            "step": step,
            "fingerprint": loading.Tokenizer(setup, params, path=path, step=step).fingerprint,
            **data.about,
            "ops": ops,
            "num_codes": num_codes,
        }
        names = {name: f"val_{name}" for name in ("psnr", "psnr_mean_color", "l1", "mse")}
        values = {**about, **evaluation.scores}
        scores: Scores = {f"tokenizer/{names.get(name, name)}": value for name, value in values.items()}
        return scores | self._score_set(ops) if settings.metrics else scores

    def _score_set(self, ops: str) -> Scores:
        """Metrics of image sets of the reconstructions against their inputs."""
        settings, data = self._settings, self._data
        tok = loading.load_tokenizer(self._path, settings.step)

        def reconstruct(images_BHWC: np.ndarray) -> np.ndarray:
            _, height, width, _ = images_BHWC.shape
            codes_BL = tok.encode(images_BHWC, value_range=(-1, 1))
            return tok.decode(codes_BL, (height // tok.downsample, width // tok.downsample))

        images = SourceImages(f"{self._path} on {data.spec}", data.source, ops, reconstruct)
        reference = SourceImages(data.spec, data.source, ops)
        return score_sets(settings, "reconstruction", settings.metrics, images, reference)
