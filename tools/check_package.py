"""Builds sdist and wheel, installs the wheel alone; trains, encodes, samples and evaluates in an empty folder.

    python tools/check_package.py                          # into a temporary folder
    python tools/check_package.py --python=python3.13      # with another interpreter

Everything after the installation runs offline: proxies lead nowhere.
"""

import os
import pathlib
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile

from absl import flags

from imagegpt_jax import cli
from imagegpt_jax.errors import UserError

PYTHON = flags.DEFINE_string(
    "python", sys.executable, "Interpreter of the environment that the wheel is installed into."
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
INSIDE = ("imagegpt_jax/configs/decoder.py", "imagegpt_jax/configs/tokenizer.py", "imagegpt_jax/py.typed")
NOWHERE = "http://127.0.0.1:9"
QUICK = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}  # programs run for a moment
COMMANDS = """
imagegpt-jax --version
imagegpt-jax train --config=tokenizer:size=test --workdir=tokenizer
imagegpt-jax encode --tokenizer=tokenizer --data=emoji:train,res=16 --output=tokens/train
imagegpt-jax encode --tokenizer=tokenizer --data=emoji:validation,res=16 --output=tokens/validation
imagegpt-jax train --config=configs/decoder.py:size=test --workdir=decoder --config.tokenizer=tokenizer
    --config.data.train=tokens:tokens/train --config.data.validation=tokens:tokens/validation
imagegpt-jax sample --decoder=decoder --prompt=star --num_images=2 --output=samples
imagegpt-jax evaluate --checkpoint=tokenizer --checkpoint=decoder --output=metrics.json
imagegpt-jax checkpoint verify decoder
imagegpt-jax convert decoder exported
"""


def build(folder: pathlib.Path) -> pathlib.Path:
    """Builds both archives, the wheel from the sdist, and checks what they hold; returns the wheel.

    Raises:
      UserError: if a file is missing, or the wheel installs a second top-level package.
    """
    run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        installed = archive.namelist()
    with tarfile.open(sdist) as archive:
        shipped = [name.partition("/")[2] for name in archive.getnames()]
    for path, names in ((wheel, installed), (sdist, shipped)):
        if missing := [name for name in INSIDE if name not in names]:
            raise UserError(f"{path.name} lacks {', '.join(missing)}: see [tool.setuptools] in pyproject.toml.")
    top = {name.partition("/")[0] for name in installed if ".dist-info" not in name}
    if top != {"imagegpt_jax"}:
        raise UserError(
            f"{wheel.name} installs {', '.join(sorted(top))} at the top: only imagegpt_jax may stand there."
        )
    return wheel


def run(command: list[str], cwd: pathlib.Path | None = None, **variables: str) -> None:
    """Runs a command and shows it.

    Raises:
      UserError: if it fails.
    """
    print(f"$ {shlex.join(command)}", flush=True)
    if code := subprocess.run(command, cwd=cwd, env={**os.environ, **variables}, check=False).returncode:
        raise UserError(f"`{shlex.join(command)}` failed with exit status {code}: its last words are above.")


def main() -> None:
    """Checks the package."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        wheel = build(folder / "dist")
        run([PYTHON.value, "-m", "venv", str(folder / "env")])
        binaries = folder / "env" / "bin"
        run([str(binaries / "pip"), "install", "--quiet", "--no-compile", str(wheel)], PYTHONPATH="")
        empty = folder / "empty"
        empty.mkdir()
        offline = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"), NOWHERE)
        for line in COMMANDS.replace("\n    ", " ").strip().splitlines():
            _, *arguments = shlex.split(line)
            run([str(binaries / "imagegpt-jax"), *arguments], empty, PYTHONPATH="", **offline, **QUICK)
        if len(list((empty / "samples").glob("*.png"))) < 2 or not (empty / "metrics.json").is_file():
            raise UserError(f"{empty} holds no samples or no metrics.json after all commands: see their output above.")
    print(f"{wheel.name}: trains, encodes, samples and evaluates from an empty folder, offline.")


if __name__ == "__main__":
    cli.run(main)
