"""What a new decoder takes from its data: captions or classes, how many tokens captions need, what is drawn meanwhile.

Each is taken where its config key is None, and stands in the config of the run from then on.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from imagegpt_jax.config import Config
from imagegpt_jax.data import quarantine, sources
from imagegpt_jax.data import text as text_lib
from imagegpt_jax.errors import UserError

_LOOKED_AT = 16  # records that tell whether a set has captions
_PROMPTS = 2
Notes = tuple[tuple[str, str], ...]


def conditions(config: Config, train: Any) -> Config:
    """The config with `data.use_labels`: classes, where the data have some and no captions."""
    data = config.data
    if data.use_labels is None:
        data.use_labels = bool(train.label_names) and not has_captions(train)
    if data.num_classes is None:
        data.num_classes = len(train.label_names) if data.use_labels else 0
    return config


def assumed(config: Config) -> Config:
    """A copy of the config for use without data: what is left to them is as for the longest captions, no classes."""
    config = config.copy_and_resolve_references()
    data = config.data
    if data.use_labels is None:
        data.use_labels = False
    if data.num_classes is None:
        data.num_classes = 0
    if data.text_length is None:
        data.text_length = data.max_text_length
    return config


def has_captions(source: Any) -> bool:
    """Whether any of a source's first records has a caption."""
    records = sources.readable_records(source, range(min(len(source), _LOOKED_AT)))
    return any(record.get("captions") for record in records)


def captions(source: Any, limit: int) -> list[str]:
    """All sound captions of at most `limit` records, evenly spread."""
    indices = np.unique(np.linspace(0, len(source) - 1, min(limit, len(source)), dtype=np.int64))
    records = sources.readable_records(source, indices.tolist())
    texts = [caption for record in records for caption in record.get("captions", [])]
    return [caption for caption in texts if quarantine.refuse_caption(caption) is None]


def stored(workdir: epath.PathLike) -> tuple[text_lib.TextTokenizer, tuple[str, ...]]:
    """Text tokenizer and class names of a run."""
    folder = epath.Path(workdir)
    text = text_lib.load_tokenizer(folder / "text_tokenizer")
    return text, tuple(json.loads((folder / "labels.json").read_text()))


def lengths(config: Config, text: text_lib.TextTokenizer, texts: Sequence[str]) -> Notes:
    """Sets `data.text_length` to what the longest caption needs, in steps of 4, and says what is cut."""
    data = config.data
    tokens = np.array([len(ids) for ids in text.encode_batch(texts)] if text.vocab_size else [], np.int64)
    longest = int(tokens.max(initial=0))
    if data.text_length is None:
        data.text_length = min(data.max_text_length, int(data.use_labels) + -(-longest // 4) * 4)
    places = data.text_length - int(data.use_labels)
    if not longest or not places:
        return ()
    cut = int((tokens > places).sum())
    about = f"{len(tokens)} captions of {tokens.min()} to {longest} tokens, {text.vocab_size} in the vocabulary; "
    return (
        ("text", about + (f"{cut} are cut at {places} (data.text_length)" if cut else f"{places} places, none cut")),
    )


def prompts(config: Config, validation: Any, labels: Sequence[str]) -> Config:
    """The config with `sample_prompts`: captions of the validation split, or classes."""
    if config.sample_prompts is None:
        places = config.data.text_length - int(config.data.use_labels)
        drawn = captions(validation, _PROMPTS) if places else labels if config.data.use_labels else ()
        drawn = drawn if config.tokenizer else ()  # nothing can be drawn
        config.sample_prompts = tuple(dict.fromkeys(drawn))[:_PROMPTS]
    if not all(isinstance(prompt, str) for prompt in config.sample_prompts):
        raise UserError(
            f"config.sample_prompts={tuple(config.sample_prompts)} are not all texts: write"
            " --config.sample_prompts=\"('a red heart', '3 dogs')\"."
        )
    return config
