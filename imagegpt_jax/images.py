"""Pictures for people: PNG bytes with metadata, and captioned grids. Pillow only, no JAX.

Shapes: H W C image of 1 or 3 channels, uint8.
"""

import dataclasses
import functools
import io
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps, PngImagePlugin

SOFTWARE = "imagegpt_jax"  # name of the text chunk that holds all metadata as JSON
FONT_SIZE = 15
LINE_HEIGHT = 19
CAPTION_LINES = 3
GAP = 4  # between the pictures of one tile
MARGIN = 14  # around tiles
MIN_SIDE = 128  # smaller pictures are enlarged by a whole factor, pixels staying squares
INK = (40, 40, 40)
NO_GLYPH = "\U0010ffff"  # no font draws this code point, so it shows how missing glyphs look

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclasses.dataclass(frozen=True)
class Tile:
    """Pictures that belong together, and what is written under them.

    Attributes:
      caption: any text; what the font cannot draw is named in brackets.
      images: at least one uint8 [H, W, C].
    """

    caption: str
    images: Sequence[np.ndarray]


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] -> uint8, rounded to the nearest level; values outside are clipped."""
    return np.round((np.clip(np.asarray(images, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


def png_bytes(image_HWC: np.ndarray, metadata: Mapping[str, Any]) -> bytes:
    """Encodes a uint8 image as PNG with metadata in text chunks.

    Every key is a chunk of its own (text as it is, everything else as JSON), and the chunk "imagegpt_jax" holds the
    whole mapping as JSON, which `read_metadata` returns.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    info.add_itxt(SOFTWARE, json.dumps(metadata, ensure_ascii=False))
    out = io.BytesIO()
    to_pil(image_HWC).save(out, format="PNG", pnginfo=info)
    return out.getvalue()


def read_metadata(data: bytes) -> dict[str, Any]:
    """The metadata that `png_bytes` wrote; empty if there is none."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()  # text chunks may follow the pixels
        return json.loads(image.info.get(SOFTWARE, "{}"))


def to_pil(image_HWC: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] for Pillow."""
    return Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC)


# ---------------------------------------------------------------------------------------------------------- captions


@functools.cache
def _font() -> Font:
    return ImageFont.load_default(size=FONT_SIZE)


@functools.lru_cache(maxsize=4096)
def _has_glyph(char: str) -> bool:
    if char == " ":
        return True
    try:
        return not np.array_equal(_drawn(char), _drawn(NO_GLYPH))
    except UnicodeEncodeError:  # Pillow's bitmap font, where Pillow was built without FreeType
        return char.isascii()


def _drawn(char: str) -> np.ndarray:
    image = Image.new("L", (2 * FONT_SIZE, 2 * FONT_SIZE))
    ImageDraw.Draw(image).text((0, 0), char, font=_font(), fill=255)
    return np.asarray(image)


def _name(char: str) -> str:
    """What to write for a character without glyph: the name of a symbol, the script of a letter."""
    name = unicodedata.name(char, "")
    if not name:
        return f"U+{ord(char):04X}"
    if unicodedata.category(char).startswith("S"):
        return name.lower()
    return name.split()[0].title() if not name.startswith("CJK") else "CJK"


def drawable(text: str) -> str:
    """Rewrites text so that the font has every glyph: `red [sparkles]`, `[Cyrillic]`; accents it lacks are dropped.

    White space and invisible characters (joiners, variation selectors, controls) become single spaces or nothing.
    """
    out: list[str] = []
    for char in unicodedata.normalize("NFC", text):
        category = unicodedata.category(char)
        if char.isspace():
            out.append(" ")
        elif category in ("Cc", "Cf") or unicodedata.combining(char) or 0xFE00 <= ord(char) <= 0xFE0F:
            continue
        elif _has_glyph(char):
            out.append(char)
        else:
            plain = "".join(c for c in unicodedata.normalize("NFKD", char) if not unicodedata.combining(c))
            if plain and all(map(_has_glyph, plain)):
                out.append(plain)
            elif not out or out[-1] != f"[{_name(char)}]":  # a run of one script is named once
                out.append(f"[{_name(char)}]")
    return " ".join("".join(out).split())


def wrap(text: str, width: int, lines: int = CAPTION_LINES) -> list[str]:
    """Breaks drawable text into at most `lines` lines of `width` pixels; what is cut off leaves an ellipsis."""
    measure = _font().getlength
    done: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if measure(longer) <= width:
            line = longer
            continue
        if line:
            done.append(line)
        while measure(word) > width:  # a word longer than a line is broken
            fits = max(1, next(i for i in range(1, len(word) + 1) if measure(word[:i]) > width) - 1)
            done.append(word[:fits])
            word = word[fits:]
        line = word
    if line:
        done.append(line)
    if len(done) > lines:
        last = done[lines - 1]
        while last and measure(f"{last}…") > width:
            last = last[:-1]
        done = [*done[: lines - 1], f"{last.rstrip()}…"]
    return done


# ------------------------------------------------------------------------------------------------------------- grids


def _enlarged(image_HWC: np.ndarray) -> Image.Image:
    picture = to_pil(image_HWC).convert("RGB")
    factor = math.ceil(MIN_SIDE / max(picture.size))
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST) if factor > 1 else picture


