"""What a score was made of, so that it can be made again; and what two scores differ in.

Nothing here starts JAX.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from imagegpt_jax import images as images_lib
from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics import protocols
from imagegpt_jax.metrics.sets import Folder, ImageSet
from imagegpt_jax.sampling.settings import RENAMED

# What `sample` says in each PNG of the networks that drew it.
_MODEL = ("decoder", "step", "decoder_hash", "tokenizer", "tokenizer_step", "tokenizer_hash", "version")


@functools.cache
def code() -> dict[str, str]:
    """Version of this program, and the SHA-256 of its sources."""
    digest = hashlib.sha256()
    root = pathlib.Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return {"version": importlib.metadata.version("imagegpt_jax"), "code_sha256": digest.hexdigest()}


def of_set(images: ImageSet, sha256: str) -> dict[str, Any]:
    """Which images a set is."""
    sizes = {"n": len(images), "height": images.size[0], "width": images.size[1]}
    return {"path": images.path, **sizes, "formats": dict(images.formats), "sha256": sha256}


def drawn_by(images: ImageSet) -> dict[str, Any]:
    """ "sampler", "model" and "sampling_seed" of images, where `sample` wrote them into their metadata; else empty."""
    metadata: dict[str, Any] = {}
    if isinstance(images, Folder):
        with contextlib.suppress(OSError, ValueError, SyntaxError):
            metadata = images_lib.read_metadata((epath.Path(images.path) / images.names[0]).read_bytes())
    return {
        "sampler": metadata.get("sampler", {}),
        "model": {name: metadata[name] for name in _MODEL if name in metadata},
        "sampling_seed": metadata.get("seed"),
    }


# ---------------------------------------------------------------------------------------------------------- comparing


def read(path: epath.PathLike, *, flat: bool = False) -> dict[str, Any]:
    """Scores of image sets by `evaluate`, if `flat` of checkpoints too; raises UserError for a file of others."""
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"there is no file {path}: give what `evaluate --images=... --output=FILE` wrote.")
    try:
        scores = json.loads(file.read_text(), object_hook=_names_of_today)
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}): give what `evaluate --images=... --output=FILE` wrote.") from e
    if flat and isinstance(scores, dict) and "code_sha256" in scores:
        return scores
    if not isinstance(scores, dict) or not isinstance(scores.get("provenance"), dict):
        raise UserError(f"{path} has no provenance: give what `evaluate --images=... --output=FILE` wrote.")
    return scores


def _names_of_today(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a file, in which settings of the sampler may have the names of before."""
    parts = {name: name.rpartition("/") for name in values}
    return {f"{start}{slash}{RENAMED.get(last, last)}": values[name] for name, (start, slash, last) in parts.items()}


def _compare_flat(a: Mapping[str, Any], b: Mapping[str, Any], paths: Sequence[str]) -> str:
    """`compare` of two checkpoints' scores."""
    for key in sorted(a.keys() & b.keys()):
        if key.endswith("/protocol") and a[key] != b[key]:
            raise UserError(
                f"{paths[0]} and {paths[1]} are scores of {a[key]} and {b[key]} ({key}), which cannot be compared:"
                " score both by one protocol."
            )
    lines = [f"{'':<40}{'A':>14}{'B':>14}{'B - A':>14}"]
    differ = []
    for key in sorted((a.keys() & b.keys()) - {"seconds"}):
        if isinstance(a[key], float) and isinstance(b[key], float):
            lines.append(f"{key:<40}{a[key]:>14.6g}{b[key]:>14.6g}{b[key] - a[key]:>+14.6g}")
        elif a[key] != b[key]:
            differ.append(f"  {key}: {_short(a[key])} | {_short(b[key])}")
    lines += [f"{key:<40}only in {'A' if key in a else 'B'}" for key in sorted(a.keys() ^ b.keys())]
    lines += ["", f"A = {paths[0]}", f"B = {paths[1]}", ""]
    lines.append("differences:" if differ else "no difference in what the scores were made of")
    return "\n".join([*lines, *differ])


# Where in the provenance a difference may lie, and what it means for the scores.
_MATTERS: Sequence[tuple[str, str]] = (
    ("reference.sha256", "other reference: the scores are not comparable"),
    ("reference.n", "another number of reference images"),
    ("feature_weights", "other weights of a feature network: the scores are not comparable"),
    ("images.n", "another number of images: FID's bias grows as the number falls"),
    ("images.height", "another size of images"),
    ("images.width", "another size of images"),
    ("images.formats", "other file formats"),
    ("images.sha256", "other images, which is what is being compared"),
    ("sampler", "another sampler"),
    ("model", "another model"),
    ("sampling_seed", "another seed of the images"),
    ("seed", "another seed of intervals and extrapolation"),
    ("platform", "another kind of device: the last digits may differ"),
    ("version", "another version of this program"),
    ("code_sha256", "other sources of this program"),
    ("jax_version", "another version of JAX"),
)


def _at(provenance: Mapping[str, Any], path: str) -> Any:
    value: Any = provenance
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if path == "feature_weights" and isinstance(value, Mapping):
        return {name: about.get("sha256") for name, about in value.items()}
    return value


def compare(paths: Sequence[str]) -> str:
    """A readable comparison of two files of scores; raises UserError if their protocols differ, naming in what."""
    if len(paths) != 2:
        raise UserError("--compare takes two files: --compare A.json B.json.")
    a, b = (read(path, flat=True) for path in paths)
    if "provenance" not in a and "provenance" not in b:
        return _compare_flat(a, b, paths)
    a, b = map(read, paths)
    first, second = (scores["provenance"].get("protocol", {}) for scores in (a, b))
    if first != second:
        names = (first.get("name"), second.get("name"))
        of = f"{names[0]} and {names[1]}" if names[0] != names[1] else f"two variants of {names[0]}"
        raise UserError(
            f"{paths[0]} and {paths[1]} are scores of {of}, which cannot be compared:"
            f" {'; '.join(protocols.differences(first, second))}. Score both by one protocol."
        )
    lines = [f"{'':<14}{'A':>14}{'B':>14}{'B - A':>14}"]
    lines += [_row(name, a[name], b[name]) for name in a if name in b and name != "provenance"]
    lines += [f"{name:<14}only in {'A' if name in a else 'B'}" for name in sorted(a.keys() ^ b.keys())]
    lines += ["", f"protocol {first.get('name')}", f"A = {paths[0]}", f"B = {paths[1]}"]
    differ = [(path, text) for path, text in _MATTERS if _at(a["provenance"], path) != _at(b["provenance"], path)]
    lines += ["", "differences:" if differ else "no difference in what the scores were made of"]
    for path, text in differ:
        lines.append(f"  {path}: {_short(_at(a['provenance'], path))} | {_short(_at(b['provenance'], path))} - {text}")
    for label, scores in (("A", a), ("B", b)):
        warned = scores["provenance"].get("warnings", [])
        lines += [f"  {label} was warned of {warning['name']}: {warning['text']}" for warning in warned]
    return "\n".join(lines)


def _row(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    text = f"{name:<14}{a['value']:>14.6g}{b['value']:>14.6g}{b['value'] - a['value']:>+14.6g}"
    if a.get("interval") and b.get("interval"):
        apart = a["interval"][1] < b["interval"][0] or b["interval"][1] < a["interval"][0]
        text += "  intervals are apart" if apart else "  intervals overlap"
    return text


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
