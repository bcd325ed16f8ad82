"""Preprocessing by op strings: `"decode|random_resized_crop(256)|flip_lr|value_range(-1,1)"`, applied left to right.

Shape suffixes: H height, W width, C channels.

Each op is a small TensorFlow function over one image, uint8 [H, W, 3] until `value_range` makes it float32. Parsing
needs no TensorFlow; building does. Random ops draw from the example's `seed`, which the pipeline makes from the run's
seed and the example's position, and from their place in the string: nothing else.

A crop directly after `decode` decodes only the part of a JPEG that is kept; the pixels are the same.
"""

import ast
import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from imagegpt_jax.data.decoding import Window, decode_and_crop, decode_any, import_tf
from imagegpt_jax.errors import UserError, suggest

METHODS = ("bilinear", "bicubic", "area", "lanczos3", "lanczos5", "nearest")
Size = int | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Op:
    """One op of an op string, with its arguments checked."""

    name: str
    arguments: dict[str, Any]


def parse(ops: str) -> list[Op]:
    """Parses an op string.

    Raises:
      UserError: for an unknown op, or arguments that it does not take.
    """
    parsed = [_parse_one(text.strip(), ops) for text in ops.split("|")]
    for i, op in enumerate(parsed):
        if (op.name == "decode") != (i == 0):
            raise UserError(
                f"op string {ops!r} should begin with decode, and have it once: write decode|resize(32)|..."
            )
        if op.name == "value_range" and i + 1 < len(parsed):
            raise UserError(f"op string {ops!r} should end with value_range: the other ops work on 0 to 255.")
    return parsed


def _parse_one(text: str, ops: str) -> Op:
    match = re.fullmatch(r"(\w+)\s*(?:\((.*)\))?", text)
    if not match:
        raise UserError(
            f"op {text!r} in {ops!r} is not of the form name or name(arguments): write for example resize(32)."
        )
    name, inside = match.group(1), match.group(2) or ""
    if name not in OPS:
        raise UserError(f"unknown op {name!r} in {ops!r}.{suggest(name, OPS)} Ops: {', '.join(map(usage, OPS))}.")
    try:
        call = ast.parse(f"f({inside})", mode="eval").body
        assert isinstance(call, ast.Call)
        positional = [ast.literal_eval(a) for a in call.args]
        named = {k.arg or "": ast.literal_eval(k.value) for k in call.keywords}
        bound = inspect.signature(OPS[name]).bind(*positional, **named)
    except (SyntaxError, TypeError, ValueError, AssertionError) as e:
        raise UserError(f"op {text!r} in {ops!r} has arguments that do not fit: it is {usage(name)}.") from e
    bound.apply_defaults()
    try:
        OPS[name](*bound.args, **bound.kwargs)
    except ValueError as e:
        raise UserError(f"op {text!r} in {ops!r} is not possible: {e}.") from e
    return Op(name, dict(bound.arguments))


def usage(name: str) -> str:
    """How an op is written: "resize(size, method='bilinear')"."""
    parameters = inspect.signature(OPS[name]).parameters.values()
    inside = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    return f"{name}({inside})" if inside else name


def _pair(size: Any) -> tuple[int, int]:
    """32 -> (32, 32); (24, 32) stays."""
    h, w = size if isinstance(size, tuple) and len(size) == 2 else (size, size)
    if not (isinstance(h, int) and isinstance(w, int) and h > 0 and w > 0):
        raise ValueError(f"a size is a positive whole number of pixels or (height, width), not {size!r}")
    return h, w


def _method(method: Any) -> str:
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    return method


def _interval(pair: Any, what: str) -> tuple[float, float]:
    low, high = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, None)
    if not (isinstance(low, int | float) and isinstance(high, int | float) and 0 < low <= high):
        raise ValueError(f"{what} is (smallest, largest), both positive, not {pair!r}")
    return float(low), float(high)


def _resized(image_HWC: Any, size: tuple[int, int], method: str) -> Any:
    """Antialiased resize, rounded back to uint8 as image libraries do."""
    tf = import_tf()
    if method == "nearest":
        return tf.image.resize(image_HWC, size, "nearest")
    out_HWC = tf.image.resize(image_HWC, size, method, antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(out_HWC), 0.0, 255.0), tf.uint8)


def _uniform(seed_2: Any, shape: tuple[int, ...]) -> Any:
    tf = import_tf()
    return tf.random.stateless_uniform(shape, seed_2, alg="philox")


# Each op takes its arguments and returns a function; those in `CROPS` return one from (shape_HWC, seed) to a window
# (y, x, height, width), the others one from (image, seed) to an image. TensorFlow loads when that function runs.

