"""The captions and prompts that published protocols draw images for, and GenEval's judging. Nothing here starts JAX.

The files are those of their authors: COCO's `captions_val2014.json`, `PartiPrompts.tsv`, GenEval's
`evaluation_metadata.jsonl`.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from imagegpt_jax.data import tables
from imagegpt_jax.errors import UserError

COCO_COUNT = 30_000


def _text(path: epath.PathLike) -> str:
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"there is no file {path}.")
    return file.read_text()


def coco_captions(path: epath.PathLike, count: int = COCO_COUNT, seed: int = 0) -> list[dict[str, Any]]:
    """Captions of COCO 2014's validation images, drawn without replacement, as Parti's authors describe.

    Returns:
      [{"file_name", "text", "id"}], in the order of the draw; an image may come up with several of its captions.

    Raises:
      UserError: if the file is none of COCO's, or has fewer captions.
    """
    try:
        content = json.loads(_text(path))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        rows = sorted(content["annotations"], key=lambda row: row["id"])
        every = [{"file_name": names[r["image_id"]], "text": r["caption"].strip(), "id": r["id"]} for r in rows]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is not COCO's file of captions ({e}): give captions_val2014.json.") from e
    if len(every) < count:
        raise UserError(f"{path} has {len(every)} captions, and {count} are to be drawn.")
    return [every[i] for i in np.random.default_rng(seed).choice(len(every), count, replace=False)]


def listed(path: epath.PathLike) -> list[dict[str, str]]:
    """Prompts of a table with tabs, [{"text", "category", "challenge"}]; raises UserError without a column `Prompt`."""
    rows = [row for _, row in tables.rows(_text(path), path, ".tsv", ragged=True, any_line_end=True)]
    if not rows or "Prompt" not in rows[0]:
        raise UserError(f"{path} has no column Prompt: give PartiPrompts.tsv, or LlamaGen's coco_captions.csv.")
    kept = {name: name.lower() for name in ("Category", "Challenge") if name in rows[0]}
    return [{"text": row["Prompt"].strip(), **{ours: row[name] for name, ours in kept.items()}} for row in rows]


def of_protocol(
    name: str, path: epath.PathLike, count: int, seed: int, read_others: Callable[[str], Sequence[str]]
) -> list[dict[str, Any]]:
    """What a protocol draws pictures of, the first `count`, 0 for all: rows with "text", and what else the file says.

    `seed` is that of the draw, where there is one; `read_others` reads any file, for protocols without prompts.

    Raises:
      UserError: if the file is none of the protocol's.
    """
    rows: list[dict[str, Any]]
    if name == "coco30k_zero_shot" and epath.Path(path).suffix == ".json":
        return coco_captions(path, count or COCO_COUNT, seed)
    if name in ("coco30k_zero_shot", "parti_prompts"):
        rows = [*listed(path)]
    elif name == "geneval":
        rows = [{**row, "text": row["prompt"]} for row in geneval(path)]
    else:
        rows = [{"text": text} for text in read_others(os.fspath(path))]
    return rows[:count] if count else rows


def geneval(path: epath.PathLike) -> list[dict[str, Any]]:
    """GenEval's prompts, [{"prompt", "tag", "include", ...}]; raises UserError if a line is none."""
    rows = []
    for number, row in tables.rows(_text(path), path, ".jsonl", any_line_end=True):
        if not {"prompt", "tag"} <= row.keys():
            raise UserError(f"line {number} of {path} is no prompt of GenEval's: it needs prompt and tag.")
        rows.append({"include": [], **row})
    if not rows:
        raise UserError(f"{path} is empty: give GenEval's evaluation_metadata.jsonl.")
    return rows


def geneval_score(right: Sequence[bool], rows: Sequence[Mapping[str, Any]]) -> tuple[float, dict[str, float]]:
    """GenEval's score: the mean over kinds of prompts of the share of right images, all of the first prompt first.

    Returns:
      (score, {tag: share}).

    Raises:
      UserError: if the images do not divide among the prompts.
    """
    if not right or len(right) % len(rows):
        raise UserError(f"{len(right)} images do not divide among {len(rows)} prompts: draw as many of each.")
    tags = np.repeat([row["tag"] for row in rows], len(right) // len(rows))
    hits = np.array(right, bool)
    shares = {str(tag): float(np.mean(hits[tags == tag])) for tag in np.unique(tags)}
    return float(np.mean(list(shares.values()))), shares
