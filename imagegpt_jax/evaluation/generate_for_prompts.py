"""Pictures of a list of prompts, drawn by a checkpoint to be scored as a set: the files of published protocols.

Pictures are PNGs that say what drew them, in a folder that grows until it is whole: the same command goes on where it
was cut short. Picture i depends on the seed and i alone, so any number of processes draw the same ones.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.evaluation.checkpoint_data import Settings
from imagegpt_jax.generation import output
from imagegpt_jax.generation.prompts import read_prompts
from imagegpt_jax.metrics import prompts, protocols
from imagegpt_jax.runtime import filesystem, progress
from imagegpt_jax.sampling.settings import RENAMED, Sampling, renamed

if TYPE_CHECKING:
    from imagegpt_jax.generation.pipeline import Pipeline

PLAN, CAPTIONS = "plan.json", "captions.jsonl"
CLASSES = "classes"  # in place of a file of prompts: every class
Row = Mapping[str, Any]


def parse_sampler(values: Sequence[str]) -> dict[str, Any]:
    """`["cfg_scale=3", ...]` -> settings of `Sampling`; raises UserError for an unknown setting, or a wrong value."""
    kinds: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(Sampling)}
    given: dict[str, Any] = {}
    for value in values:
        name, separator, text = value.partition("=")
        name = RENAMED.get(name, name)
        if name not in kinds:
            raise UserError(f"unknown setting {name!r} in --sampler.{suggest(name, kinds)}")
        try:
            given[name] = kinds[name](text)
        except ValueError:
            separator = ""
        if not separator:
            raise UserError(f"--sampler={value} is not NAME=VALUE: write {name}={getattr(Sampling(), name)}.")
    Sampling(**given)
    return given


def read_rows(settings: Settings) -> list[Row]:
    """The prompts' rows, each with "text"; [] for classes, which the decoder knows; errors as `prompts.of_protocol`."""
    if settings.prompts == CLASSES:
        return []
    rows = -(-settings.num_images // _per_prompt(settings))
    return [*prompts.of_protocol(settings.protocol, settings.prompts, rows, settings.seed, read_prompts)]


def _per_prompt(settings: Settings) -> int:
    """Pictures of each prompt."""
    return settings.samples_per_prompt or protocols.find(settings.protocol).each


def draw(settings: Settings, rows: Sequence[Row]) -> None:
    """Draws, with the other processes, what `samples_dir` lacks; raises UserError if it holds other pictures."""
    from imagegpt_jax.generation.pipeline import Pipeline
    from imagegpt_jax.inference import loading
    from imagegpt_jax.runtime import distributed

    (path,), each = settings.checkpoints, _per_prompt(settings)
    decoder = loading.load_decoder(path, settings.step, tokenizer=settings.tokenizer or None)
    pipeline = Pipeline(decoder, decoder.load_tokenizer())
    sampling = decoder.sampling(**settings.sampler)
    if settings.prompts == CLASSES:
        count = decoder.setup.space.num_classes
        if not count:
            raise UserError(f"{path} was not trained on classes: give a file of prompts.")
        names = decoder.setup.labels or [""] * count
        rows = [{"text": names[number], "class": number} for number in range(count)]
    asked = [row for row in rows for _ in range(each)]
    if settings.prompts == CLASSES:  # class after class, so that each split of ADM's Inception Score holds all of them
        asked = [*rows] * each
    asked = asked[: settings.num_images or None]
    about = {"seed": settings.seed, "sampler": dataclasses.asdict(sampling), **pipeline.about}
    folder = epath.Path(settings.samples_dir)
    if distributed.is_main_process():
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        _begin(folder, {**about, "pictures": len(asked), "prompts": digest})
        lines = [json.dumps({**row, "file_name": file_name(i)}) for i, row in enumerate(asked)]
        filesystem.write_whole(folder / CAPTIONS, "\n".join(lines) + "\n")
    distributed.barrier()
    _draw(pipeline, asked, about, folder)
    distributed.barrier()


def file_name(number: int) -> str:
    """The file of a picture."""
    return f"{number:06d}.png"


def _begin(folder: epath.Path, plan: Mapping[str, Any]) -> None:
    """Makes the folder, or checks that it holds pictures of the same plan."""
    if folder.exists() and any(folder.iterdir()):
        held = json.loads((folder / PLAN).read_text()) if (folder / PLAN).exists() else {}
        held.pop("finish", None)  # which plans had before
        held |= {"sampler": renamed(held["sampler"])} if "sampler" in held else {}
        if held != json.loads(json.dumps(plan)):
            differ = sorted(name for name in plan.keys() | held.keys() if plan.get(name) != held.get(name))
            raise UserError(
                f"{folder} holds other pictures ({', '.join(differ) if 'seed' in held else 'not drawn here'}): give"
                " another --samples_dir, or remove it."
            )
        return
    filesystem.write_whole(folder / PLAN, json.dumps(plan, indent=1) + "\n")


def _draw(pipeline: "Pipeline", asked: Sequence[Row], about: Mapping[str, Any], folder: epath.Path) -> None:
    """Draws this process's share of what is missing."""
    import jax

    from imagegpt_jax import images
    from imagegpt_jax.generation.request import GenerationRequest
    from imagegpt_jax.sampling.batching import BATCH_SIZE

    held, turn = {path.name for path in folder.iterdir()}, BATCH_SIZE * len(jax.local_devices())
    mine = [i for i in range(len(asked)) if i // turn % jax.process_count() == jax.process_index()]
    mine = [i for i in mine if file_name(i) not in held]
    if not mine:
        return
    by_class = "class" in asked[0]
    wanted = {"sample_indices": tuple(mine), "settings": about["sampler"], "seed": about["seed"]}
    if by_class:
        wanted |= {"mode": "class_conditional", "classes": tuple(asked[i]["class"] for i in mine)}
    else:
        wanted["prompts"] = tuple(asked[i]["text"] for i in mine)
    with progress.bar(desc="draw", unit="image", total=len(mine)) as bar:
        for part in pipeline.prepare(GenerationRequest(**wanted), mesh=output.local_mesh())(0):
            for i, pixels, metadata in zip(part.sample_indices, part.pixels, part.metadata, strict=True):
                text = "" if by_class else asked[i]["text"]
                row = {"index": int(i), "prompt": text, "class": asked[i].get("class"), **about, **metadata}
                filesystem.write_whole(folder / file_name(i), images.png_bytes(pixels, row))
                bar.update()
