"""`open_source("kind:argument,option=value")`: every data set by one line of text, and what a source is.

The kinds:

    emoji:train                            the built-in set: train, validation, heldout_style or all; res=32,
                                           styles=noto+twemoji, captions=name or keywords
    folder:/path                           images with captions or classes (see folder.py)
    array_record:/path                     a folder made by `imagegpt-jax pack`, or a pattern of its files
    tokens:/path                           token shards made by imagegpt_jax.encode
    tfds:coco_captions,split=train         a TFDS set prepared as array_record; data_dir=/path
    0.7*emoji:train + 0.3*folder:/path     a mixture; without weights, in proportion to size
    my_package.data:shapes:/path,res=32    a source of your own: `shapes("/path", res=32)` gives an `interface.Source`

Any of them takes `subset=validation,validation_share=0.05`, the share that is kept aside by name, and `subset=train`
for the rest (see holdout.py).
"""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from imagegpt_jax.data import holdout
from imagegpt_jax.data.interface import Source
from imagegpt_jax.data.mixture import Mixture
from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.plugins import plug_in


def _emoji(split: str, res: int = 32, styles: str = "", captions: str = "name") -> Source:
    from imagegpt_jax.data import emoji

    return emoji.EmojiSource(split, res=res, styles=styles.split("+") if styles else emoji.STYLES, captions=captions)


def _folder(path: str) -> Source:
    from imagegpt_jax.data.folder import FolderSource

    return FolderSource(path)


def _array_record(path: str) -> Source:
    from imagegpt_jax.data.shards import ShardSource

    return ShardSource(path)


def _tokens(path: str) -> Source:
    from imagegpt_jax.data.shards import ShardSource

    return ShardSource(path, kind="tokens")


def _tfds(name: str, split: str = "", data_dir: str = "") -> Source:
    if not split:
        raise UserError(f"tfds:{name} needs a split: write tfds:{name},split=train.")
    from imagegpt_jax.data.tfds_source import TfdsSource

    return TfdsSource(name, split=split, data_dir=data_dir or None)


# Kind -> (how it is opened, an example). The first argument is what stands after the kind; the others are options, and
# their annotations the types.
KINDS: dict[str, tuple[Callable[..., Source], str]] = {
    "emoji": (_emoji, "emoji:train"),
    "folder": (_folder, "folder:/path/to/images"),
    "array_record": (_array_record, "array_record:/path/to/packed"),
    "tokens": (_tokens, "tokens:/path/to/token/shards"),
    "tfds": (_tfds, "tfds:coco_captions,split=train"),
}


def open_source(spec: str, *, require: str | None = None) -> Source:
    """Opens a data set, or a mixture of several.

    Args:
      spec: see the top of this file.
      require: "captions", "label", "image" or "codes" if the caller cannot do without.

    Raises:
      UserError: for a misspelt kind, option or split, a data set that is missing, empty or unfinished, or one without
        what is required.
    """
    parts = [p.strip() for p in re.split(r"\s\+\s", spec)]
    weights: list[float | None] = []
    texts: list[str] = []
    for part in parts:
        weight, star, rest = part.partition("*")
        if star and ":" not in weight:
            try:
                weights.append(float(weight))
            except ValueError:
                raise UserError(
                    f"{weight.strip()!r} in data {spec!r} is not a number: write 0.7*{rest.strip()}."
                ) from None
            texts.append(rest.strip())
        else:
            weights.append(None)
            texts.append(part)
    if len({w is None for w in weights}) > 1:
        raise UserError(f"data {spec!r} gives weights to some of its parts only: give one to each, or to none.")
    sources = [_open_one(text) for text in texts]
    given = [w for w in weights if w is not None]
    source = sources[0] if len(sources) == 1 else Mixture(sources, given or None)
    if require:
        check(source, require)
    return source


def first_record(source: Source) -> dict[str, Any]:
    """The first record that can be read, of which it is taken what all have.

    Raises:
      UserError: if none of the first hundred can.
    """
    for index in range(min(len(source), 100)):
        try:
            return source.__getitems__([index])[0]
        except (UserError, OSError, RuntimeError) as e:
            if index + 1 == min(len(source), 100):
                raise
            del e
    raise UserError(f"{source.name} is empty: give another data set.")


def readable_records(source: Source, indices: Sequence[int]) -> list[dict[str, Any]]:
    """The records of these numbers that can be read."""
    try:
        return source.__getitems__(indices)
    except (UserError, OSError, RuntimeError):
        if len(indices) == 1:
            return []
        middle = len(indices) // 2
        return readable_records(source, indices[:middle]) + readable_records(source, indices[middle:])


def _open_one(spec: str) -> Source:
    kind, colon, rest = spec.partition(":")
    examples = ", ".join(example for _, example in KINDS.values())
    if kind in KINDS:
        opener, example = KINDS[kind]
    else:
        if not colon or "/" in kind:
            near = suggest(kind, KINDS)
            hint = near if near.startswith(" Did") else f" For a folder of images write folder:{spec}."
            raise UserError(f"data {spec!r} does not say what kind it is.{hint} Examples: {examples}.")
        name, _, rest = rest.partition(":")
        if ("." not in kind and not name.isidentifier()) or suggest(kind, KINDS).startswith(" Did"):
            raise UserError(f"unknown kind of data {kind!r} in {spec!r}.{suggest(kind, KINDS)} Examples: {examples}.")
        kind = f"{kind}:{name}"
        opener, example = plug_in(kind, "data"), f"{kind}:ARGUMENT"
    argument, *options = re.split(r",(?=\w+=)", rest)  # a path may hold commas
    if not argument:
        raise UserError(f"data {spec!r} lacks what comes after {kind}: write for example {example}.")
    _, *parameters = inspect.signature(opener, eval_str=True).parameters.values()
    types = {parameter.name: parameter.annotation for parameter in parameters}
    kept_aside = {"subset": str, "validation_share": float}
    values: dict[str, Any] = {}
    for option in options:
        key, _, text = option.partition("=")
        if key not in types | kept_aside:
            known = suggest(key, types) if types else f" {kind} takes none."
            raise UserError(f"data {spec!r} has an unknown option {key!r}.{known}")
        kind_of = (kept_aside | types)[key]
        try:
            values[key] = text if kind_of is inspect.Parameter.empty else kind_of(text)
        except ValueError:
            number = "number" if kind_of is float else "whole number"
            raise UserError(f"data {spec!r}: {key}={text!r} is not a {number}.") from None
    side = {key: values.pop(key) for key in kept_aside if key not in types and key in values}
    source = opener(argument, **values)
    if not isinstance(source, Source):
        raise UserError(f"data {spec!r} opens a {type(source).__name__}, which is no data.interface.Source.")
    return holdout.take(source, side.get("subset", ""), side.get("validation_share", 0.0), spec) if side else source


def check(source: Source, what: str) -> None:
    """Raises UserError if records lack `what`; a source that knows better than its first record says so itself."""
    if isinstance(source, Mixture):
        for part in source.sources:
            check(part, what)
        return
    if hasattr(source, "require"):
        source.require(what)  # type: ignore[attr-defined]
    record = first_record(source)
    if what not in record:
        have = ", ".join(k for k in record if k not in ("id", "grid")) or "nothing else"
        advice = {
            "captions": "captions are needed here: use a data set with captions",
            "label": "class labels are needed here: use a data set with classes",
            "image": "images are needed here: use a data set of images",
            "codes": "token shards are needed here: make them with python -m imagegpt_jax.encode",
        }[what]
        raise UserError(f"{source.name} has no {what} (its records hold {have}); {advice}.")
