"""Files of frozen networks' weights: found by path or downloaded once, checked by hash, read without PyTorch."""

import dataclasses
import hashlib
import os
import pathlib
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import filesystem
from imagegpt_jax.weight_files import files

CACHE = "IMAGEGPT_JAX_CACHE"  # environment variable: the folder of downloaded files
_TIMEOUT_SECONDS = 20
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class File:
    """A public file of weights.

    Attributes:
      name: what it is called in the cache.
      url: where it is.
      sha256: of its bytes, hexadecimal.
    """

    name: str
    url: str
    sha256: str


def cache_folder() -> epath.Path:
    """The folder of downloaded files: $IMAGEGPT_JAX_CACHE, else ~/.cache/imagegpt_jax."""
    return epath.Path(os.environ.get(CACHE) or "~/.cache/imagegpt_jax").expanduser()


def sha256(path: epath.PathLike) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(file: File, flag: str) -> epath.Path:
    """The file in the cache, downloaded if it is not there; `flag` is what to type to name one on disk instead.

    Raises:
      UserError: if it cannot be downloaded, or is not the file that it should be.
    """
    path = cache_folder() / "weights" / file.name
    if not path.exists():
        try:
            with urllib.request.urlopen(file.url, timeout=_TIMEOUT_SECONDS) as answer:
                data = answer.read()
        except (urllib.error.URLError, OSError) as e:
            raise UserError(
                f"the weights {file.name} are not in {path.parent}, and could not be downloaded from {file.url}"
                f" ({getattr(e, 'reason', e)}): fetch that file where there is a network and give it by {flag}."
            ) from e
        _check_hash(hashlib.sha256(data).hexdigest(), file, file.url)
        filesystem.write_whole(path, data, shared=True)
    _check_hash(sha256(path), file, str(path))
    return path


def _check_hash(digest: str, file: File, where: str) -> None:
    if digest != file.sha256:
        raise UserError(
            f"{where} has the SHA-256 {digest} instead of {file.sha256}: it is damaged or another file; delete it and"
            " fetch it again."
        )


def read(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, a PyTorch state dict or a folder; raises UserError if they cannot be read."""
    if not epath.Path(path).exists():
        raise UserError(f"there are no weights at {path}: give the path of a .pth or .safetensors file.")
    return {name: tensor.read() for name, tensor in files.open_source(pathlib.Path(path)).tensors.items()}


def check(arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], source: str, network: str) -> None:
    """Checks that a file, `source`, holds exactly the arrays of a network, {name: shape}.

    Raises:
      UserError: naming some arrays that are missing, unknown or of another shape.
    """
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - arrays.keys())]
    wrong += [f"{name} is unknown" for name in sorted(arrays.keys() - expected.keys())]
    wrong += [
        f"{name} is {arrays[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in arrays and arrays[name].shape != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise UserError(f"{source} does not hold {network}: {'; '.join(wrong[:6])}{more}.")


def fold_batch_norm(
    arrays: Mapping[str, np.ndarray], kernel: str, norm: str, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """A convolution without bias and the batch norm after it, as one convolution.

    Of a PyTorch state dict, by the name of the kernel, [out, in, height, width], and what the norm's names begin with.

    Returns:
      (kernel [height, width, in, out], bias [out]), float32.
    """
    scale, shift, mean, variance = (
        arrays[f"{norm}.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
    )
    rate = scale / np.sqrt(variance + eps)
    folded = arrays[kernel].astype(np.float64).transpose(2, 3, 1, 0) * rate
    return folded.astype(np.float32), (shift - mean * rate).astype(np.float32)


def set_units(
    units: Sequence[tuple[str, str, Any]],
    arrays: Mapping[str, np.ndarray],
    eps: float,
    source: str,
    network: str,
    others: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Sets `kernel` and `bias` of all convolutions of a network from a PyTorch state dict, batch norms folded in.

    Units are (name of the convolution, name of its batch norm, the layer); `others` are the shapes of the arrays that
    the file holds besides. Errors as `check`.
    """
    import jax.numpy as jnp  # programs that only ask for a hash do not wait for JAX

    expected = dict(others or {})
    for conv, norm, unit in units:
        height, width, c_in, c_out = unit.kernel.shape
        expected[f"{conv}.weight"] = (c_out, c_in, height, width)
        expected |= {f"{norm}.{part}": (c_out,) for part in ("weight", "bias", "running_mean", "running_var")}
    kept = {name: array for name, array in arrays.items() if not name.endswith(".num_batches_tracked")}
    check(kept, expected, source, network)
    for conv, norm, unit in units:
        kernel, bias = fold_batch_norm(kept, f"{conv}.weight", norm, eps)
        unit.kernel.set_value(jnp.asarray(kernel))
        unit.bias.set_value(jnp.asarray(bias))
