"""Scores trained checkpoints, and folders of images, and writes one JSON that says exactly what was measured.

A tokenizer is scored by how well it reproduces images and how much of its codebook it uses; a decoder by how well it
predicts tokens, and by whether the pictures that it draws can be told apart by what they should show. Images are scored
against a reference by FID, KID and the like, by a named protocol; nothing is downloaded that is given by path.

  python -m imagegpt_jax.evaluate --checkpoint=runs/tokenizer --output=metrics.json
  python -m imagegpt_jax.evaluate --checkpoint=runs/tokenizer --checkpoint=runs/decoder --output=metrics.json \\
      --images_dir=pictures
  python -m imagegpt_jax.evaluate --checkpoint=runs/decoder --data=emoji:validation \\
      --generation_data=emoji:heldout_style --output=heldout.json
  python -m imagegpt_jax.evaluate --checkpoint=runs/decoder --prompts=PartiPrompts.tsv --protocol=parti_prompts \\
      --feature_weights=clip=clip-vit-base-patch32 --output=parti.json
  python -m imagegpt_jax.evaluate --images=samples --reference=photos --protocol=torch_fidelity --metrics=fid,is,kid \\
      --feature_weights=pt_inception-2015-12-05-6726825d.pth --output=scores.json
  python -m imagegpt_jax.evaluate --compare a.json b.json
  python -m imagegpt_jax.evaluate --human --images=run_a --against=run_b --output=votes.jsonl
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath

from imagegpt_jax import cli, errors
from imagegpt_jax.evaluation import checkpoint_data, checkpoints, generate_for_prompts, human, image_sets
from imagegpt_jax.metrics import protocols, provenance, sets
from imagegpt_jax.metrics.metric import Options
from imagegpt_jax.runtime import distributed, filesystem

FLAGS = flags.FLAGS
# First flag of a group -> its title in --help.
FLAG_GROUPS = {
    "checkpoint": "Scores of checkpoints",
    "images": "Scores of a set of images",
    "report": "Reports, votes, comparisons",
}
CHECKPOINT = flags.DEFINE_multi_string(
    "checkpoint", None, "Workdir or exported folder of a tokenizer or a decoder; give it twice to score both."
)
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")
DATA = flags.DEFINE_string("data", "", "Data to score on; by default the run's own validation data.")
OPS = flags.DEFINE_string("ops", "", "What is done to the images of --data; by default the run's own data.eval_ops.")
STEP = flags.DEFINE_integer(
    "step", None, "Checkpoint step, with one --checkpoint; by default the newest.", lower_bound=0
)
TOKENIZER = flags.DEFINE_string(
    "tokenizer", "", "Workdir of the image tokenizer; by default the one that the decoder was trained with."
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    0,
    "How many examples are read at once, which no score depends on; 0 for the default.",
    lower_bound=0,
)
GENERATION_PROMPTS = flags.DEFINE_integer(
    "generation_prompts", 100, "Prompts to draw pictures for; 0 leaves that score out.", lower_bound=0
)
SAMPLES_PER_PROMPT = flags.DEFINE_integer(
    "samples_per_prompt", None, "Pictures of each prompt; by default 4, or of --prompts the protocol's number.", 1
)
SAMPLER = flags.DEFINE_list(
    "sampler", [], "Settings of `sample` in place of the decoder's own, such as cfg_scale=3,top_k=100."
)
PROMPTS = flags.DEFINE_string(
    "prompts",
    "",
    "Draw and score pictures of the prompts in this file: COCO's captions_val2014.json or LlamaGen's coco_captions.csv,"
    " PartiPrompts.tsv, GenEval's evaluation_metadata.jsonl by their --protocol, or a file as `sample` takes it by"
    " another; 'classes' for all classes.",
)
SAMPLES_DIR = flags.DEFINE_string(
    "samples_dir", "", "Folder for the pictures of --prompts, which are kept; by default beside --output."
)
GENERATION_DATA = flags.DEFINE_string(
    "generation_data", "", "Pictures and captions to draw prompts from; by default the decoder's training data."
)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the choice of prompts, of their pictures, and of resampling.", lower_bound=0
)
IMAGES_DIR = flags.DEFINE_string("images_dir", "", "Folder for reconstructions.png and generations.png; default none.")

IMAGES = flags.DEFINE_string("images", "", "Folder or .npz of images to score, in place of checkpoints.")
REFERENCE = flags.DEFINE_string(
    "reference",
    "",
    "Folder or .npz of images to compare with, or .npz of statistics (ADM's, or --statistics_output's).",
)
PROTOCOL = flags.DEFINE_enum("protocol", "torch_fidelity", list(protocols.PROTOCOLS), "How --images are scored.")
METRICS = flags.DEFINE_list(
    "metrics",
    [],
    "What is computed, such as fid,is,kid; by default the protocol's own. With --checkpoint:"
    " of reconstructions and of samples.",
)
FEATURE_WEIGHTS = flags.DEFINE_multi_string(
    "feature_weights",
    [],
    "File of the feature network's weights, or network=FILE; by default the public file, downloaded once.",
)
NUM_IMAGES = flags.DEFINE_integer("num_images", 0, "Score only so many images, the first ones.", lower_bound=0)
KID_SUBSETS = flags.DEFINE_integer("kid_subsets", None, "Subsets of KID; by default the protocol's.", lower_bound=1)
KID_SUBSET_SIZE = flags.DEFINE_integer(
    "kid_subset_size", None, "Images of a subset of KID; by default the protocol's.", lower_bound=2
)
IS_SPLITS = flags.DEFINE_integer(
    "is_splits", None, "Splits of the Inception Score; by default the protocol's.", lower_bound=1
)
BOOTSTRAP = flags.DEFINE_integer(
    "bootstrap", 0, "Resamplings of the images for the interval of FID; 0 leaves it out.", lower_bound=0
)
INFINITY = flags.DEFINE_boolean("infinity", False, "Extrapolate FID to infinitely many images.")
TRAIN_IMAGES = flags.DEFINE_string(
    "train_images", "", "Folder or .npz of images that were trained on: warns of those in the reference."
)
STATISTICS_OUTPUT = flags.DEFINE_string(
    "statistics_output", "", "Write mean and covariance of --images to this .npz, to be a --reference later."
)
CAPTIONS = flags.DEFINE_string(
    "captions",
    "",
    "File of the images' captions (.txt, .jsonl, .csv, .tsv); by default NAME.txt beside them, or their prompts.",
)
SCORER = flags.DEFINE_string(
    "scorer", "", "module:function that judges images for the metric geneval, whose prompts are --captions."
)
REPORT = flags.DEFINE_string("report", "", "Write a page about the scores, with pictures, to this .html file.")
SWEEP = flags.DEFINE_list(
    "sweep", [], "For the report of --images: files of scores at other guidance scales, to draw curves of."
)
HUMAN = flags.DEFINE_boolean(
    "human", False, "Serve a page on this machine where people vote blindly between --images and --against."
)
AGAINST = flags.DEFINE_string("against", "", "The other run's samples for --human, of the same prompts.")
PORT = flags.DEFINE_integer("port", 8000, "Port of the page of --human; 0 takes a free one.", 0, 65535)
COMPARE = flags.DEFINE_list("compare", [], "Explain what two files of scores differ in: --compare A.json B.json.")


def main() -> None:
    """Scores what the flags name."""
    asked = [f"--{f.name}" for f in (CHECKPOINT, IMAGES, COMPARE) if f.value]
    if len(asked) != 1:
        raise errors.UserError(
            f"{' and '.join(asked)} cannot be given together: score one after the other."
            if asked
            else "nothing to score: give --checkpoint=WORKDIR or --images=DIR."
        )
    if PROMPTS.value and not CHECKPOINT.value:
        raise errors.UserError("--prompts are drawn by a decoder: give --checkpoint=WORKDIR.")
    if COMPARE.value:
        print(provenance.compare(COMPARE.value))
        return
    if not OUTPUT.value:
        raise errors.UserError("--output is missing: name the JSON file to write, such as --output=metrics.json.")
    if epath.Path(OUTPUT.value).is_dir():
        raise errors.UserError(
            f"--output={OUTPUT.value} is a folder: name a file, such as {OUTPUT.value}/metrics.json."
        )
    if HUMAN.value:
        ask_people()
    elif PROMPTS.value:
        score_prompts()
    elif CHECKPOINT.value:
        score_checkpoints()
    else:
        request = request_of(IMAGES.value)
        opened = image_sets.open_sets(request)
        with distributed.distributed_context():
            write_scores(request, opened)


def ask_people() -> None:
    """Serves the page until it is stopped, then says what the votes come to."""
    if not IMAGES.value or not AGAINST.value:
        raise errors.UserError("--human needs two runs' samples: --images=A --against=B --output=votes.jsonl.")
    study = human.Study(sets.open_images(IMAGES.value), sets.open_images(AGAINST.value), OUTPUT.value or "", SEED.value)
    server = human.serve(study, PORT.value)
    print(f"http://127.0.0.1:{server.server_port}/?rater=NAME   (stop with Ctrl-C)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(human.table(study.results()))
    finally:
        server.server_close()


def flag_values(of: type) -> dict[str, Any]:
    """The values of the flags that are called like the fields of a dataclass."""
    return {f.name: FLAGS[f.name].value for f in dataclasses.fields(of) if f.name in FLAGS}


def settings_of(paths: Sequence[str]) -> checkpoint_data.Settings:
    """What the flags ask to be computed of checkpoints."""
    values = flag_values(checkpoint_data.Settings) | {
        "checkpoints": paths,
        "samples_per_prompt": SAMPLES_PER_PROMPT.value or 0,
        "sampler": generate_for_prompts.parse_sampler(SAMPLER.value),
        "weights": image_sets.parse_weights(FEATURE_WEIGHTS.value, protocols.find(PROTOCOL.value).features),
        "samples_dir": SAMPLES_DIR.value or str(epath.Path(OUTPUT.value or "").with_suffix("")) + "_samples",
    }
    return checkpoint_data.Settings(**values)


def score_checkpoints() -> None:
    """Scores what --checkpoint names."""
    settings = settings_of(CHECKPOINT.value or [])
    for path in settings.checkpoints:  # a wrong folder is reported before JAX starts
        checkpoint_data.kind_of(path)
    with distributed.distributed_context():
        checkpoints.score(settings)


def score_prompts() -> None:
    """Draws pictures of --prompts by the decoder that --checkpoint names, and scores them."""
    paths = CHECKPOINT.value or []
    if len(paths) != 1 or checkpoint_data.kind_of(paths[0]) != "decoder":
        raise errors.UserError(
            "--prompts are drawn by one decoder: give one --checkpoint, and its --tokenizer if needed."
        )
    settings = settings_of(paths)
    rows, folder = generate_for_prompts.read_rows(settings), epath.Path(settings.samples_dir)
    is_file = settings.prompts != generate_for_prompts.CLASSES
    request = request_of(str(folder), captions=settings.prompts if is_file else "")
    reference = image_sets.open_reference(request)
    with distributed.distributed_context():
        generate_for_prompts.draw(settings, rows)
        request = dataclasses.replace(request, captions=str(folder / generate_for_prompts.CAPTIONS))
        write_scores(request, image_sets.open_sets(request, reference))


def request_of(images: str, captions: str = "") -> image_sets.Request:
    """What the flags ask to be computed of a set of images."""
    protocol = protocols.find(PROTOCOL.value)
    protocol = protocol.with_subsets(KID_SUBSETS.value, KID_SUBSET_SIZE.value).with_splits(IS_SPLITS.value)
    values = flag_values(image_sets.Request) | {
        "images": images,
        "protocol": protocol,
        "metrics": tuple(METRICS.value) or protocol.metrics,
        "weights": image_sets.parse_weights(FEATURE_WEIGHTS.value, protocol.features),
        "options": Options(**flag_values(Options)),
        "captions": captions or CAPTIONS.value,
    }
    return image_sets.Request(**values)


def write_scores(request: image_sets.Request, opened: image_sets.Opened) -> None:
    """Computes, and in the first process writes and prints."""
    scores = image_sets.run(request, opened)
    if distributed.is_main_process():
        filesystem.write_whole(OUTPUT.value or "", json.dumps(scores, indent=1) + "\n")
        print(f"{image_sets.table(scores)}\n\nAll scores: {OUTPUT.value}")


def joined(argv: Sequence[str]) -> list[str]:
    """Lets --compare take its two files as separate words, as the flags of other programs do."""
    words = list(argv)
    if "--compare" in words[:-2]:
        at = words.index("--compare")
        words[at : at + 3] = [f"--compare={words[at + 1]},{words[at + 2]}"]
    return words


if __name__ == "__main__":
    sys.argv = joined(sys.argv)
    cli.run(main, joins=True, cache=True)
