"""Encoded images without TensorFlow: what format some bytes are, and decoding any of them with Pillow."""

import io

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# What Pillow may take bytes for. It knows more, of which some, such as EPS, would run another program on them.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF")

# What TensorFlow decodes exactly as Pillow does, and everything else, which is left to Pillow.
JPEG, PNG, OTHER = 0, 1, 2


def sniff(data: bytes) -> int:
    """Which decoder the bytes need: `JPEG` or `PNG` (TensorFlow's, the fast ones) or `OTHER` (Pillow).

    A JPEG that its Exif header says to turn, and a PNG with fewer than 8 bits per channel (whose alpha TensorFlow gets
    wrong), are `OTHER`.
    """
    if data[:3] == b"\xff\xd8\xff":
        return OTHER if b"Exif\0" in data[:64] and _is_turned(data) else JPEG
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 25 and data[24] >= 8:
        return PNG
    return OTHER


def _is_turned(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:
        return True  # not sound: let Pillow say what is wrong with it


def decode_image(data: bytes) -> np.ndarray:
    """Decodes JPEG, PNG, GIF (first frame), WebP, BMP or TIFF to RGB, uint8 [H, W, 3].

    Transparency is composited on white, grey and palette images are expanded, 16-bit channels keep their high byte,
    and Exif orientation is applied.

    Raises:
      ValueError: if the bytes are not an image, or a damaged one.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            image: Image.Image = ImageOps.exif_transpose(file)
            if image.mode.startswith(("I", "F")):  # Pillow would clip 16 bits to 255 instead of scaling
                high_byte = np.clip(np.asarray(image, np.float64) // 256, 0, 255).astype(np.uint8)
                image = Image.fromarray(high_byte)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as e:
        raise ValueError("not an image of a known format") from e
    except Exception as e:  # Pillow raises whatever damaged bytes make it stumble over
        raise ValueError(f"a damaged image ({' '.join(str(e).split())})") from e
