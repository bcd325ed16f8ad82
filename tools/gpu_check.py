"""Runs both trainings and sampling on this machine's GPUs, and says how fast they were and what memory they took.

Each stage is a process of its own, whose peak memory is therefore its own: the tokenizer and the decoder train by the
real loop, with data, evaluation and checkpoints, on the built-in pictures; then the decoder draws some.

  python tools/gpu_check.py --output=gpu.json
  python tools/gpu_check.py --platform=cpu --size=test      # seconds, for tests
"""

import dataclasses
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from imagegpt_jax import cli, errors

PLATFORM = flags.DEFINE_enum("platform", "gpu", ["gpu", "cpu", "tpu"], "Which devices to check.")
SIZE = flags.DEFINE_enum(
    "size", "modest", ["modest", "test"], "modest: the VQ-16 tokenizer and the decoder B at 128 px, in bfloat16."
)
STEPS = flags.DEFINE_integer("steps", 40, "Training steps of each stage.", lower_bound=4)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Examples of a step on each device.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", "", "JSON file to write; by default none.")
STAGE = flags.DEFINE_string("stage", "", "Runs one stage in --workdir, as this tool does itself.")
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of both runs; by default a temporary one.")

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGES = ("tokenizer", "decoder", "sampling")
SIZES = {"modest": ("vq16", "B", 128), "test": ("test", "test", 16)}  # tokenizer, decoder, resolution


@dataclasses.dataclass(frozen=True)
class Result:
    """What a stage did.

    Attributes:
      stage: see `STAGES`.
      devices: how many, of which kind.
      examples_per_second: images trained on or drawn.
      tokens_per_second: codes of them, and in the decoder's training the other tokens of the sequence too.
      peak_bytes: the most memory that any one device held; None where it does not say.
      host_peak_bytes: resident memory of the process.
      seconds: of the whole stage, compilation included.
    """

    stage: str
    devices: str
    examples_per_second: float
    tokens_per_second: float
    peak_bytes: int | None
    host_peak_bytes: int
    seconds: float


def make_config(stage: str, workdir: pathlib.Path, devices: int) -> Any:
    """Config of a stage's training."""
    from imagegpt_jax import config as config_lib

    tokenizer_size, decoder_size, res = SIZES[SIZE.value]
    size = tokenizer_size if stage == "tokenizer" else decoder_size
    config = config_lib.sibling(str(ROOT / "configs" / "x.py"), f"{stage}.py").get_config(f"size={size},res={res}")
    config.steps = STEPS.value
    config.batch_size = config.eval_batch_size = BATCH_SIZE.value * devices
    # Half of the steps are behind the compilation and its reading of the clock.
    config.log_every, config.eval_every, config.checkpoint.every = STEPS.value // 2, 0, 0
    config.data.train, config.data.validation = f"emoji:train,res={res}", f"emoji:validation,res={res},styles=noto"
    for split in ("train_ops", "eval_ops"):
        config.data[split] = "decode|value_range(-1,1)"
    if stage == "tokenizer":
        config.loss.lpips, config.loss.gan_start = 0.0, 0  # its weights are not here; the discriminator takes part
    else:
        config.tokenizer = str(workdir / "tokenizer")
        config.sample_prompts = ()
        config.data.num_classes = 0  # as many as the pictures have
    return config


