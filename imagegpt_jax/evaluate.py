"""Scores trained checkpoints and writes one flat JSON, each score beside a control that shows what it is worth.

A tokenizer is scored by how well it reproduces images and how much of its codebook it uses; a decoder by how well it
predicts tokens, and by whether the pictures that it draws can be told apart by what they should show.

  python -m imagegpt_jax.evaluate --checkpoint=runs/tokenizer --output=metrics.json
  python -m imagegpt_jax.evaluate --checkpoint=runs/tokenizer --checkpoint=runs/decoder --output=metrics.json \\
      --images_dir=pictures
  python -m imagegpt_jax.evaluate --checkpoint=runs/decoder --data=emoji:validation \\
      --generation_data=emoji:heldout_style --output=heldout.json
"""

import dataclasses
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from imagegpt_jax import cli

if TYPE_CHECKING:
    from etils import epath
    from jax.sharding import Mesh

    from imagegpt_jax.api import Decoder, Tokenizer
    from imagegpt_jax.data.sources import Source

CHECKPOINT = flags.DEFINE_multi_string(
    "checkpoint", None, "Workdir of a tokenizer or a decoder; give it twice to score both.", required=True
)
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.", required=True)
DATA = flags.DEFINE_string("data", "", "Data to score on; by default the run's own validation data.")
STEP = flags.DEFINE_integer(
    "step", None, "Checkpoint step, with one --checkpoint; by default the newest.", lower_bound=0
)
TOKENIZER = flags.DEFINE_string(
    "tokenizer", "", "Workdir of the image tokenizer; by default the one that the decoder was trained with."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Examples scored at once; 0 = the run's own.", lower_bound=0)
GENERATION_PROMPTS = flags.DEFINE_integer(
    "generation_prompts", 100, "Prompts to draw pictures for; 0 leaves that score out.", lower_bound=0
)
SAMPLES_PER_PROMPT = flags.DEFINE_integer("samples_per_prompt", 4, "Pictures of each prompt.", lower_bound=1)
GENERATION_DATA = flags.DEFINE_string(
    "generation_data", "", "Pictures and captions to draw prompts from; by default the decoder's training data."
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the choice of prompts and of their pictures.", lower_bound=0)
IMAGES_DIR = flags.DEFINE_string("images_dir", "", "Folder for reconstructions.png and generations.png; default none.")

Scores = dict[str, float | int | str]
SHOWN_PROMPTS = 16


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the printed table: a score and its control, by their keys."""

    name: str
    key: str
    control: str = ""
    control_key: str = ""


TABLE = (
    Line("reconstruction PSNR, dB", "tokenizer/val_psnr", "mean colour", "tokenizer/val_psnr_mean_color"),
    Line("codebook usage", "tokenizer/codebook_usage"),
    Line("codebook perplexity", "tokenizer/codebook_perplexity"),
    Line("image bits per token", "decoder/val_image_bits_per_token", "unigram", "decoder/unigram_image_bits_per_token"),
    Line("text bits per token", "decoder/val_text_bits_per_token", "unigram", "decoder/unigram_text_bits_per_token"),
    Line("top-1 retrieval", "generation/retrieval_top1", "prompts shuffled", "generation/retrieval_top1_shuffled"),
)


def table(scores: Scores) -> str:
    """The scores that are there, each with its control beside it."""
    lines = []
    for line in TABLE:
        if line.key in scores:
            text = f"{line.name:<26}{scores[line.key]:>10.4f}"
            lines.append(text + (f"   {line.control:>16}{scores[line.control_key]:>10.4f}" if line.control else ""))
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set and the spec that opens it."""

    spec: str
    source: "Source"

    @property
    def about(self) -> Scores:
        """Where a score is from."""
        return {"data": self.spec, "data_fingerprint": self.source.fingerprint}


class Subset:
    """Some records of a source, in a given order."""

    def __init__(self, source: "Source", indices: Sequence[int]):
        self._source, self._indices = source, list(indices)
        self.name, self.label_names, self.fingerprint = source.name, source.label_names, source.fingerprint

    def __len__(self) -> int:
        return len(self._indices)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Records of the source."""
        return self._source.__getitems__([self._indices[i] for i in indices])


def progress(batches: Iterable[Any], name: str, examples: int, batch_size: int) -> Iterable[Any]:
    """Batches with a progress bar."""
    from tqdm import tqdm

    return tqdm(batches, desc=name, unit="batch", total=-(-examples // batch_size), mininterval=1.0)


# ------------------------------------------------------------------------------------------------------------ stages


def score_tokenizer(path: str, data: "Data", mesh: "Mesh") -> tuple[Scores, np.ndarray]:
    """Scores of a tokenizer, and a picture of inputs over reconstructions (uint8 [H, W, C])."""
    import jax

    from imagegpt_jax import api, sharding
    from imagegpt_jax.data import pipeline
    from imagegpt_jax.evals import common, reconstruction
    from imagegpt_jax.tasks import tokenizer as task

    setup, params, step = api.read_tokenizer(path, STEP.value)
    config: Any = setup.config
    batch_size = _batch_size(config.eval_batch_size, mesh)
    one_pass = {"rows": sharding.host_rows(mesh, batch_size), "shuffle": False, "epochs": 1, "columns": ("image",)}
    batches = pipeline.Batches(data.source, ops=config.data.eval_ops, batch_size=batch_size, **one_pass)
    with jax.set_mesh(mesh):
        scores, grid = reconstruction.evaluate(
            task.predict_fns(setup)["reconstruct"],
            jax.device_put(common.to_host(params), sharding.replicated(mesh)),
            progress(batches, "tokenizer", len(data.source), batch_size),
            setup.model.quantizer.num_ids,
            mesh,
        )
    names = {name: f"val_{name}" for name in ("psnr", "psnr_mean_color", "l1", "mse")}
    about = {
        "checkpoint": path,
        "step": step,
        **data.about,
        "ops": config.data.eval_ops,
        "num_codes": setup.model.quantizer.num_ids,
    }
    return {f"tokenizer/{names.get(name, name)}": value for name, value in (about | scores).items()}, grid


def score_decoder(decoder: "Decoder", tok: "Tokenizer", data: "Data", mesh: "Mesh") -> Scores:
    """Likelihoods of a decoder."""
    import jax

    from imagegpt_jax import sharding, state
    from imagegpt_jax.data import pipeline
    from imagegpt_jax.evals import common, likelihood
    from imagegpt_jax.tasks import decoder as task

    config, source = decoder.config, data.source
    made_by = getattr(source, "info", {}).get("tokenizer", tok.fingerprint)
    if made_by != tok.fingerprint:
        raise cli.UserError(
            f"the token shards {source.name} were made by another tokenizer ({made_by}) than {tok.path or 'this'}"
            f" ({tok.fingerprint}): encode them again, or name their tokenizer by --tokenizer."
        )
    batch_size = _batch_size(config.eval_batch_size, mesh)
    one_pass = {"rows": sharding.host_rows(mesh, batch_size), "shuffle": False, "epochs": 1}
    batches = pipeline.Batches(source, ops=config.data.eval_ops, batch_size=batch_size, **one_pass)
    nll = task.predict_fns(decoder.setup)["nll"]

    def packed() -> Iterator[dict[str, np.ndarray]]:
        for batch in progress(batches, "decoder", len(source), batch_size):
            codes = batch["codes"] if "codes" in batch else tok.encode(batch["image"])
            rest = {name: value for name, value in batch.items() if name != "image"}
            yield task.pack(decoder.setup, {**rest, "codes": codes}, train=False)

    _, params = state.split(decoder.gpt)
    with jax.set_mesh(mesh):
        scores = likelihood.evaluate(
            lambda params, batch: (nll(params, batch), batch["targets"]),
            jax.device_put(common.to_host(params), sharding.replicated(mesh)),
            packed(),
            decoder.setup.space.vocab_size,
            mesh,
        )
    about = {
        "checkpoint": decoder.path,
        "step": decoder.step,
        "tokenizer_checkpoint": tok.path,
        "tokenizer_fingerprint": tok.fingerprint,
        **data.about,
        "images": len(source),
    }
    return {
        f"decoder/{name if name in about or name.startswith('unigram') else f'val_{name}'}": value
        for name, value in (about | scores).items()
    }


def score_generation(decoder: "Decoder", tok: "Tokenizer", data: "Data") -> tuple[Scores, np.ndarray]:
    """Retrieval of drawn pictures, and a picture (uint8 [H, W, 3]) of some references, each before its samples."""
    from tqdm import tqdm

    from imagegpt_jax import api, images
    from imagegpt_jax.data import pipeline
    from imagegpt_jax.evals import generation

    config, source = decoder.config, data.source
    use_labels = by_class(config)

    def shown(record: dict[str, Any]) -> Any:
        """What a record shows: its concept where the set knows it, else its class or caption."""
        return record["label"] if use_labels else record.get("concept", record["captions"][0])

    chosen = generation.choose_distinct(
        lambda numbers: [shown(record) for record in source.__getitems__(numbers)],
        len(source),
        GENERATION_PROMPTS.value,
        SEED.value,
    )
    subset, each = Subset(source, chosen.tolist()), SAMPLES_PER_PROMPT.value
    records = subset.__getitems__(range(len(subset)))
    batches = pipeline.Batches(
        subset, ops=config.data.eval_ops, batch_size=len(subset), shuffle=False, epochs=1, columns=("image",)
    )
    references_PHWC = images.to_uint8(next(iter(batches))["image"])
    batches.close()

    sampling = decoder.sampling()
    prompts = [decoder.setup.labels[r["label"]] if use_labels else r["captions"][0] for r in records]
    stream = api.generate_tiles(
        decoder,
        tok,
        [""] * len(records) if use_labels else prompts,
        [record["label"] if use_labels else None for record in records],
        sampling=sampling,
        seed=SEED.value,
        num_images=each,
    )
    drawn = []
    with tqdm(total=len(records) * each, desc="generation", unit="image", mininterval=1.0) as bar:
        for tile in stream:
            drawn.append(tile)
            bar.update(len(tile))
    samples = np.concatenate(drawn)
    samples_PSHWC = samples.reshape(len(records), each, *samples.shape[1:])
    about = {
        **data.about,
        "prompts": len(records),
        "samples_per_prompt": each,
        "seed": SEED.value,
        "filter": f"box {generation.THUMBNAIL} x {generation.THUMBNAIL}",
        **dataclasses.asdict(sampling),
    }
    scores = about | generation.retrieval(samples_PSHWC, references_PHWC, SEED.value)
    tiles = [
        images.Tile(prompt, [reference, *drawings])
        for prompt, reference, drawings in zip(prompts, references_PHWC, samples_PSHWC, strict=True)
    ]
    return {f"generation/{name}": value for name, value in scores.items()}, images.grid(tiles[:SHOWN_PROMPTS])


def _batch_size(default: int, mesh: "Mesh") -> int:
    """The batch size asked for, or the run's, which is rounded up to fit the devices."""
    from imagegpt_jax import sharding

    parts = sharding.batch_shards(mesh)
    if BATCH_SIZE.value:
        sharding.check_batch_size(BATCH_SIZE.value, mesh)
    return BATCH_SIZE.value or -(-default // parts) * parts


# -------------------------------------------------------------------------------------------------------------- main


def stages() -> dict[str, str]:
    """Task -> workdir, for the checkpoints that the flags name, each of which has been found to be there."""
    from imagegpt_jax import config as config_lib

    found: dict[str, str] = {}
    for path in CHECKPOINT.value:
        task: Any = config_lib.load(path).task
        if task in found:
            raise cli.UserError(f"{found[task]} and {path} are both a {task}: score them one at a time.")
        found[task] = path
    if STEP.value is not None and len(found) > 1:
        raise cli.UserError("--step needs a single --checkpoint: score them one at a time.")

    from imagegpt_jax import checkpoint  # imports JAX, for whose start a wrong folder should not wait

    for path in found.values():
        checkpoint.choose_step(path, STEP.value)
    return found


def by_class(config: Any) -> bool:
    """Whether a decoder draws classes, not words."""
    return config.data.text_length <= int(config.data.use_labels)


def open_data(found: Mapping[str, str]) -> dict[str, Data]:
    """Opens what each stage, and "generation", is scored on."""
    from imagegpt_jax import api
    from imagegpt_jax.data import sources

    opened = {}
    for task, path in found.items():
        spec = DATA.value or api.read_config(path, task).data.validation
        opened[task] = Data(spec, sources.open_source(spec, require="image" if task == "tokenizer" else None))
    if "decoder" in found and GENERATION_PROMPTS.value:
        config = api.read_config(found["decoder"], "decoder")
        spec = source_of(GENERATION_DATA.value or config.data.train)
        opened["generation"] = Data(spec, sources.open_source(spec, require="image"))
        sources.open_source(spec, require="label" if by_class(config) else "captions")
    return opened


def source_of(spec: str) -> str:
    """For token shards, the pictures that they were encoded from; else the data set itself."""
    from imagegpt_jax.data import sources

    source = sources.open_source(spec)
    if "codes" not in source.__getitems__([0])[0]:
        return spec
    made_of = getattr(source, "info", {}).get("source", "")
    if not made_of:
        raise cli.UserError(f"{source.name} does not say which pictures it was made of: give --generation_data.")
    return made_of


def write(path: "epath.Path", data: bytes) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_bytes(data)
    temporary.replace(path)


def main() -> None:
    """Scores what the flags name."""
    from imagegpt_jax import config as config_lib
    from imagegpt_jax import distributed, storage

    storage.check(CHECKPOINT.value, OUTPUT.value, DATA.value, TOKENIZER.value, GENERATION_DATA.value, IMAGES_DIR.value)
    for workdir in CHECKPOINT.value:  # a wrong folder is told before JAX starts
        config_lib.load(workdir)
    with distributed.together():
        score()


def score() -> None:
    """Scores together with the other processes, the first of which writes."""
    from etils import epath

    output = epath.Path(OUTPUT.value)
    if output.is_dir():
        raise cli.UserError(f"--output={output} is a folder: name a file, such as {output / 'metrics.json'}.")
    found = stages()

    import jax

    from imagegpt_jax import api, distributed, images, sharding

    opened = open_data(found)
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    scores: Scores = {"version": importlib.metadata.version("imagegpt_jax"), "jax_version": jax.__version__}
    shown: dict[str, np.ndarray] = {}
    if "tokenizer" in found:
        values, shown["reconstructions"] = score_tokenizer(found["tokenizer"], opened["tokenizer"], mesh)
        scores |= values
    if "decoder" in found:
        decoder = api.load_decoder(found["decoder"], STEP.value, tokenizer=TOKENIZER.value or None)
        tok = decoder.load_tokenizer()
        scores |= score_decoder(decoder, tok, opened["decoder"], mesh)
        if "generation" in opened:
            values, shown["generations"] = score_generation(decoder, tok, opened["generation"])
            scores |= values

    if not distributed.is_first():
        return
    write(output, (json.dumps(scores, indent=1, sort_keys=True) + "\n").encode())
    for name, picture in shown.items() if IMAGES_DIR.value else ():
        write(epath.Path(IMAGES_DIR.value) / f"{name}.png", images.png_bytes(picture, {"checkpoints": found}))
    print(f"{table(scores)}\n\nAll scores: {output}")


if __name__ == "__main__":
    cli.run(main)