ImageFn = Callable[[Any, Any], Any]
WindowFn = Callable[[Any, Any], Window]


def decode() -> ImageFn:
    """Encoded bytes -> RGB; transparency on white, grey expanded, 16 bits to 8, Exif orientation applied."""
    return lambda image, seed: image


def resize(size: Size, method: str = "bilinear") -> ImageFn:
    """Resizes to size x size or (height, width), whatever the proportions."""
    shape, method = _pair(size), _method(method)
    return lambda image, seed: _resized(image, shape, method)


def resize_small(size: int, method: str = "bilinear") -> ImageFn:
    """Resizes so that the shorter side is `size`; proportions are kept."""
    small, method = _pair(size)[0], _method(method)

    def apply(image: Any, seed: Any) -> Any:
        tf = import_tf()
        hw = tf.shape(image)[:2]
        scaled = tf.cast(tf.round(tf.cast(hw, tf.float64) * small / tf.cast(tf.reduce_min(hw), tf.float64)), tf.int32)
        return _resized(image, tf.maximum(scaled, small), method)

    return apply


def central_crop(size: Size | None = None) -> WindowFn:
    """Cuts size x size or (height, width) from the middle; without a size, the largest square."""
    target = None if size is None else _pair(size)

    def window(shape: Any, seed: Any) -> Window:
        tf = import_tf()
        height, width = shape[0], shape[1]
        if target is None:
            h = w = tf.minimum(height, width)
        else:
            h, w = target
            height, width = _at_least(height, width, h, w)
        return (height - h) // 2, (width - w) // 2, h, w

    return window


def random_crop(size: Size) -> WindowFn:
    """Cuts size x size or (height, width) from a random place."""
    h, w = _pair(size)

    def window(shape: Any, seed: Any) -> Window:
        tf = import_tf()
        height, width = _at_least(shape[0], shape[1], h, w)
        room = tf.cast(tf.stack([height - h, width - w]), tf.float32)
        corner = tf.minimum(tf.cast(_uniform(seed, (2,)) * (room + 1), tf.int32), tf.cast(room, tf.int32))
        return corner[0], corner[1], h, w

    return window


