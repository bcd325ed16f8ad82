"""Train image tokenizers and GPT-style decoders over text and image tokens in JAX, from a laptop CPU to TPU pods.

    import imagegpt_jax as ig
    tok = ig.load_tokenizer("runs/tokenizer")       # the --workdir of a training run
    codes_BL = tok.encode(images_BHWC)              # uint8, or float in [-1, 1]
    gpt = ig.load_decoder("runs/decoder")
    images_BHWC = ig.generate(gpt, tok, ["a red bicycle"], seed=0, num_images=4)

The names are imported when they are first used: importing the package starts nothing.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagegpt_jax.api import Decoder, Tokenizer, load_decoder, load_tokenizer
    from imagegpt_jax.notebook import (
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
    return getattr(importlib.import_module(f"imagegpt_jax.{'api' if name in _OF_API else 'notebook'}"), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps `generate` the public function: importing the module of that name would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "generate":
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
