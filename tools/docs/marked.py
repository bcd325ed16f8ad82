"""The parts of a page that tools write: what stands between the lines `<!-- NAME -->` and `<!-- /NAME -->`."""

import pathlib
import re

from imagegpt_jax import errors


def fill(page: pathlib.Path, **blocks: str) -> None:
    """Puts each block between the marks of its name.

    Raises:
      UserError: if the page has no such marks.
    """
    text = page.read_text()
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise errors.UserError(f"{page} has no marks <!-- {name} --> and <!-- /{name} -->: put them back.")
        text = pattern.sub(lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text)
    page.write_text(text)
