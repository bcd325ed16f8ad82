"""Scores trained checkpoints: one flat mapping of scores, each beside a control that shows what it is worth.

What is scored depends on what a workdir loads as; a task of a user's own is scored by its own evaluators.
Heavy imports are inside the functions, so that a wrong flag is reported at once.
"""

import json
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from imagegpt_jax.evaluation.checkpoint_data import Page, Scores, Settings, config_of, find_runs
from imagegpt_jax.evaluation.score_table import rows, table
from imagegpt_jax.runtime import filesystem


def _scorers(settings: Settings, runs: Mapping[str, str]) -> list[Any]:
    """What scores each checkpoint, with its data opened."""
    from imagegpt_jax.convert import reading
    from imagegpt_jax.evaluation.decoder_scores import DecoderScorer
    from imagegpt_jax.evaluation.task_scores import TaskScorer
    from imagegpt_jax.evaluation.tokenizer_scores import TokenizerScorer
    from imagegpt_jax.tasks import interface

    of_kind: dict[str, Any] = {"tokenizer": TokenizerScorer, "decoder": DecoderScorer}
    scorers = []
    for kind in sorted(runs, key=lambda kind: [*of_kind, kind].index(kind)):
        path = runs[kind]
        is_ours = reading.is_weights(path) or config_of(path).task in interface.TASKS
        scorers.append((of_kind.get(kind, TaskScorer) if is_ours else TaskScorer)(settings, path))
    return scorers


def write_report(settings: Settings, runs: Mapping[str, str], scores: Scores, made: Page) -> None:
    """Writes a page of the scores, the pictures, the use of codes and the losses of training."""
    from imagegpt_jax.evaluation import report
    from imagegpt_jax.evaluation.html import Report
    from imagegpt_jax.images import Tile

    page = Report(f"Scores of {', '.join(runs.values())}")
    page.table("Scores", ("score", "value", "control", "value of the control"), rows(scores))
    notes = {"reconstructions": "inputs over reconstructions", "generations": "each reference before its samples"}
    for name, picture in made.pictures.items():
        page.gallery(name.capitalize(), [Tile(notes.get(name, ""), [picture])], whole=True)
    if made.details:
        report.worst_reconstructions(page, made.details["worst"], made.details["worst_psnr"])
        report.codes(page, made.details["counts_K"])
    if made.samples is not None:
        report.neighbours(page, *made.samples)
    for path in runs.values():
        report.losses(page, path)
    every = [(name, f"{value:.6g}" if isinstance(value, float) else value) for name, value in sorted(scores.items())]
    page.table("What was measured", ("key", "value"), every)
    filesystem.write_whole(settings.report, page.html())


def score(settings: Settings) -> None:
    """Scores together with the other processes, the first of which writes."""
    runs = find_runs(settings)

    import jax

    from imagegpt_jax import images
    from imagegpt_jax.metrics import provenance
    from imagegpt_jax.parallel import sharding
    from imagegpt_jax.runtime import distributed

    scorers = _scorers(settings, runs)
    mesh = sharding.local_mesh(jax.devices())
    started, page = time.monotonic(), Page()
    scores: Scores = {**provenance.code(), "jax_version": jax.__version__}
    for scorer in scorers:
        scores |= scorer.score(mesh, page)
    if not distributed.is_main_process():
        return
    scores["seconds"] = round(time.monotonic() - started, 3)
    filesystem.write_whole(settings.output, json.dumps(scores, indent=1, sort_keys=True) + "\n")
    for name, picture in page.pictures.items() if settings.images_dir else ():
        data = images.png_bytes(picture, {"checkpoints": dict(runs)})
        filesystem.write_whole(epath.Path(settings.images_dir) / f"{name}.png", data)
    if settings.report:
        write_report(settings, runs, scores, page)
    print(f"{table(scores)}\n\nAll scores: {settings.output}")
