"""Writes tests/golden/specs.json: how every parameter of every preset is cut. Look at the diff before you commit it."""

import json
import pathlib
import sys
from typing import Any

from absl import app

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "scale"))
import topologies

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "specs.json"
CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def specs() -> dict[str, Any]:
    """Preset -> its mesh, and the PartitionSpec of each parameter as text."""
    import jax

    from imagegpt_jax.config import sibling
    from imagegpt_jax.parallel import sharding
    from imagegpt_jax.tasks import decoder, tokenizer

    pinned: dict[str, Any] = {}
    for name, task in (("decoder", decoder), ("tokenizer", tokenizer)):
        module = sibling(str(CONFIGS / "x.py"), f"{name}.py")
        recipes = module.RECIPES if name == "tokenizer" else sibling(str(CONFIGS / "x.py"), "recipes.py").RECIPES
        presets = {size: f"size={size}" for size in module.MODELS}
        # LlamaGen's networks are those of sizes.
        presets |= {recipe: f"recipe={recipe}" for recipe in recipes if not recipe.startswith("llamagen")}
        for preset, arg in presets.items():
            config = module.get_config(arg)
            count = topologies.parse_topology(config.topology).chips if config.topology else 8
            sizes = sharding.mesh_shape(config.mesh, count)
            minor = sharding.minor_sizes(sizes["fsdp"])[0]
            shape = (sizes["data"], sizes["fsdp"] // minor, minor, sizes["tensor"])
            mesh: Any = jax.sharding.AbstractMesh(shape, sharding.MESH_AXES)
            params: dict[str, str] = {}
            for network, net in sorted(task.setup_abstract(config).networks.items()):
                leaves = jax.tree_util.tree_leaves_with_path(
                    sharding.module_specs(net.abstract, mesh), is_leaf=lambda x: isinstance(x, jax.P)
                )
                for path, spec in leaves:
                    key = "/".join([network, *(str(getattr(p, "key", p)) for p in path)])
                    params[key] = " ".join("+".join(sharding.as_tuple(entry)) or "-" for entry in spec)
            pinned[f"{name} {preset}"] = {"mesh": dict(zip(sharding.MESH_AXES, shape, strict=True)), "params": params}
    return pinned


def main(argv: list[str]) -> None:
    """Writes the file."""
    del argv
    GOLDEN.write_text(json.dumps(specs(), indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
