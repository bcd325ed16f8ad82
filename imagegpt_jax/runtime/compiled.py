"""The folder of compiled programs, which JAX reads again in place of compiling (its persistent compilation cache).

What lies there is run: nobody else may write it.
"""

import contextlib
import os
import pathlib
import warnings

from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import filesystem

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
LIMIT = 4 << 30  # bytes that the default folder may hold at the start of a program; the oldest files are deleted
is_default = False  # whether the folder is the default one, and not a choice of the user


def prepare(*, default: bool = False) -> None:
    """Makes the folder that JAX_COMPILATION_CACHE_DIR names private; an empty name is none.

    Args:
      default: whether to use a folder of the user's cache where the variable is not set. If that folder cannot be
        used, none is.

    Raises:
      UserError: if others may write the folder that is named.
    """
    global is_default
    folder = os.environ.get(VARIABLE)
    if folder is None and default:
        warnings.filterwarnings("ignore", ".*persistent compilation cache")  # of files that are torn, or a full disk
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
            os.environ[VARIABLE] = str(_default_folder())
            is_default = True
    if not folder or "://" in folder:
        return
    if not os.path.isdir(folder):
        os.makedirs(folder, mode=0o700)
        os.chmod(folder, 0o700)  # whatever the umask is
    elif os.name == "posix" and os.stat(folder).st_mode & 0o022:
        raise UserError(
            f"others may write the compilation cache {folder}, from which programs are run: chmod go-w it, or set"
            " JAX_COMPILATION_CACHE_DIR to a folder of your own."
        )


def _default_folder() -> pathlib.Path:
    """The default folder, made, of programs for processors like this one: homes are shared by unlike machines."""
    import hashlib
    import platform

    about = pathlib.Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    features = [platform.processor(), *[line for line in lines if line.startswith(("flags", "Features"))][:1]]
    root = filesystem.cache_dir() / "compiled"
    folder = root / f"{platform.machine()}-{hashlib.sha256(repr(features).encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    root.chmod(0o700)  # an error where it is another's
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError
    files = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in root.glob("*/*-cache"))
    held = sum(size for _, size, _ in files)
    for _, size, file in files:
        if held > LIMIT:
            file.unlink(missing_ok=True)
            held -= size
    return folder
