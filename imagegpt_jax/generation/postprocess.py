"""What is done to a generated image at the end, in this order: upscaler, size, contrast, safety checks, watermarks."""

import dataclasses
from typing import Any

import numpy as np

from imagegpt_jax import images
from imagegpt_jax.errors import UserError
from imagegpt_jax.generation import safety
from imagegpt_jax.plugins import plug_in

PLUG_INS = ("upscaler", "image_checker")  # these may name code of a user's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Postprocessing:
    """Settings of `Postprocessor`; by default it changes nothing.

    Attributes:
      upscaler: "module:function" that is given uint8 [H, W, C] and returns a larger one.
      resize: height and width in pixels, or one number for both; Lanczos filter.
      contrast: factor of the contrast, at least 0.
      blocklist: file of phrases, one a line: prompts that have one are flagged.
      image_checker: flags images: "opennsfw", or "module:function" of uint8 [H, W, C], see `safety`.
      check_threshold: score of the checker from which on an image is flagged.
      withhold: puts plain grey in the place of flagged images.
      watermark: text to write into the lower right corner.
      invisible_watermark: text whose pattern is put into the lowest bits.
    """

    upscaler: str = ""
    resize: tuple[int, ...] = ()
    contrast: float = 1.0
    blocklist: str = ""
    image_checker: str = ""
    check_threshold: float = 0.5
    withhold: bool = False
    watermark: str = ""
    invisible_watermark: str = ""


class Postprocessor:
    """Does to images what the settings say.

    Raises UserError for a size, file or plug-in that there is not, before any.
    """

    def __init__(self, settings: Postprocessing):
        self._settings, size = settings, settings.resize
        self._upscale = plug_in(settings.upscaler, "upscaler") if settings.upscaler else None
        if len(size) > 2 or min(size, default=1) < 1:
            raise UserError(f"resize={','.join(map(str, size))} must be a height and a width, or one number for both.")
        self._size = size * 2 if len(size) == 1 else size
        if settings.contrast < 0:
            raise UserError(f"contrast={settings.contrast} must be at least 0.")
        self._phrases = safety.read_blocklist(settings.blocklist) if settings.blocklist else []
        self._check = safety.find_checker(settings.image_checker) if settings.image_checker else None

    def __call__(self, image_HWC: np.ndarray, prompt: str) -> tuple[np.ndarray, dict[str, Any]]:
        """(the image to hand out, what the checks say of it)."""
        settings = self._settings
        if self._upscale is not None:
            image_HWC = np.asarray(self._upscale(image_HWC), np.uint8)
        if self._size:
            image_HWC = images.resize(image_HWC, (self._size[0], self._size[1]))
        if settings.contrast != 1:
            image_HWC = images.contrast(image_HWC, settings.contrast)
        checks: dict[str, Any] = {}
        if self._phrases:
            checks["blocked"] = safety.blocked(prompt, self._phrases)
        if self._check is not None:
            checks["unwanted"] = float(self._check(image_HWC))
        if checks:
            checks["flagged"] = bool(checks.get("blocked")) or checks.get("unwanted", 0.0) >= settings.check_threshold
            if checks["flagged"] and settings.withhold:
                image_HWC, checks["withheld"] = np.full_like(image_HWC, safety.WITHHELD), True
        if settings.watermark:
            image_HWC = images.write_corner(image_HWC, settings.watermark)
        if settings.invisible_watermark:
            image_HWC = safety.invisible_watermark(image_HWC, settings.invisible_watermark)
        return image_HWC, checks
