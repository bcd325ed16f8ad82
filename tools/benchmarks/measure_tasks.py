"""Measures what one trained decoder can do beside drawing from words, each figure with its control.

  python tools/benchmarks/measure_tasks.py --decoder=runs/demo/decoder --output=docs/tasks.json --page=docs/sampling.md

    captions    the right caption ranked first by likelihood among those of so many pictures of different things;
                control: each picture credited with another's caption
    inpainting  pixels outside the mask that changed, and the error within it; control: the mask's mean colour
    styles      how often a picture drawn in another style is nearer to the true one in that style than to its source;
                controls: the tokenizer's reconstruction of the source, and pictures drawn for other things
    weights     bits per image token of the pictures, with weights in float32, bfloat16 and int8
    steps       passes of the network that speculative decoding takes for a picture; control: its number of codes

Distances are Euclidean between features: by default pictures averaged down to 16 x 16 pixels, less their mean colour;
--features=module:function takes uint8 [B, H, W, 3] and returns [B, F].
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np
from absl import flags

from imagegpt_jax import cli, errors

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "docs"))
import marked

DECODER = flags.DEFINE_string("decoder", None, "Workdir of a decoder trained on the built-in emoji.", required=True)
OUTPUT = flags.DEFINE_string("output", "", "JSON file of the figures; those of other splits in it stay.")
PAGE = flags.DEFINE_string("page", "", "Page that gets a table of all figures of --output, between its marks.")
SPLIT = flags.DEFINE_string("split", "train", "Of the built-in set: train, validation or all.")
EXAMPLES = flags.DEFINE_integer("examples", 100, "Pictures of each measurement.", lower_bound=2)
SEED = flags.DEFINE_integer("seed", 0, "Of the choice of pictures and of all draws.", lower_bound=0)
BEST_OF = flags.DEFINE_integer("best_of", 1, "Pictures drawn for each style, of which the likeliest is kept.", 1)
STRENGTH = flags.DEFINE_float("strength", 1.0, "Share of the codes that a change of style draws anew.")
CFG_SCALE = flags.DEFINE_float("cfg_scale", None, "Guidance; by default the decoder's own.")
FEATURES = flags.DEFINE_string("features", "", "module:function of pictures; by default their pixels at 16 x 16.")
WINDOW = 16  # guesses of speculative decoding


def thumbnails(images_BHWC: np.ndarray) -> np.ndarray:
    """[B, 16 * 16 * C]: pictures averaged down, each less its mean colour."""
    from imagegpt_jax.metrics.retrieval import box_downsample

    small = box_downsample(images_BHWC)
    return (small - small.mean((1, 2), keepdims=True)).reshape(len(small), -1)


def ranks(scores_BC: np.ndarray, right_B: np.ndarray) -> dict[str, float]:
    """How the right one of C captions ranks for each picture."""
    right = scores_BC[np.arange(len(scores_BC)), right_B][:, None]
    above_B = (scores_BC > right).sum(1)
    return {"first": float(np.mean(above_B == 0)), "among_five": float(np.mean(above_B < 5)),
            "median_rank": float(np.median(above_B) + 1)}  # fmt: skip


def nearer(out_BF: np.ndarray, target_BF: np.ndarray, source_BF: np.ndarray) -> float:
    """Share of pictures that are nearer to their target than to their source."""
    return float(np.mean(np.linalg.norm(out_BF - target_BF, axis=1) < np.linalg.norm(out_BF - source_BF, axis=1)))


def captions(gpt: Any, tok: Any, pictures: np.ndarray, words: list[str]) -> dict[str, Any]:
    """The figures of `captions`, in every direction that the decoder was trained in."""
    from imagegpt_jax.generation import functional
    from imagegpt_jax.metrics.retrieval import derangement

    figures: dict[str, Any] = {"candidates": len(words)}
    for of in ("image", "text") if gpt.config.data.image_to_text else ("image",):
        scores = functional.rank_captions(gpt, tok, pictures, words, of=of)
        right = np.arange(len(words))
        figures[of] = ranks(scores, right) | {
            "first_control": ranks(scores, derangement(len(words), SEED.value))["first"]
        }
        if of == "image":  # without what the caption makes likely for any picture
            less = scores - np.log(np.mean(np.exp(scores - scores.max(0)), axis=0)) - scores.max(0)
            figures["image, less the mean over pictures"] = ranks(less, right)
    return figures


def inpainting(gpt: Any, tok: Any, pictures: np.ndarray, words: list[str]) -> dict[str, float]:
    """The figures of `inpainting`: the middle of each picture is drawn anew."""
    from imagegpt_jax.generation import functional

    mask = np.zeros(pictures.shape[1:3], bool)
    quarter = [size // 4 for size in mask.shape]
    mask[quarter[0] : -quarter[0], quarter[1] : -quarter[1]] = True
    out = functional.inpaint(gpt, tok, pictures, mask, words, seed=SEED.value, cfg_scale=CFG_SCALE.value)
    inside = pictures[:, mask].astype(float)
    mean = inside.mean(1, keepdims=True)
    return {
        "pixels_changed_outside": float((out[:, ~mask] != pictures[:, ~mask]).mean()),
        "rms_error_inside": float(np.sqrt(np.mean(np.square(out[:, mask] - inside)))),
        "rms_error_inside_control": float(np.sqrt(np.mean(np.square(mean - inside)))),
    }


def styles(gpt: Any, tok: Any, source: Any, rng: np.random.Generator) -> dict[str, Any]:
    """The figures of `styles`, over random pairs of drawings of one thing."""
    from imagegpt_jax import images
    from imagegpt_jax.generation import functional, modes
    from imagegpt_jax.metrics.retrieval import derangement
    from imagegpt_jax.plugins import plug_in

    features = plug_in(FEATURES.value, "features") if FEATURES.value else thumbnails
    pairs = source.pairs()
    chosen, concepts = [], set()
    for i in rng.permutation(len(pairs)):
        concept = source.pictures[pairs[i][0]].concept
        if concept not in concepts and len(chosen) < EXAMPLES.value:
            concepts.add(concept)
            chosen.append(pairs[i])
    before, after = (source.__getitems__([pair[k] for pair in chosen]) for k in (0, 1))
    given, wanted = (np.stack([_decoded(r) for r in records]) for records in (before, after))
    words = [
        modes.restyled(record["captions"][:1], other["style"], record["style"])[0]
        for record, other in zip(before, after, strict=True)
    ]
    how = {"seed": SEED.value, "best_of": BEST_OF.value, "cfg_scale": CFG_SCALE.value}
    out = functional.variations(gpt, tok, given, STRENGTH.value, words, **how)
    again = images.to_uint8(tok.decode(tok.encode(given), gpt.setup.layout.grid))
    shuffled = derangement(len(out), SEED.value)
    made, true, own = features(out), features(wanted), features(given)
    return {
        "pairs": len(chosen),
        "nearer_to_the_other_style": nearer(made, true, own),
        "control_reconstruction": nearer(features(again), true, own),
        "control_shuffled_prompts": nearer(made[shuffled], true, own),
        "features": FEATURES.value or "16 x 16 pixels less their mean colour",
    }


def weights(gpt: Any, tok: Any, pictures: np.ndarray, words: list[str]) -> dict[str, float]:
    """The figures of `weights`: -log2 P(picture | words) of a code, in each precision."""
    from imagegpt_jax.sampling.batching import run
    from imagegpt_jax.sampling.jobs import image_job
    from imagegpt_jax.sampling.settings import Sampling

    codes, texts = tok.encode(pictures), [gpt.encode_text(text) for text in words]
    bits = {}
    for precision in ("float32", "bfloat16", "int8"):
        how = Sampling(weights=precision)
        job = image_job(gpt.setup.layout, [(texts, None)], how, given=codes)
        nats = -run(gpt.gpt, job, how).log_likelihood.mean() / codes.shape[1]
        bits[f"{precision}_bits_per_code"] = float(nats / np.log(2))
    return bits


def steps(gpt: Any, words: list[str]) -> dict[str, float]:
    """The figures of `steps`, as the decoder draws and greedily."""
    import dataclasses

    from imagegpt_jax.sampling.batching import run
    from imagegpt_jax.sampling.jobs import image_job

    texts, layout = [gpt.encode_text(text) for text in words[:32]], gpt.setup.layout
    steps_per_image: dict[str, float] = {"codes": layout.num_codes, "window": WINDOW}
    for name, temperature in (("as_drawn", None), ("greedy", 0.0)):
        how = gpt.sampling(temperature=temperature, cfg_scale=CFG_SCALE.value)
        how = dataclasses.replace(how, no_repeat_ngram_size=0, speculative=WINDOW)
        job = image_job(layout, [(texts, None)], how)
        steps_per_image[f"{name}_steps"] = float(run(gpt.gpt, job, how, SEED.value).forward_passes.mean())
    return steps_per_image


def _decoded(record: dict[str, Any]) -> np.ndarray:
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(record["image"])).convert("RGB"))


def table(splits: dict[str, Any]) -> str:
    """The figures of every split, each beside its control."""
    rows: dict[str, list[str]] = {}

    def put(what: str, value: str, control: str) -> None:
        rows.setdefault(what, []).append(f"{value} | {control}")

    for split in splits.values():
        told, styled, within = split["captions"], split["styles"], split["inpainting"]
        words = {"image": "picture given caption", "text": "caption given picture"}
        for of in [name for name in words if name in told]:
            put(
                f"right caption first, by likelihood of the {words[of]}",
                f"{told[of]['first']:.0%} of {told['candidates']}",
                f"{told[of]['first_control']:.0%} another's caption",
            )
        put(
            "drawn in the other style, nearer to the true one than to its source",
            f"{styled['nearer_to_the_other_style']:.0%} of {styled['pairs']}",
            f"{styled['control_shuffled_prompts']:.0%} shuffled, {styled['control_reconstruction']:.0%} reconstruction",
        )
        put(
            "pixels that inpainting changed outside the mask; error inside",
            f"{within['pixels_changed_outside']:.0%}; {within['rms_error_inside']:.0f}",
            f"{within['rms_error_inside_control']:.0f} mean colour",
        )
        put(
            "bits per image token with weights in bfloat16, int8",
            ", ".join(f"{split['weights'][f'{name}_bits_per_code']:.4f}" for name in ("bfloat16", "int8")),
            f"{split['weights']['float32_bits_per_code']:.4f} float32",
        )
        put(
            f"forward passes per image, `--speculative={split['steps']['window']}`; greedy",
            f"{split['steps']['as_drawn_steps']:.1f}; {split['steps']['greedy_steps']:.1f}",
            f"{split['steps']['codes']} one by one",
        )
    names = " | ".join(f"{name.partition(',')[0]} | control" for name in splits)
    head = [f"| what | {names} |", "|---" * (1 + 2 * len(splits)) + "|"]
    return "\n".join(head + [f"| {what} | {' | '.join(cells)} |" for what, cells in rows.items()])


def main() -> None:
    """Measures the decoder that the flags name."""
    if PAGE.value and not OUTPUT.value:
        raise errors.UserError("--page shows the figures of --output: give both.")
    from imagegpt_jax.data.emoji import EmojiSource
    from imagegpt_jax.inference import loading
    from imagegpt_jax.metrics.retrieval import choose_distinct

    gpt = loading.load_decoder(DECODER.value)
    tok = gpt.load_tokenizer()
    res = gpt.setup.layout.grid[0] * tok.downsample
    source = EmojiSource(SPLIT.value, res=res)
    chosen = choose_distinct(
        lambda numbers: [source.pictures[i].concept for i in numbers], len(source), EXAMPLES.value, SEED.value
    )
    records = source.__getitems__(chosen.tolist())
    pictures, words = np.stack([_decoded(r) for r in records]), [r["captions"][0] for r in records]
    figures = {
        "decoder": DECODER.value,
        "step": gpt.step,
        "seed": SEED.value,
        "sampler": {"cfg_scale": CFG_SCALE.value, "best_of": BEST_OF.value, "strength": STRENGTH.value},
        "captions": captions(gpt, tok, pictures, words),
        "inpainting": inpainting(gpt, tok, pictures, words),
        "weights": weights(gpt, tok, pictures, words),
        "steps": steps(gpt, words),
        "styles": styles(gpt, tok, source, np.random.default_rng(SEED.value)),
    }
    print(json.dumps(figures, indent=1))
    if OUTPUT.value:
        output = pathlib.Path(OUTPUT.value)
        figures = (json.loads(output.read_text()) if output.exists() else {}) | {source.name: figures}
        output.write_text(json.dumps(figures, indent=1) + "\n")
        if PAGE.value:
            marked.fill(pathlib.Path(PAGE.value), tasks=table(figures))


if __name__ == "__main__":
    cli.run(main)
