"""Decoding images in TensorFlow's graph, wholly or a window of them, to the pixels that Pillow gives.

Shape suffixes: H height, W width.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from imagegpt_jax.data.images import JPEG, PNG, decode_image
from imagegpt_jax.runtime import logs

# (y, x, height, width)
Window = tuple[Any, Any, Any, Any]


@functools.cache
def import_tf() -> Any:
    """Imports TensorFlow without its chatter, and keeps it off the GPUs, which are JAX's."""
    logs.quiet()
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # if TensorFlow was already running, it is too late to tell it
        tf.config.set_visible_devices([], "GPU")
    return tf


def decode_any(data: Any, image_format: Any) -> Any:
    """Encoded bytes -> uint8 [H, W, 3]; `image_format` (int32) is from `images.sniff`."""
    tf = import_tf()
    image = tf.switch_case(
        image_format,
        {
            # The accurate transform gives the same pixels as Pillow, and is as fast.
            JPEG: lambda: tf.io.decode_jpeg(data, 3, dct_method="INTEGER_ACCURATE"),
            PNG: lambda: _on_white(tf.io.decode_png(data, 4)),
        },
        default=lambda: _decode_other(data),
    )
    image.set_shape([None, None, 3])
    return image


def decode_and_crop(data: Any, image_format: Any, window: Callable[[Any], Window]) -> Any:
    """As `decode_any`, and only the window of the image's shape; of a JPEG no more than that is decoded."""
    tf = import_tf()

    def jpeg() -> Any:
        shape = tf.io.extract_jpeg_shape(data)
        y, x, h, w = window(shape)
        # Colour is stored at half resolution and interpolated: the window's border needs the pixels next to it.
        top, left = tf.maximum(y - 2, 0), tf.maximum(x - 2, 0)
        bottom, right = tf.minimum(y + h + 2, shape[0]), tf.minimum(x + w + 2, shape[1])
        part = tf.stack([top, left, bottom - top, right - left])
        image = tf.io.decode_and_crop_jpeg(data, part, 3, dct_method="INTEGER_ACCURATE")
        return image[y - top : y - top + h, x - left : x - left + w]

    def other() -> Any:
        image = decode_any(data, image_format)
        y, x, h, w = window(tf.shape(image))
        return image[y : y + h, x : x + w]

    image = tf.cond(tf.equal(image_format, JPEG), jpeg, other)
    image.set_shape([None, None, 3])
    return image


def _on_white(image_HW4: Any) -> Any:
    tf = import_tf()
    rgb, alpha = image_HW4[..., :3], image_HW4[..., 3:]

    def blend() -> Any:
        a = tf.cast(alpha, tf.float32) / 255.0
        return tf.cast(tf.round(tf.cast(rgb, tf.float32) * a + 255.0 * (1.0 - a)), tf.uint8)

    return tf.cond(tf.reduce_all(tf.equal(alpha, 255)), lambda: rgb, blend)


def _decode_other(data: Any) -> Any:
    tf = import_tf()
    # The bytes come as an array without dimensions, or as they are.
    image = tf.numpy_function(lambda d: decode_image(np.asarray(d, object).item()), [data], tf.uint8)
    image.set_shape([None, None, 3])
    return image
