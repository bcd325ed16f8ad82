"""Scores trained checkpoints: one flat mapping of scores, each beside a control that shows what it is worth.

A tokenizer is scored by how well it reproduces images and how much of its codebook it uses; a decoder by how well it
predicts tokens, and by whether the pictures that it draws can be told apart by what they should show.
Heavy imports are inside the functions, so that a wrong flag is told at once.
"""

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from imagegpt_jax import errors
from imagegpt_jax.evaluation.checkpoint_data import (
    Data,
    Scores,
    Settings,
    Subset,
    by_class,
    config_of,
    open_data,
    rows,
    source_of,
    stages,
    table,
)
from imagegpt_jax.runtime.filesystem import write_whole

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from imagegpt_jax.inference.loading import Decoder, Tokenizer
    from imagegpt_jax.metrics import reconstruction

SHOWN_PROMPTS, NUM_WORST = 16, 12  # on a page
BATCH_SIZE = 64
TILE = 8  # rows of a device at once, always: products of other shapes differ in the last bits


def progress(batches: Iterable[Any], name: str, examples: int, batch_size: int) -> Iterable[Any]:
    """Batches with a progress bar."""
    from tqdm import tqdm

    return tqdm(batches, desc=name, unit="batch", total=-(-examples // batch_size), mininterval=1.0)


# ------------------------------------------------------------------------------------------------------------ stages


@dataclasses.dataclass
class Material:
    """What a page shows besides scores.

    Attributes:
      shown: pictures of reconstructions and generations, uint8 [H, W, C].
      details: of reconstructions.
      samples: image sets of drawn pictures and of what they may be copies of.
    """

    shown: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    details: "reconstruction.Details | None" = None
    samples: tuple[Any, Any] | None = None


def score_tokenizer(settings: Settings, path: str, data: "Data", mesh: "Mesh", page: Material) -> Scores:
    """Scores of a tokenizer."""
    import jax

    from imagegpt_jax.data import pipeline
    from imagegpt_jax.inference import loading
    from imagegpt_jax.metrics import common, reconstruction
    from imagegpt_jax.parallel import sharding
    from imagegpt_jax.tasks import tokenizer as task

    setup, params, step = loading.read_tokenizer(path, settings.step)
    batch_size, ops = _batch_size(settings, mesh), settings.ops or config_of(path).data.eval_ops
    one_pass = {"rows": sharding.host_rows(mesh, batch_size), "shuffle": False, "epochs": 1, "columns": ("image",)}
    batches = pipeline.Batches(data.source, ops=ops, batch_size=batch_size, **one_pass)
    found: list[reconstruction.Details] = []
    with jax.set_mesh(mesh):
        scores, grid = reconstruction.evaluate(
            task.predict_fns(setup)["reconstruct"],
            jax.device_put(common.to_host(params), sharding.replicated(mesh)),
            common.tiles(progress(batches, "tokenizer", len(data.source), batch_size), TILE, mesh),
            setup.model.quantizer.num_ids,
            mesh,
            num_worst=NUM_WORST if settings.report else 0,
            tell=found.append,
        )
    names = {name: f"val_{name}" for name in ("psnr", "psnr_mean_color", "l1", "mse")}
    about = {
        "checkpoint": path,
        "step": step,
        "fingerprint": loading.Tokenizer(setup, params, path=path, step=step).fingerprint,
        **data.about,
        "ops": ops,
        "num_codes": setup.model.quantizer.num_ids,
    }
    page.shown["reconstructions"], page.details = grid, found[0]
    return {f"tokenizer/{names.get(name, name)}": value for name, value in (about | scores).items()}


def score_sets(settings: Settings, prefix: str, names: Sequence[str], images: Any, reference: Any) -> Scores:
    """Metrics of image sets, such as rFID or KID, under the names `prefix/metric`."""
    from imagegpt_jax.evaluation import image_sets
    from imagegpt_jax.metrics import protocols, score

    protocol = protocols.find(settings.protocol)
    request = image_sets.Request(
        images=images.path,
        reference=reference.path,
        protocol=protocol,
        metrics=tuple(names),
        weights=settings.weights,
        options=score.Options(seed=settings.seed),
    )
    scores = image_sets.of_sets(request, images, reference)
    about = scores.pop("provenance")
    found: Scores = {f"{prefix}/{name}": result["value"] for name, result in scores.items()}
    for name, result in scores.items():
        if result["interval"]:
            found |= {f"{prefix}/{name}_low": result["interval"][0], f"{prefix}/{name}_high": result["interval"][1]}
    facts = {
        "protocol": protocol.name,
        "images": about["images"]["n"],
        "reference_images": about["reference"]["n"],
        "reference_sha256": about["reference"]["sha256"],
    }
    facts |= {f"{name}_sha256": weights["sha256"] for name, weights in about["feature_weights"].items()}
    return found | {f"{prefix}/{name}": value for name, value in facts.items()}


def score_reconstructions(settings: Settings, path: str, data: "Data") -> Scores:
    """Metrics of image sets of a tokenizer's reconstructions against its inputs."""
    from imagegpt_jax.inference import loading
    from imagegpt_jax.metrics.reconstructed import Decoded

    ops = settings.ops or config_of(path).data.eval_ops
    images = Decoded(f"{path} on {data.spec}", data.source, ops, loading.load_tokenizer(path, settings.step))
    return score_sets(settings, "reconstruction", settings.metrics, images, Decoded(data.spec, data.source, ops))


def score_samples(
    settings: Settings, config: Any, samples_NHWC: np.ndarray, references_NHWC: np.ndarray, validation: "Data"
) -> Scores:
    """Metrics of image sets of drawn pictures against unseen ones; as a control, of the prompts' own pictures."""
    from imagegpt_jax.data import sources
    from imagegpt_jax.metrics import score
    from imagegpt_jax.metrics.reconstructed import Decoded, Held

    names = [name for name in settings.metrics if score.METRICS[name].reference in ("", "images", "statistics")]
    spec = source_of(validation.spec)
    unseen = Decoded(spec, sources.open_source(spec, require="image"), config.data.eval_ops)
    scores = score_sets(settings, "samples", names, Held("samples", samples_NHWC), unseen)
    control = score_sets(settings, "samples", names, Held("the prompts' pictures", references_NHWC), unseen)
    found = {name: control[f"samples/{name}"] for name in names if f"samples/{name}" in control}  # in the first process
    return scores | {f"samples/{name}_real": value for name, value in found.items()}


def score_decoder(settings: Settings, decoder: "Decoder", tok: "Tokenizer", data: "Data", mesh: "Mesh") -> Scores:
    """Likelihoods of a decoder."""
    import jax

    from imagegpt_jax import train_state
    from imagegpt_jax.data import pipeline
    from imagegpt_jax.metrics import common, likelihood
    from imagegpt_jax.parallel import sharding
    from imagegpt_jax.sampling.likelihood import FEATURES
    from imagegpt_jax.tasks import decoder as task

    config, source = decoder.config, data.source
    made_by = getattr(source, "info", {}).get("tokenizer", tok.fingerprint)
    if made_by != tok.fingerprint:
        raise errors.UserError(
            f"the token shards {source.name} were made by another tokenizer ({made_by}) than {tok.path or 'this'}"
            f" ({tok.fingerprint}): encode them again, or name their tokenizer by --tokenizer."
        )
    batch_size = _batch_size(settings, mesh)
    one_pass = {"rows": sharding.host_rows(mesh, batch_size), "shuffle": False, "epochs": 1}
    batches = pipeline.Batches(source, ops=settings.ops or config.data.eval_ops, batch_size=batch_size, **one_pass)
    nll = task.predict_fns(decoder.setup)["nll"]

    def packed() -> Iterator[dict[str, np.ndarray]]:
        for batch in progress(batches, "decoder", len(source), batch_size):
            codes = batch["codes"] if "codes" in batch else tok.encode(batch["image"])
            rest = {name: value for name, value in batch.items() if name != "image"}
            features = decoder.read([str(c) for c in batch.get("caption", [""] * len(codes))])
            seen = {} if features is None else dict(zip(FEATURES, features, strict=True))
            yield task.pack(decoder.setup, {**rest, "codes": codes}, train=False) | seen

    columns = likelihood.COLUMNS
    if decoder.setup.layout.target_positions:
        columns = (*columns, "target_positions")
    if decoder.setup.encoder is not None:
        columns = (*columns, *FEATURES)

    _, params = train_state.split(decoder.gpt)
    with jax.set_mesh(mesh):
        scores = likelihood.evaluate(
            lambda params, batch: (nll(params, batch), batch["targets"]),
            jax.device_put(common.to_host(params), sharding.replicated(mesh)),
            common.tiles(packed(), TILE, mesh),
            decoder.setup.space.vocab_size,
            mesh,
            columns,
        )
    if "image_bits_per_token" in scores:
        rows, columns = config.data.grid
        numbers = 3 * rows * columns * tok.downsample**2  # of a picture
        scores["image_bits_per_dim"] = scores["image_bits_per_token"] * scores["image_tokens"] / (len(source) * numbers)
    about = {
        "checkpoint": decoder.path,
        "step": decoder.step,
        "fingerprint": decoder.fingerprint(),
        "tokenizer_checkpoint": tok.path,
        "tokenizer_fingerprint": tok.fingerprint,
        **data.about,
        "images": len(source),
    }
    return {
        f"decoder/{name if name in about or name.startswith('unigram') else f'val_{name}'}": value
        for name, value in (about | scores).items()
    }


def score_generation(
    settings: Settings, decoder: "Decoder", tok: "Tokenizer", data: "Data", validation: "Data", page: Material
) -> Scores:
    """Retrieval of drawn pictures."""
    from tqdm import tqdm

    from imagegpt_jax import images
    from imagegpt_jax.data import pipeline, sources
    from imagegpt_jax.generation import pipeline as drawing
    from imagegpt_jax.metrics import reconstructed, retrieval

    config, source = decoder.config, data.source
    use_labels = by_class(config)

    def shown(record: dict[str, Any]) -> Any:
        """What a record shows: its concept where the set knows it, else its class or caption."""
        return record["label"] if use_labels else record.get("concept", record["captions"][0])

    chosen = retrieval.choose_distinct(
        lambda numbers: [shown(record) for record in source.__getitems__(numbers)],
        len(source),
        settings.generation_prompts,
        settings.seed,
    )
    subset, each = Subset(source, chosen.tolist()), settings.samples_per_prompt
    records = subset.__getitems__(range(len(subset)))
    batches = pipeline.Batches(
        subset, ops=config.data.eval_ops, batch_size=len(subset), shuffle=False, epochs=1, columns=("image",)
    )
    references_PHWC = images.to_uint8(next(iter(batches))["image"])
    batches.close()

    sampling = decoder.sampling(**settings.sampler)
    prompts = [decoder.setup.labels[r["label"]] if use_labels else r["captions"][0] for r in records]
    asked = drawing.Sketch(
        prompts=[""] * len(records) if use_labels else prompts,
        classes=[record["label"] if use_labels else None for record in records],
    )
    stream = drawing.draw(decoder, tok, asked, sampling, settings.seed, num_images=each)
    drawn = []
    with tqdm(total=len(records) * each, desc="generation", unit="image", mininterval=1.0) as bar:
        for tile in stream:
            drawn.append(tile.images)
            bar.update(len(tile.images))
    samples = np.concatenate(drawn)
    samples_PSHWC = samples.reshape(len(records), each, *samples.shape[1:])
    about = {
        **data.about,
        "prompts": len(records),
        "samples_per_prompt": each,
        "seed": settings.seed,
        "filter": f"box {retrieval.THUMBNAIL} x {retrieval.THUMBNAIL}",
        **dataclasses.asdict(sampling),
    }
    scores = about | retrieval.retrieval(samples_PSHWC, references_PHWC, settings.seed)
    tiles = [
        images.Tile(prompt, [reference, *drawings])
        for prompt, reference, drawings in zip(prompts, references_PHWC, samples_PSHWC, strict=True)
    ]
    found: Scores = {f"generation/{name}": value for name, value in scores.items()}
    if settings.metrics:
        found |= score_samples(settings, config, samples, references_PHWC, validation)
    page.shown["generations"] = images.grid(tiles[:SHOWN_PROMPTS])
    if settings.report:
        training = source_of(config.data.train)
        trained_on = sources.open_source(training, require="image")
        page.samples = (
            reconstructed.Held("samples", samples, [prompt for prompt in prompts for _ in range(each)]),
            reconstructed.Decoded(training, trained_on, config.data.eval_ops),
        )
    return found


def _batch_size(settings: Settings, mesh: "Mesh") -> int:
    """Examples that are read at once: whole tiles of every device."""
    from imagegpt_jax.parallel import sharding

    tiles = TILE * sharding.batch_shards(mesh)
    return -(-(settings.batch_size or BATCH_SIZE) // tiles) * tiles


# -------------------------------------------------------------------------------------------------------------- main


def write_report(settings: Settings, found: Mapping[str, str], scores: Scores, material: Material) -> None:
    """Writes a page of the scores, the pictures, the use of codes and the losses of training."""
    from imagegpt_jax.evaluation import report
    from imagegpt_jax.evaluation.html import Report, Shown

    page = Report(f"Scores of {', '.join(found.values())}")
    page.table("Scores", ("score", "value", "control", "value of the control"), rows(scores))
    notes = {"reconstructions": "inputs over reconstructions", "generations": "each reference before its samples"}
    for name, picture in material.shown.items():
        page.gallery(name.capitalize(), [Shown([picture], notes[name])], whole=True)
    if material.details is not None:
        report.worst_reconstructions(page, material.details.worst, material.details.psnr)
        report.codes(page, material.details.counts_K)
    if material.samples is not None:
        report.neighbours(page, *material.samples)
    for path in found.values():
        report.losses(page, path)
    every = [(name, f"{value:.6g}" if isinstance(value, float) else value) for name, value in sorted(scores.items())]
    page.table("What was measured", ("key", "value"), every)
    write_whole(epath.Path(settings.report), page.html())


def score(settings: Settings) -> None:
    """Scores together with the other processes, the first of which writes."""
    output = epath.Path(settings.output)
    found = stages(settings)

    import jax

    from imagegpt_jax import images
    from imagegpt_jax.inference import loading
    from imagegpt_jax.metrics import provenance
    from imagegpt_jax.parallel import sharding
    from imagegpt_jax.runtime import distributed

    opened = open_data(settings, found)
    mesh = sharding.local_mesh(jax.devices())
    started = time.monotonic()
    scores: Scores = {**provenance.code(), "jax_version": jax.__version__}
    page = Material()
    if "tokenizer" in found:
        path, data = found["tokenizer"], opened["tokenizer"]
        scores |= score_tokenizer(settings, path, data, mesh, page)
        if settings.metrics:
            scores |= score_reconstructions(settings, path, data)
    if "decoder" in found:
        decoder = loading.load_decoder(found["decoder"], settings.step, tokenizer=settings.tokenizer or None)
        tok = decoder.load_tokenizer()
        scores |= score_decoder(settings, decoder, tok, opened["decoder"], mesh)
        if "generation" in opened:
            scores |= score_generation(settings, decoder, tok, opened["generation"], opened["decoder"], page)

    if not distributed.is_main_process():
        return
    scores["seconds"] = round(time.monotonic() - started, 3)
    write_whole(output, json.dumps(scores, indent=1, sort_keys=True) + "\n")
    for name, picture in page.shown.items() if settings.images_dir else ():
        write_whole(epath.Path(settings.images_dir) / f"{name}.png", images.png_bytes(picture, {"checkpoints": found}))
    if settings.report:
        write_report(settings, found, scores, page)
    print(f"{table(scores)}\n\nAll scores: {output}")
