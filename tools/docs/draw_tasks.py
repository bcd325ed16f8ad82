"""Draws a picture of every task of a decoder, for the README and docs/sampling.md.

  python tools/docs/draw_tasks.py --decoder=runs/demo/decoder --output=docs/tasks

Takes pictures of the built-in set; each task becomes TASK.png, the given picture first and what was drawn after it.
A decoder that was trained on classes draws classes.png alone.
"""

import io
import pathlib
from typing import Any

import numpy as np
from absl import flags

from imagegpt_jax import cli, errors

DECODER = flags.DEFINE_string("decoder", None, "Workdir of a decoder trained on the built-in emoji.", required=True)
OUTPUT = flags.DEFINE_string("output", "docs/tasks", "Folder for the pictures.")
CONCEPTS = flags.DEFINE_list("concepts", ["red-heart", "dog-face", "pizza"], "What the given pictures show.")
STYLE = flags.DEFINE_string("style", "noto", "Style of the given pictures.")
OTHER = flags.DEFINE_string("other_style", "twemoji", "Style that they are drawn in as well.")
SEED = flags.DEFINE_integer("seed", 0, "Of all draws.", lower_bound=0)
SAMPLES = 3  # drawn for each given picture


def records(source: Any) -> list[dict[str, Any]]:
    """The given pictures' records.

    Raises:
      UserError: for a concept that the style does not have.
    """
    places = {p.concept: i for i, p in enumerate(source.pictures)}
    for concept in CONCEPTS.value:
        if concept not in places:
            raise errors.UserError(f"{STYLE.value} has no concept {concept!r}.{errors.suggest(concept, places)}")
    return source.__getitems__([places[concept] for concept in CONCEPTS.value])


def pages(gpt: Any, tok: Any, given: np.ndarray, words: list[str]) -> dict[str, np.ndarray]:
    """Task -> a captioned grid."""
    from imagegpt_jax import images
    from imagegpt_jax.generation import functional, modes

    height, width = given.shape[1:3]
    middle = np.zeros((height, width), bool)
    middle[height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
    other = modes.restyled(words, OTHER.value, STYLE.value)
    turned = [*words[1:], words[0]]
    how: dict[str, Any] = {"num_images": SAMPLES, "seed": SEED.value}
    margin = tok.downsample * max(1, gpt.setup.layout.grid[0] // 4)
    drawn = {
        "words": (words, functional.generate(gpt, tok, words, **how)),
        "inpaint": (words, functional.inpaint(gpt, tok, given, middle, words, **how)),
        "outpaint": (words, functional.outpaint(gpt, tok, given, (margin,) * 4, words, **how)),
        "complete": (words, functional.complete(gpt, tok, given, 0.5, words, **how)),
        "variations": (words, functional.variations(gpt, tok, given, 0.5, words, **how)),
        "edit": (turned, functional.edit(gpt, tok, given, turned, strength=0.7, **how)),
        "style_transfer": (
            other,
            functional.style_transfer(gpt, tok, given, OTHER.value, STYLE.value, words, **how),
        ),
        "wide": (words, functional.generate(gpt, tok, words, grid=(gpt.setup.layout.grid[0], 12), **how)),
    }
    grids = {}
    for task, (captions, out) in drawn.items():
        rows = out.reshape(len(given), SAMPLES, *out.shape[1:])
        first = [] if task in ("words", "wide") else [given]
        grids[task] = images.grid(
            [images.Tile(text, [*(g[i] for g in first), *rows[i]]) for i, text in enumerate(captions)]
        )
    free = functional.generate(gpt, tok, "", num_images=4 * SAMPLES, seed=SEED.value)
    grids["unconditional"] = images.grid([images.Tile("", list(free))])
    series = functional.interpolate(gpt, tok, words[0], words[1], 8, seed=SEED.value)
    grids["interpolate"] = images.grid([images.Tile(f"{words[0]} to {words[1]}", list(series))])
    if gpt.config.data.image_to_text:
        texts = functional.caption(gpt, tok, given)
        grids["caption"] = images.grid([images.Tile(t, [g]) for t, g in zip(texts, given, strict=True)])
    return grids


def of_classes(gpt: Any, tok: Any) -> dict[str, np.ndarray]:
    """The page of a decoder of classes: some pictures of each."""
    from imagegpt_jax import images
    from imagegpt_jax.generation import functional

    names = list(gpt.setup.labels)
    drawn = functional.generate(gpt, tok, classes=names, num_images=2 * SAMPLES, seed=SEED.value)
    rows = drawn.reshape(len(names), 2 * SAMPLES, *drawn.shape[1:])
    return {"classes": images.grid([images.Tile(name, list(row)) for name, row in zip(names, rows, strict=True)])}


def of_tasks(gpt: Any, tok: Any) -> dict[str, np.ndarray]:
    """The pages of a decoder of words."""
    from PIL import Image

    from imagegpt_jax.data.emoji import EmojiSource

    source = EmojiSource("all", res=gpt.setup.layout.grid[0] * tok.downsample, styles=[STYLE.value])
    chosen = records(source)
    given = np.stack([np.asarray(Image.open(io.BytesIO(r["image"])).convert("RGB")) for r in chosen])
    return pages(gpt, tok, given, [r["captions"][0] for r in chosen])


def main() -> None:
    """Draws what the flags describe."""
    from imagegpt_jax import images
    from imagegpt_jax.inference import loading

    gpt = loading.load_decoder(DECODER.value)
    tok = gpt.load_tokenizer()
    grids = (of_classes if gpt.setup.space.num_classes else of_tasks)(gpt, tok)
    folder = pathlib.Path(OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"decoder": DECODER.value, "step": gpt.step, "decoder_hash": gpt.fingerprint(), "seed": SEED.value}
    for task, page in grids.items():
        (folder / f"{task}.png").write_bytes(images.png_bytes(page, about | {"task": task}))
        print(folder / f"{task}.png")


if __name__ == "__main__":
    cli.run(main)
