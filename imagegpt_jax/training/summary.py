"""What is told before the first step: the data that were found, what is made of them, and for how many epochs."""

from typing import TYPE_CHECKING, Any

from etils import epath

from imagegpt_jax import train_state
from imagegpt_jax.data.interface import describe

if TYPE_CHECKING:
    from imagegpt_jax.tasks.interface import Task


def text(task: "Task", setup: Any, workdir: epath.PathLike, begins: bool) -> str:
    """A line for each thing, aligned."""
    config = setup.config
    lines = [("run", f"{workdir}, {'a new one' if begins else 'goes on'}")]
    for name in setup.optimizers:
        count = train_state.count_params(setup.networks[name].abstract)
        lines.append((name, f"{count / 1e6:,.1f} M parameters"))
    for split, source in setup.sources.items():
        lines.append((split, describe(source)))
    lines += task.notes(setup)
    steps = f"{config.steps} of {config.batch_size}"
    if "train" in setup.sources:
        steps += f", {config.steps * config.batch_size / len(setup.sources['train']):.3g} epochs"
    lines.append(("steps", f"{steps}; evaluated every {config.eval_every}, saved every {config.checkpoint.every}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:>{width}}  {words}" for name, words in lines)
