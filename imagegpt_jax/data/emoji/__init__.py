"""The built-in picture set: emoji in three styles with their names, rendered to any resolution.

Licences of the pictures: ATTRIBUTION.md in this folder.
"""

from imagegpt_jax.data.emoji.catalog import SPLITS, STYLES, Picture, pictures
from imagegpt_jax.data.emoji.source import EmojiSource

__all__ = ["SPLITS", "STYLES", "EmojiSource", "Picture", "pictures"]
