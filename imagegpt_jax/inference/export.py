"""What `python -m imagegpt_jax.convert` does: weights and runs to portable folders and published layouts."""

import pathlib
import shutil
import tempfile

from imagegpt_jax import config as config_lib
from imagegpt_jax.convert import formats, portable
from imagegpt_jax.convert.formats import DECODER, TOKENIZER, Options
from imagegpt_jax.errors import UserError
from imagegpt_jax.inference import runs
from imagegpt_jax.weight_files import files


def convert(
    source: pathlib.Path,
    target: pathlib.Path,
    *,
    to: str = "",
    kind: str | None = None,
    step: int | None = None,
    heads: int | None = None,
) -> str:
    """Converts weights.

    Args:
      source: published weights, a workdir of training, or a portable folder.
      target: folder to write.
      to: published layout (`formats.FORMATS`); "" = portable, or from a portable folder the layout it came from.
      kind: "tokenizer" or "decoder", where the source holds both.
      step: checkpoint of a workdir; the newest by default.
      heads: of a LlamaGen decoder of unpublished size.

    Returns:
      one line about what was written.

    Raises:
      UserError: if the source is not known, or does not fit what is asked for.
    """
    if source.is_dir() and portable.is_portable(source):
        opened = portable.open_portable(source)
        portable.export(opened, to, target)
        return f"{target}: {formats.FORMATS[to or opened.published].title}, from {source}"
    if not to:
        title = _to_portable(source, target, kind, step, heads)
        return f"{target}: portable folder, from {title} {source}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        between = pathlib.Path(folder) / "portable"
        kind = kind or (formats.FORMATS[to].kind if to in formats.FORMATS else None)
        title = _to_portable(source, between, kind, step, heads)
        portable.export(portable.open_portable(between), to, target)
    return f"{target}: {formats.FORMATS[to].title}, from {title} {source}"


def _to_portable(
    source: pathlib.Path, target: pathlib.Path, kind: str | None, step: int | None, heads: int | None
) -> str:
    """Writes the portable folder of published weights or a workdir; returns what they are."""
    if not files.holds_weights(source):
        return _from_workdir(source, target, step)
    opened = files.open_source(source)
    options = Options(heads=heads)
    recognised, problems = [], []
    for each in (kind,) if kind else (DECODER, TOKENIZER):
        try:
            recognised.append(formats.recognise(opened, each, options))
        except formats.Unknown as e:
            problems.append(e)
    if not recognised:
        raise problems[0]
    if len(recognised) > 1:
        titles = " and a ".join(formats.FORMATS[f.format].title for f in recognised)
        raise UserError(f"{source} holds a {titles}: say which with --kind=decoder or --kind=tokenizer.")
    portable.save_published(recognised[0], source, target)
    return formats.FORMATS[recognised[0].format].title


def _from_workdir(source: pathlib.Path, target: pathlib.Path, step: int | None) -> str:
    """Writes the portable folder of a run, with the assets of its task."""
    run = runs.read(source, step=step)
    kind, config = run.task.kind, run.setup.config
    if kind not in (TOKENIZER, DECODER):
        raise UserError(f"{source} holds a {kind}, which has no portable form: a {TOKENIZER} and a {DECODER} have one.")
    portable.save_params(kind, run.setup.model, run.params, target, config_lib.to_dict(config))
    for name in run.task.assets:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
        copy(source / name, target / name)
    return f"step {run.step} of the {kind}"