def train(stage: str, workdir: pathlib.Path) -> tuple[float, float]:
    """Trains a stage; (examples per second of the later steps, tokens of an example)."""
    import jax

    from imagegpt_jax import config as config_lib
    from imagegpt_jax.tasks import interface
    from imagegpt_jax.training import loop

    task = interface.find(stage)
    loop.run(task, make_config(stage, workdir, jax.device_count()), workdir / stage)
    *_, last = (json.loads(line) for line in (workdir / stage / "timing.jsonl").read_text().splitlines())
    setup = task.setup_for_inference(config_lib.load(workdir / stage), workdir / stage)
    if stage == "decoder":
        return last["timing/examples_per_second"], setup.layout.length
    return last["timing/examples_per_second"], (SIZES[SIZE.value][2] // setup.model.downsample) ** 2


def draw(workdir: pathlib.Path) -> tuple[float, float]:
    """Draws two tiles of pictures, of which the second counts; (pictures per second, codes of a picture)."""
    from imagegpt_jax.generation import functional
    from imagegpt_jax.inference import loading
    from imagegpt_jax.sampling.batching import BATCH_SIZE

    decoder = loading.load_decoder(workdir / "decoder")
    tok = decoder.load_tokenizer()
    label, prompt = (0, None) if decoder.setup.space.num_classes else (None, "noto emoji of red heart")
    seconds = []
    for seed in (0, 1):
        started = time.perf_counter()
        functional.generate(decoder, tok, prompt, classes=label, num_images=BATCH_SIZE, seed=seed)
        seconds.append(time.perf_counter() - started)
    return BATCH_SIZE / seconds[-1], decoder.setup.layout.num_codes


def run_stage(stage: str, workdir: pathlib.Path) -> Result:
    """Runs a stage in this process.

    Raises:
      UserError: if there is no such device.
    """
    import jax

    started = time.perf_counter()
    jax.config.update("jax_platforms", {"gpu": "cuda,rocm"}.get(PLATFORM.value, PLATFORM.value))
    devices = find_devices()
    rate, tokens = draw(workdir) if stage == "sampling" else train(stage, workdir)
    stats = [device.memory_stats() or {} for device in devices]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return Result(
        stage=stage,
        devices=f"{len(devices)} x {devices[0].device_kind}",
        examples_per_second=rate,
        tokens_per_second=rate * tokens,
        peak_bytes=max(peaks, default=None),
        host_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        seconds=time.perf_counter() - started,
    )


def find_devices() -> list[Any]:
    """The devices of --platform.

    Raises:
      UserError: if there are none.
    """
    import jax

    try:
        return jax.local_devices(backend=PLATFORM.value)
    except RuntimeError as e:
        hint = "pip install 'imagegpt_jax[cuda]', and see that `nvidia-smi` lists one"
        raise errors.UserError(
            f"JAX finds no {PLATFORM.value.upper()} here: {hint if PLATFORM.value == 'gpu' else 'see --platform'}"
            " (--platform=cpu --size=test checks the tool itself)."
        ) from e


def table(results: list[Result]) -> str:
    """The results as text."""
    head = f"{'stage':<12}{'devices':<28}{'examples/s':>12}{'tokens/s':>12}{'device GiB':>12}{'host GiB':>10}{'s':>8}"
    lines = [head]
    for r in results:
        peak = "-" if r.peak_bytes is None else f"{r.peak_bytes / 2**30:.2f}"
        rates = f"{r.examples_per_second:>12.1f}{r.tokens_per_second:>12.0f}"
        lines.append(
            f"{r.stage:<12}{r.devices:<28}{rates}{peak:>12}{r.host_peak_bytes / 2**30:>10.2f}{r.seconds:>8.0f}"
        )
    return "\n".join(lines)


def check(workdir: pathlib.Path) -> list[Result]:
    """Runs every stage in a process of its own.

    Raises:
      UserError: if one fails.
    """
    results = []
    shared = [f"--{name}={flags.FLAGS[name].value}" for name in ("platform", "size", "steps", "batch_size")]
    for stage in STAGES:
        command = [sys.executable, __file__, f"--stage={stage}", f"--workdir={workdir}", *shared]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            if said and said[-1].startswith("error: "):
                raise errors.UserError(said[-1].removeprefix("error: "))
            print(done.stderr, file=sys.stderr)
            raise errors.UserError(f"{stage} failed with exit status {done.returncode}: see its last words above.")
        results.append(Result(**json.loads(done.stdout.strip().splitlines()[-1])))
        print(f"{stage} done in {results[-1].seconds:.0f} s", file=sys.stderr)
    return results


def main() -> None:
    """Checks this machine, or runs one stage."""
    if STAGE.value:
        if STAGE.value not in STAGES or not WORKDIR.value:
            raise errors.UserError(f"--stage is one of {', '.join(STAGES)}, in a --workdir.")
        print(json.dumps(dataclasses.asdict(run_stage(STAGE.value, pathlib.Path(WORKDIR.value)))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        results = check(pathlib.Path(WORKDIR.value or temporary))
    print(table(results))
    if OUTPUT.value:
        import importlib.metadata

        versions = {name: importlib.metadata.version(name) for name in ("imagegpt_jax", "jax", "jaxlib")}
        about = {"size": SIZE.value, "batch_size_per_device": BATCH_SIZE.value, "steps": STEPS.value}
        text = json.dumps({**about, "versions": versions, "stages": [dataclasses.asdict(r) for r in results]}, indent=1)
        pathlib.Path(OUTPUT.value).write_text(text + "\n")


if __name__ == "__main__":
    cli.run(main)
