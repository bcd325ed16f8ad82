"""Train image tokenizers and GPT-style decoders over text and image tokens in JAX, from a laptop CPU to TPU pods.

    import imagegpt_jax as ig
    tok = ig.load_tokenizer("runs/tokenizer")       # the --workdir of a training run
    codes_BL = tok.encode(images_BHWC)              # uint8, or float in [-1, 1]
    gpt = ig.load_decoder("runs/decoder")
    images_BHWC = ig.generate(gpt, tok, ["a red bicycle"], seed=0, num_images=4)

The names are imported when they are first used: importing the package starts nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagegpt_jax.generation.functional import (
        caption,
        complete,
        edit,
        generate,
        inpaint,
        interpolate,
        outpaint,
        rank_captions,
        style_transfer,
        variations,
    )
    from imagegpt_jax.inference.loading import Decoder, Tokenizer, load_decoder, load_tokenizer

__all__ = [
    "Decoder",
    "Tokenizer",
    "caption",
    "complete",
    "edit",
    "generate",
    "inpaint",
    "interpolate",
    "load_decoder",
    "load_tokenizer",
    "outpaint",
    "rank_captions",
    "style_transfer",
    "variations",
]
_OF_API = ("Decoder", "Tokenizer", "load_decoder", "load_tokenizer")


def __getattr__(name: str) -> Any:
    """Imports the public names on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "inference.loading" if name in _OF_API else "generation.functional"
    return getattr(importlib.import_module(f"imagegpt_jax.{module}"), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
