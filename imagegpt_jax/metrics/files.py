"""Writing what evaluations leave behind."""

from etils import epath


def write(path: epath.Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_bytes(data)
    temporary.replace(path)
