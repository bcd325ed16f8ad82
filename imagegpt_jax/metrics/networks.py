"""The frozen networks that scores are made of, loaded from files and ready for `features.extract`."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from imagegpt_jax import plugins, train_state
from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import resizing, score
from imagegpt_jax.metrics.features import Network
from imagegpt_jax.models.pretrained import clip, dinov2, efficientnet, inception, lpips, weights
from imagegpt_jax.parallel import padding

Loader = Callable[[str, str], Network]
Outputs = Callable[[Any, jax.Array], Mapping[str, jax.Array]]  # (module, prepared images) -> {output: array}
_TEXTS = 64  # of a batch


def load(name: str, path: str, resize: str) -> Network:
    """Loads a network.

    Args:
      name: such as "inception"; or "module:function" of a user's own (path, resize) -> `Network`.
      path: file of its weights; "" for the public file, downloaded once.
      resize: how images come to its size, see `resizing`.

    Raises:
      UserError: if there is no such network, or its weights are missing or do not fit.
    """
    return plugins.resolve(name, "feature network", LOADERS)(path, resize)


def check_weights(name: str, path: str, flag: str) -> None:
    """Finds out early whether a network's weights are there: fetches the public file if `path` is "".

    Raises:
      UserError: if there is no such network, or its weights are missing; `flag` is what to type to name a file.
    """
    plugins.resolve(name, "feature network", LOADERS)
    if path and not epath.Path(path).exists():
        raise UserError(f"there are no weights of {name} at {path}: give the file by {flag}.")
    if not path and name == "inception":
        weights.fetch(inception.FILE, flag)


def _network(name: str, path: str, module: nnx.Module, resize: str, size: int, outputs: Outputs) -> Network:
    """The network of a module that was loaded from `path`; `outputs` calls it with images of `size`."""
    graph, params = train_state.split(module)
    return Network(name, _about(path), resizing.to_size(resize, size), _Apply(graph, outputs), params)


@dataclasses.dataclass(frozen=True)
class _Apply:
    """A module's pure function; those of equal modules are equal, and compiled once."""

    graph: Any
    outputs: Outputs

    def __call__(self, params: Any, images: jax.Array) -> Mapping[str, jax.Array]:
        with jax.default_matmul_precision("float32"):  # which accelerators do not have by default
            return self.outputs(train_state.merge(self.graph, params), images)


def _inception_outputs(module: Any, images: jax.Array) -> Mapping[str, jax.Array]:
    features = module(images)
    return {"pool": features.pool, "spatial": features.spatial, "logits": features.logits}


def _inception(path: str, resize: str) -> Network:
    file = path or str(weights.fetch(inception.FILE, "--feature_weights=FILE"))
    module = inception.Inception.load(file)
    return _network("inception", file, module, resize, inception.SIZE, _inception_outputs)


def _clip(path: str, resize: str) -> Network:
    del resize  # CLIP is defined with its own
    score.require_weights("clip", path)
    module = clip.CLIP.load(path)
    return _network("clip", path, module, "pil_bicubic_crop", module.size, _clip_outputs)


def _clip_outputs(module: Any, images: jax.Array) -> Mapping[str, jax.Array]:
    return {"embedding": module.embed_images(images)}


def _dinov2(path: str, resize: str) -> Network:
    del resize
    score.require_weights("dinov2", path)
    module = dinov2.DINOv2.load(path)
    return _network("dinov2", path, module, "pil_bicubic_crop", dinov2.SIZE, _pool_outputs)


def _efficientnet(path: str, resize: str) -> Network:
    file = path or efficientnet.packaged()
    module = efficientnet.EfficientNetLite0.load(file)
    network = _network("efficientnet_lite0", file, module, resize, efficientnet.SIZE, _pool_outputs)
    return dataclasses.replace(network, size=efficientnet.SIZE)


def _pool_outputs(module: Any, images: jax.Array) -> Mapping[str, jax.Array]:
    return {"pool": module(images)}


def _about(path: str) -> dict[str, str]:
    """Path and SHA-256 of a file, or of a folder's files of weights one after another."""
    place = epath.Path(path)
    if not place.is_dir():
        return {"path": path, "sha256": weights.sha256(place)}
    files = sorted(file for file in place.iterdir() if file.suffix in (".safetensors", ".bin", ".pth"))
    digest = hashlib.sha256("".join(weights.sha256(file) for file in files).encode())
    return {"path": path, "sha256": digest.hexdigest()}


@dataclasses.dataclass(frozen=True)
class _Compare:
    """Metrics of image pairs: functions by name, and LPIPS, the module with parameters, where there is its graph."""

    functions: tuple[tuple[str, Callable[..., Any]], ...]
    graph: Any

    def __call__(self, params: Any, pairs_B2HWC: jax.Array) -> Mapping[str, jax.Array]:
        a, b = pairs_B2HWC[:, 0].astype(jnp.float32), pairs_B2HWC[:, 1].astype(jnp.float32)
        values = {name: function(a, b) for name, function in self.functions}
        if self.graph is not None:
            with jax.default_matmul_precision("float32"):
                values["lpips"] = train_state.merge(self.graph, params)(a / 127.5 - 1, b / 127.5 - 1)
        return values


def pairs(names: Sequence[str], path: str) -> Network:
    """The metrics of image pairs as a network, with outputs of their names; raises UserError if LPIPS lacks weights."""
    compared = {name: compare for name in names if (compare := score.find(name).compare)}
    functions = tuple((n, plugins.plug_in(c, "metric") if isinstance(c, str) else c) for n, c in compared.items())
    graph, params, about = None, {}, {}
    if "lpips" in names:
        score.require_weights("lpips", path)
        graph, params = train_state.split(lpips.LPIPS.load(path))
        about = _about(path)
    return Network("pairs", about, np.asarray, _Compare(functions, graph), params)


def embed_texts(path: str, texts: Sequence[str]) -> np.ndarray:
    """CLIP's embeddings of texts, float32 [N, E], cut to its context; raises UserError if it has no tokenizer."""
    module = clip.CLIP.load(path)
    ids_NL = _tokenize(path, texts, module.length)
    return padding.map_batches(functools.partial(_embed, module), _TEXTS, ids_NL)


@jax.jit
def _embed(module: clip.CLIP, ids_BL: jax.Array) -> jax.Array:
    return module.embed_texts(ids_BL)


def _tokenize(path: str, texts: Sequence[str], length: int) -> np.ndarray:
    import tokenizers

    folder = epath.Path(path) if epath.Path(path).is_dir() else epath.Path(path).parent
    file = folder / "tokenizer.json"
    if not file.exists():
        raise UserError(f"CLIP's tokenizer is not beside its weights: put its tokenizer.json into {folder}.")
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(length)
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    # Filled up with the end's id, as `transformers` does: the first one counts.
    return np.array([ids + [max(ids)] * (length - len(ids)) for ids in encoded], np.int32)


LOADERS: Mapping[str, Loader] = {
    "inception": _inception,
    "clip": _clip,
    "dinov2": _dinov2,
    "efficientnet_lite0": _efficientnet,
}
