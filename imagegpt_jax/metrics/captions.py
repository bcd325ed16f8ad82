"""The words that belong to images, and how well images show them. Nothing here starts JAX.

Shapes: N images, E embedding.
"""

from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Float

from imagegpt_jax import images as images_lib
from imagegpt_jax.data import tables
from imagegpt_jax.errors import UserError
from imagegpt_jax.metrics.sets import Folder, ImageSet
from imagegpt_jax.metrics.statistics import unit

CANDIDATES = 100  # captions that R-precision chooses among, the image's own included
_COLUMNS = ("text", "caption", "prompt", "Prompt")
_NAMES = ("file_name", "image", "file")


def read(images: ImageSet, path: str = "") -> list[str]:
    """A caption for each image.

    Args:
      images: the set.
      path: a file of them: one on each line (.txt), or rows with the columns `text`, `caption` or `prompt` (.jsonl,
        .csv, .tsv), by `file_name` if there is that column, else in the images' order; "" for `NAME.txt` beside each
        image, or the prompt that `sample` writes into its PNGs.

    Raises:
      UserError: if an image has none.
    """
    if path:
        return _from_file(images, epath.Path(path))
    if not isinstance(images, Folder):
        raise UserError(f"{images.path} has no captions in it: give --captions=FILE, one for each image.")
    texts = []
    for name in images.names:
        file = epath.Path(images.path) / name
        beside = file.with_suffix(".txt")
        text = beside.read_text().strip() if beside.exists() else _prompt(file)
        if not text:
            raise UserError(f"{file} has no caption: put it into {beside.name} beside it, or give --captions=FILE.")
        texts.append(text)
    return texts


def known(images: ImageSet) -> list[str]:
    """As `read` without a file, and empty where an image has no caption."""
    try:
        return read(images)
    except UserError:
        return []


def _prompt(file: epath.Path) -> str:
    if file.suffix.lower() != ".png":
        return ""
    try:
        return str(images_lib.read_metadata(file.read_bytes()).get("prompt", ""))
    except (OSError, ValueError, SyntaxError):
        return ""


def _from_file(images: ImageSet, path: epath.Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"there is no file of captions {path}.")
    is_table = path.suffix in tables.DELIMITERS
    lines = tables.rows(path.read_text(), path, path.suffix, ragged=True, any_line_end=not is_table)
    rows = [row for _, row in lines]
    column = next((name for name in _COLUMNS if rows and name in rows[0]), None)
    if column is None:
        raise UserError(f"{path} holds no captions: rows with {', '.join(_COLUMNS[:3])}, or lines of text.")
    key = next((name for name in _NAMES if name in rows[0]), "")
    if key:
        by_name = {str(row[key]): str(row[column]) for row in rows}
        missing = [name for name in images.names if name not in by_name]
        if missing:
            raise UserError(f"{path} has no caption of {missing[0]} and {len(missing) - 1} other images.")
        return [by_name[name] for name in images.names]
    if len(rows) < len(images):
        raise UserError(f"{path} has {len(rows)} captions for {len(images)} images.")
    return [str(row[column]) for row in rows[: len(images)]]


# ------------------------------------------------------------------------------------------------------------- scores


def clip_scores(images_NE: Float[np.ndarray, "N E"], texts_NE: Float[np.ndarray, "N E"]) -> Float[np.ndarray, "N"]:
    """100 * max(cosine, 0) of each image and its caption (Hessel et al. 2021, arXiv:2104.08718, who scale by 2.5)."""
    return 100 * np.maximum(np.sum(unit(images_NE) * unit(texts_NE), axis=1), 0.0)


def r_precision(
    images_NE: Float[np.ndarray, "N E"],
    texts_NE: Float[np.ndarray, "N E"],
    captions: Sequence[str],
    seed: int,
    candidates: int = CANDIDATES,
) -> tuple[float, int]:
    """CLIP R-precision (Park et al. 2021): how often an image is nearest to its own caption among random other ones.

    Equal captions are never each other's rivals, and those of image i depend on (seed, i) alone.

    Returns:
      (share of images, captions that were chosen among, which are all if there are fewer different ones).

    Raises:
      UserError: if there are not two different captions.
    """
    first = {caption: number for number, caption in reversed(list(enumerate(captions)))}
    distinct = sorted(first.values())
    candidates = min(candidates, len(distinct))
    if candidates < 2:
        raise UserError("R-precision needs images of at least 2 different captions.")
    images_NE, texts_NE = unit(images_NE), unit(texts_NE)
    hits = 0
    for i, caption in enumerate(captions):
        others = [number for number in distinct if number != first[caption]]
        rivals = np.random.default_rng((seed, i)).choice(others, candidates - 1, replace=False)
        hits += bool(images_NE[i] @ texts_NE[first[caption]] > (texts_NE[rivals] @ images_NE[i]).max())
    return hits / len(captions), candidates
