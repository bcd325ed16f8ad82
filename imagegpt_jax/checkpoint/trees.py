"""The arrays in a step's folder, as Orbax keeps them: which there are, and reading all or some of them."""

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from imagegpt_jax.checkpoint import folders


def stored(folder: epath.Path) -> Any:
    """What a step's folder holds: a tree of plain dicts, whose leaves have the shape and dtype of an array each."""
    with ocp.PyTreeCheckpointer() as reader:
        return reader.metadata(folder / folders.STATE).item_metadata.tree


def read(folder: epath.Path, wanted: Any, *, partial: bool = True, on_host: bool = False) -> Any:
    """Reads arrays of a step.

    Args:
      folder: the step's folder.
      wanted: tree of arrays, abstract or not, in whose shardings and dtypes they are read.
      partial: whether the step may hold more than is wanted.
      on_host: gives NumPy arrays in their own dtypes instead; `wanted` may be a part of what `stored` gives.

    Raises:
      ValueError: if what is wanted is not there.
    """
    if on_host:
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    else:
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
        arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(
            folder / folders.STATE,
            args=ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=partial),
        )