def _collage(images: Sequence[np.ndarray]) -> Image.Image:
    """The pictures of one tile, in about a square."""
    pictures = [_enlarged(image) for image in images]
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    out = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for i, picture in enumerate(pictures):
        out.paste(picture, (i % columns * (width + GAP), i // columns * (height + GAP)))
    return out


def grid(tiles: Sequence[Tile]) -> np.ndarray:
    """Lays captioned tiles out on a white page, about 4 : 3, in reading order.

    Args:
      tiles: at least one.

    Returns:
      uint8 [height, width, 3].
    """
    collages = [_collage(tile.images) for tile in tiles]
    width, height = max(c.width for c in collages), max(c.height for c in collages)
    captions = [wrap(drawable(tile.caption), width) for tile in tiles]
    text_height = LINE_HEIGHT * max(map(len, captions))
    cell = (width + MARGIN, height + text_height + MARGIN)
    columns = min(len(tiles), max(1, round(math.sqrt(len(tiles) * 4 / 3 * cell[1] / cell[0]))))
    rows = math.ceil(len(tiles) / columns)
    page = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    for i, (collage, caption) in enumerate(zip(collages, captions, strict=True)):
        left, top = MARGIN + i % columns * cell[0], MARGIN + i // columns * cell[1]
        page.paste(collage, (left, top))
        for j, line in enumerate(caption):
            draw.text((left, top + collage.height + 3 + j * LINE_HEIGHT), line, font=_font(), fill=INK)
    return np.asarray(page)


# -------------------------------------------------------------------------------------------------- what comes after


def resize(image_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a uint8 image to (height, width) with a Lanczos filter, which averages where it shrinks."""
    out = np.asarray(to_pil(image_HWC).resize((size[1], size[0]), Image.Resampling.LANCZOS))
    return out.reshape(*size, -1)


def contrast(image_HWC: np.ndarray, factor: float) -> np.ndarray:
    """Scales the distance of every pixel from the picture's mean grey; 1 changes nothing."""
    return np.asarray(ImageEnhance.Contrast(to_pil(image_HWC)).enhance(factor)).reshape(image_HWC.shape)


def read_picture(source: str | Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
    """A picture as uint8 [H, W, 3]; what is transparent becomes white.

    Args:
      source: path, or a picture of Pillow's.
      size: (height, width): cut to that shape around its middle, then resized; None for its own.

    Raises:
      OSError: if it cannot be read; `PIL.UnidentifiedImageError` is one.
    """
    picture = _opened(source, "RGBA")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    picture = page.convert("RGB")
    return np.asarray(picture if size is None else ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS))


def read_mask(source: str | Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A mask as bool [H, W] of (height, width): set where the picture is lighter than middle grey.

    Raises:
      OSError: if it cannot be read.
    """
    return np.asarray(ImageOps.fit(_opened(source, "L"), (size[1], size[0]), Image.Resampling.NEAREST)) >= 128


def _opened(source: str | Image.Image, mode: str) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.convert(mode)
    with Image.open(source) as opened:
        return opened.convert(mode)


def filling(image_HWC: np.ndarray, grid: tuple[int, int], frames: int = 32) -> list[np.ndarray]:
    """A picture appearing code by code, in raster order, over middle grey; `frames` pictures, the last one whole."""
    height, width = image_HWC.shape[0] // grid[0], image_HWC.shape[1] // grid[1]
    number = np.arange(grid[0] * grid[1]).reshape(grid).repeat(height, 0).repeat(width, 1)
    counts = np.unique(np.linspace(0, grid[0] * grid[1], frames + 1).round().astype(int))[1:]
    return [np.where(number[..., None] < count, image_HWC, np.uint8(128)) for count in counts]


def gif_bytes(frames: Sequence[np.ndarray], milliseconds: int = 60, rest: int = 1500) -> bytes:
    """Encodes pictures as an animated GIF that repeats; the last one stays for `rest` milliseconds."""
    pictures = [_enlarged(frame) for frame in frames]
    durations = [milliseconds] * (len(pictures) - 1) + [rest]
    out = io.BytesIO()
    pictures[0].save(out, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return out.getvalue()


def write_corner(image_HWC: np.ndarray, text: str) -> np.ndarray:
    """Writes text into the lower right corner, light on a dark band, as large as a twelfth of the picture allows."""
    picture = to_pil(image_HWC).convert("RGB")
    height = max(7, picture.height // 12)
    font = ImageFont.load_default(size=height)
    left, top, right, bottom = font.getbbox(text)
    band = Image.new("RGB", (int(right - left) + height, int(bottom - top) + height // 2), (32, 32, 32))
    ImageDraw.Draw(band).text((height // 2 - left, height // 4 - top), text, font=font, fill=(224, 224, 224))
    if band.width > picture.width:
        band = band.resize((picture.width, max(1, band.height * picture.width // band.width)))
    picture.paste(band, (picture.width - band.width, picture.height - band.height))
    return np.asarray(picture.convert("L") if image_HWC.shape[-1] == 1 else picture).reshape(image_HWC.shape)