def ten_crop(size: Size) -> ImageFn:
    """Cuts size x size or (height, width) from a corner or the middle, mirrored or not: one of the ten, at random."""
    h, w = _pair(size)

    def apply(image: Any, seed: Any) -> Any:
        tf = import_tf()
        height, width = _at_least(tf.shape(image)[0], tf.shape(image)[1], h, w)
        down, right = height - h, width - w
        corners = tf.stack([[0, 0], [0, right], [down, 0], [down, right], [down // 2, right // 2]])
        number = tf.minimum(tf.cast(_uniform(seed, ()) * 10, tf.int32), 9)
        corner = corners[number // 2]
        image = tf.ensure_shape(image[corner[0] : corner[0] + h, corner[1] : corner[1] + w], (h, w, 3))
        return tf.cond(number % 2 == 0, lambda: image, lambda: tf.reverse(image, [1]))

    return apply


def random_resized_crop(
    size: Size,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (0.75, 1.3333),
    method: str = "bilinear",
) -> WindowFn:
    """Cuts a random part (`scale`: of the area, `ratio`: width / height) and resizes it (Szegedy et al., 2015)."""
    _pair(size)
    _method(method)
    area_range = _interval(scale, "scale")
    low, high = (math.log(r) for r in _interval(ratio, "ratio"))
    if area_range[1] > 1:
        raise ValueError(f"scale is a part of the area, at most 1, not {scale!r}")
    tries = 10

    def window(shape: Any, seed: Any) -> Window:
        tf = import_tf()
        hw = tf.cast(shape[:2], tf.float32)
        u = _uniform(seed, (4, tries))
        area = hw[0] * hw[1] * (area_range[0] + u[0] * (area_range[1] - area_range[0]))
        aspect = tf.exp(low + u[1] * (high - low))
        h, w = tf.round(tf.sqrt(area / aspect)), tf.round(tf.sqrt(area * aspect))
        fits = (h <= hw[0]) & (w <= hw[1]) & (h >= 1) & (w >= 1)
        i = tf.argmax(tf.cast(fits, tf.int32))  # the first that fits
        # If none does, the largest window of an allowed ratio, as torchvision does.
        h_all = tf.minimum(hw[0], tf.maximum(tf.round(hw[1] / math.exp(low)), 1))
        w_all = tf.minimum(hw[1], tf.maximum(tf.round(hw[0] * math.exp(high)), 1))
        any_fits = tf.reduce_any(fits)
        h, w = tf.where(any_fits, h[i], h_all), tf.where(any_fits, w[i], w_all)
        y = tf.where(any_fits, tf.floor(u[2, i] * (hw[0] - h + 1)), tf.floor((hw[0] - h) / 2))
        x = tf.where(any_fits, tf.floor(u[3, i] * (hw[1] - w + 1)), tf.floor((hw[1] - w) / 2))
        y, x = tf.minimum(y, hw[0] - h), tf.minimum(x, hw[1] - w)
        return tuple(tf.cast(v, tf.int32) for v in (y, x, h, w))  # type: ignore[return-value]

    return window


def pad_square(value: int = 255) -> ImageFn:
    """Pads the shorter side, on both ends, with grey level `value`."""
    if not (isinstance(value, int) and 0 <= value <= 255):
        raise ValueError(f"value is a grey level from 0 to 255, not {value!r}")

    def apply(image: Any, seed: Any) -> Any:
        tf = import_tf()
        hw = tf.shape(image)[:2]
        missing = tf.reduce_max(hw) - hw
        before = missing // 2
        pads = tf.concat([tf.stack([before, missing - before], axis=1), [[0, 0]]], axis=0)
        return tf.pad(image, pads, constant_values=value)

    return apply


def flip_lr() -> ImageFn:
    """Mirrors left and right with probability one half."""

    def apply(image: Any, seed: Any) -> Any:
        tf = import_tf()
        return tf.cond(_uniform(seed, ()) < 0.5, lambda: tf.reverse(image, [1]), lambda: image)

    return apply


def value_range(low: float = -1, high: float = 1) -> ImageFn:
    """Maps 0..255 to low..high, as float32; the last op of a string."""
    if not all(isinstance(v, int | float) for v in (low, high)) or low >= high:
        raise ValueError(f"low is below high, not {low!r}, {high!r}")

    def apply(image: Any, seed: Any) -> Any:
        tf = import_tf()
        return tf.cast(image, tf.float32) * ((high - low) / 255.0) + low

    return apply


def value_range_numpy(images: np.ndarray, low: float = -1, high: float = 1) -> np.ndarray:
    """`value_range` of a whole batch: what TensorFlow gives, in a third of the time (one new array, not three)."""
    out = np.multiply(images, np.float32((high - low) / 255.0), dtype=np.float32)
    out += np.float32(low)
    return out


def _at_least(height: Any, width: Any, h: int, w: int) -> tuple[Any, Any]:
    """Height and width, after checking that a window of h x w fits."""
    tf = import_tf()
    message = f"the image is smaller than the crop of {h} x {w}: put resize_small({max(h, w)}) before it"
    with tf.control_dependencies([tf.debugging.Assert(tf.logical_and(height >= h, width >= w), [message])]):
        return tf.identity(height), tf.identity(width)


OPS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        decode, resize, resize_small, central_crop, random_crop, random_resized_crop, ten_crop, pad_square,
        flip_lr, value_range,
    )
}  # fmt: skip
CROPS = ("central_crop", "random_crop", "random_resized_crop")


def build(ops: list[Op]) -> Callable[[Any, Any, Any], Any]:
    """Makes the TensorFlow function of parsed ops: (bytes, format, seed) -> image [H, W, 3].

    `format` (int32) is from `images.sniff`; `seed` is int64[2]. Static shape is set where the ops fix it. Damaged bytes
    raise a TensorFlow error when it runs.
    """
    made = [OPS[op.name](**op.arguments) for op in ops]

    def apply(data: Any, image_format: Any, seed_2: Any) -> Any:
        fused = len(ops) > 1 and ops[1].name in CROPS

        def seed(i: int) -> Any:
            return seed_2 + import_tf().constant([0, i], "int64")

        if fused:
            crop_seed = seed(1)
            image = decode_and_crop(data, image_format, lambda shape: made[1](shape, crop_seed))
            image = _after_crop(image, ops[1])
        else:
            image = decode_any(data, image_format)
        for i in range(1 + fused, len(ops)):
            if ops[i].name in CROPS:
                y, x, h, w = made[i](import_tf().shape(image), seed(i))
                image = _after_crop(image[y : y + h, x : x + w], ops[i])
            else:
                image = made[i](image, seed(i))
        return image

    # Plain tf calls need no AutoGraph, which warns about every lambda whose source it cannot find.
    return lambda *args: import_tf().autograph.experimental.do_not_convert(apply)(*args)


def _after_crop(image: Any, op: Op) -> Any:
    if op.arguments["size"] is not None:
        h, w = _pair(op.arguments["size"])
        if op.name == "random_resized_crop":
            image = _resized(image, (h, w), op.arguments["method"])
        image.set_shape([h, w, 3])
    return image
