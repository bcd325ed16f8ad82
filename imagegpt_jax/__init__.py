"""Train image tokenizers and GPT-style decoders over text and image tokens in JAX, from a laptop CPU to TPU pods.

    import imagegpt_jax as ig
    pipe = ig.load_pipeline("runs/decoder")         # the --workdir of a training run, or published weights
    pipe("a red bicycle", num_images=4, seed=0).images
    tok = ig.load_tokenizer("runs/tokenizer")       # and the parts, for arrays
    codes_BL = tok.encode(images_BHWC)              # uint8, or float in [-1, 1]
    gpt = ig.load_decoder("runs/decoder")
    images_BHWC = ig.generate(gpt, tok, ["a red bicycle"], seed=0, num_images=4)

The names are imported when they are first used: importing the package starts nothing.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagegpt_jax.generation.functional import (
        caption,
        complete,
        edit,
        generate,
        inpaint,
        interpolate,
        load_pipeline,
        outpaint,
        rank_captions,
        style_transfer,
        variations,
    )
    from imagegpt_jax.generation.pipeline import Pipeline
    from imagegpt_jax.generation.request import GenerationRequest
    from imagegpt_jax.generation.results import GeneratedImages
    from imagegpt_jax.inference.loading import Decoder, LoadedModel, Tokenizer, load, load_decoder, load_tokenizer

__all__ = [
    "Decoder",
    "GeneratedImages",
    "GenerationRequest",
    "LoadedModel",
    "Pipeline",
    "Tokenizer",
    "caption",
    "complete",
    "edit",
    "generate",
    "inpaint",
    "interpolate",
    "load",
    "load_decoder",
    "load_pipeline",
    "load_tokenizer",
    "outpaint",
    "rank_captions",
    "style_transfer",
    "variations",
]
_MODULES = {
    "GeneratedImages": "generation.results",
    "GenerationRequest": "generation.request",
    "Pipeline": "generation.pipeline",
    **dict.fromkeys(
        ("Decoder", "LoadedModel", "Tokenizer", "load", "load_decoder", "load_tokenizer"), "inference.loading"
    ),
}


def __getattr__(name: str) -> Any:
    """Imports the public names on first use (PEP 562)."""
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, "generation.functional")
    return getattr(importlib.import_module(f"imagegpt_jax.{module}"), name)


def _version() -> str:
    """The version of the installed package, or of the pyproject.toml beside a plain checkout."""
    try:
        return importlib.metadata.version("imagegpt_jax")
    except importlib.metadata.PackageNotFoundError:
        import pathlib
        import tomllib

        project = pathlib.Path(__file__).parents[1] / "pyproject.toml"
        return tomllib.loads(project.read_text())["project"]["version"] if project.exists() else "unknown"


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__, "__version__"})
