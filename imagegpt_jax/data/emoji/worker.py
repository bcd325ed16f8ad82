"""Worker process of render.py: one SVG document per line on stdin, one length-prefixed RGB PNG each on stdout.

resvg holds Python's interpreter lock while it draws, so threads alone do not help; and this is a script of its own,
rather than a `multiprocessing` target, because those import the caller's main module, which a notebook or a script
without a `__main__` guard does not survive.
"""

import io
import struct
import sys

import resvg_py
from PIL import Image


def render(svg: str) -> bytes:
    """Returns the PNG of an SVG document on a white background."""
    rgba = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    out = io.BytesIO()
    Image.open(io.BytesIO(bytes(rgba))).convert("RGB").save(out, "PNG")
    return out.getvalue()


if __name__ == "__main__":
    for line in sys.stdin.buffer:
        png = render(line.decode())
        sys.stdout.buffer.write(struct.pack("<I", len(png)) + png)
        sys.stdout.buffer.flush()
