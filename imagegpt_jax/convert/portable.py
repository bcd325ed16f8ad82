"""The portable folder, and the way back to published layouts.

    model.safetensors    every array under our name, one layer at a time (`blocks.3.mlp.up.weight`)
    config.json          what the network is: enough to load it anywhere, offline
    README.md            model card
    text_tokenizer/      of decoders that read words; labels.json: names of their classes

Arrays keep the dtype they came in, and what the network has no use for but belongs to the published file is carried
along, so that every round trip gives the same bits.
"""

import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from imagegpt_jax import config as config_lib
from imagegpt_jax import train_state
from imagegpt_jax.convert import core, formats, networks
from imagegpt_jax.convert.formats import Published
from imagegpt_jax.convert.layout import ImageSpace, RasterLayout
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.gpt_config import GPTConfig
from imagegpt_jax.models.palette import PaletteConfig
from imagegpt_jax.models.vq import VQConfig
from imagegpt_jax.weight_files import safetensors_file
from imagegpt_jax.weight_files.tensor import Shape, Tensor, tree_leaves

FORMAT = "imagegpt_jax"
WEIGHTS, ABOUT = "model.safetensors", "config.json"
_NETWORKS: dict[str, type] = {"gpt": GPTConfig, "palette": PaletteConfig, "vq": VQConfig}
# Files of a text tokenizer that `transformers` puts beside weights.
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
               "tokenizer.model", "added_tokens.json")  # fmt: skip
# Settings of a network and its run that may name code of a user's.
PLUG_INS = ("kind", "gan_kind", "cfg_schedule")
_ALL = [core.rule("{name:.+}", "{name}")]


@dataclasses.dataclass(frozen=True)
class Portable:
    """An opened portable folder.

    Attributes:
      path: the folder.
      kind: "tokenizer" or "decoder".
      config: of the network.
      tensors: arrays by our names.
      layout: how pictures become sequences, for imported decoders of images.
      published: name in `formats.FORMATS` that it came from; "" for one that was trained here.
      about: the published `config.json`.
      run: config of the training run, for one that was trained here; {} otherwise.
    """

    path: pathlib.Path
    kind: str
    config: networks.Config
    tensors: Mapping[str, Tensor]
    layout: RasterLayout | None
    published: str
    about: Mapping[str, Any]
    run: Mapping[str, Any]

    def params(
        self, dtype_of: Callable[[str, np.dtype], np.dtype] = lambda name, dtype: dtype
    ) -> tuple[train_state.Network, train_state.Params]:
        """The network and its parameters; `dtype_of` as in `networks.assemble`."""
        net = networks.network(self.config)
        stream = core.convert(_ALL, self.tensors, networks.shapes(net), str(self.path))
        own = (pair for pair in stream if not pair[0].startswith(core.CARRIED))
        return net, networks.assemble(net, own, dtype_of)


def is_portable(path: pathlib.Path) -> bool:
    """Whether a folder is a portable one."""
    about = path / ABOUT
    return about.is_file() and _read_about(about).get("format") == FORMAT


def _read_about(path: pathlib.Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}): copy it again.") from e
    return about if isinstance(about, dict) else {}


def _check_trust(path: pathlib.Path, values: list[Any]) -> None:
    """Raises UserError where a file, which must not decide which code is run, names a module nobody has imported."""
    for name, value in tree_leaves({str(i): value for i, value in enumerate(values)}):
        module, colon, _ = str(value).partition(":")
        if name.rpartition(".")[2] in PLUG_INS and colon and module not in sys.modules:
            raise UserError(f"{path} names {value}, code that nobody here gave: import {module} first if you trust it.")


def open_portable(path: pathlib.Path) -> Portable:
    """Opens a portable folder; raises UserError if something in it is missing or damaged."""
    about = _read_about(path / ABOUT)
    _check_trust(path / ABOUT, [about.get("model"), about.get("run")])
    if not (path / WEIGHTS).exists():
        raise UserError(f"{path} has a {ABOUT} of {FORMAT} and no {WEIGHTS}: copy the whole folder.")
    layout = about.get("layout")
    if layout is not None:
        layout = RasterLayout(
            space=ImageSpace(**layout["space"]), grid=tuple(layout["grid"]), by_row=bool(layout["by_row"])
        )
    return Portable(
        path=path,
        kind=about["kind"],
        config=config_lib.to_dataclass(_NETWORKS[about["network"]], about["model"]),
        tensors=safetensors_file.read(path / WEIGHTS)[0],
        layout=layout,
        published=about.get("published", ""),
        about=about.get("about", {}),
        run=about.get("run", {}),
    )


# ----------------------------------------------------------------------------------------------------------- writing


def save_published(published: Published, source: pathlib.Path, target: pathlib.Path) -> None:
    """Writes recognised weights into a portable folder, an array at a time, with the text tokenizer beside `source`.

    Raises:
      UserError: if the weights do not fit the network that they describe, or the folder is not empty.
    """
    net = networks.network(published.config)
    shapes = networks.shapes(net)
    jobs = core.plan(published.table, published.tensors, shapes, str(source))
    sizes = _sizes(jobs, published.tensors)
    arrays = core.convert(published.table, published.tensors, shapes, str(source))
    kind = formats.FORMATS[published.format].kind
    about = {"published": published.format, "about": published.about}
    _write(target, kind, published.config, sizes, arrays, about, published.layout)
    folder = source if source.is_dir() else source.parent
    if kind == formats.DECODER:
        for name in _TEXT_FILES:
            if (folder / name).exists():
                (target / "text_tokenizer").mkdir(exist_ok=True)
                shutil.copyfile(folder / name, target / "text_tokenizer" / name)


def save_params(
    kind: str, config: networks.Config, params: Mapping[Any, Any], target: pathlib.Path, run: Mapping[str, Any]
) -> None:
    """Writes a network, "tokenizer" or "decoder", that was trained here by the config `run` into a portable folder."""
    sizes = {name: (array.shape, array.dtype) for name, array in networks.flat(params)}
    _write(target, kind, config, sizes, networks.flat(params), {"run": run}, None)


def _write(
    target: pathlib.Path,
    kind: str,
    config: networks.Config,
    sizes: Mapping[str, tuple[Shape, np.dtype]],
    arrays: Iterable[tuple[str, np.ndarray]],
    more: Mapping[str, Any],
    layout: RasterLayout | None,
) -> None:
    _make(target)
    safetensors_file.write(target / WEIGHTS, sizes, arrays, {"format": FORMAT})
    network = next(name for name, cls in _NETWORKS.items() if isinstance(config, cls))
    model = dataclasses.asdict(config)
    about = {"format": FORMAT, "version": 1, "kind": kind, "network": network, "model": model, **more}
    about["layout"] = None if layout is None else dataclasses.asdict(layout)
    (target / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    count = sum(int(np.prod(shape)) for name, (shape, _) in sizes.items() if not name.startswith(core.CARRIED))
    (target / "README.md").write_text(_card(kind, count, more.get("published", ""), model, sizes))


def _make(target: pathlib.Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty: choose another folder.")
    target.mkdir(parents=True, exist_ok=True)


def _card(kind: str, count: int, published: str, model: Mapping[str, Any], sizes: Mapping[str, Any]) -> str:
    """The model card."""
    origin = formats.FORMATS[published].title if published else "trained with imagegpt_jax"
    dtypes = sorted({np.dtype(dtype).name for _, dtype in sizes.values()})
    rows = "\n".join(f"| `{key}` | `{value}` |" for key, value in model.items())
    return f"""---
library_name: imagegpt_jax
tags: [image-{kind}]
---

# Image {kind}

| | |
|---|---|
| origin | {origin} |
| parameters | {count:,} |
| dtypes | {", ".join(dtypes)} |

The weights keep the licence of their origin.

```python
import imagegpt_jax as ig
{"tok = ig.load_tokenizer" if kind == "tokenizer" else "gpt = ig.load_decoder"}("this/folder")
```

## Network

| key | value |
|---|---|
{rows}
"""


def _sizes(jobs: Iterable[core.Job], tensors: Mapping[str, Tensor]) -> dict[str, tuple[Shape, np.dtype]]:
    """Shapes and dtypes of what jobs give, without reading anything."""
    sizes = {}
    for job in jobs:
        # Arrays of one number repeated, which take no memory.
        dummies = [np.broadcast_to(np.zeros((), tensors[s].dtype), tensors[s].shape) for s in job.sources]
        if job.targets:
            for name, array in zip(job.targets, job.change.load(dummies), strict=True):
                sizes[name] = (array.shape, array.dtype)
    return sizes


# -------------------------------------------------------------------------------------------------------- way back


def export(portable: Portable, name: str, target: pathlib.Path) -> None:
    """Writes a portable folder in a published layout, by its name in `formats.FORMATS`; "" = the one it came from.

    Raises:
      UserError: if there is no such layout, the network is none of its, or the target is not empty.
    """
    name = name or portable.published
    layout = config_lib.choose("layout", name, formats.FORMATS)
    if layout.kind != portable.kind:
        raise UserError(
            f"{portable.path} is a {portable.kind}, and {layout.title} a {layout.kind}: choose another layout."
        )
    about = dict(portable.about) if name == portable.published else {}
    if "model_type" not in about:  # else it is the whole of what was published
        about = layout.about(portable.config, portable.layout) | about
    misfits = layout.misfits(portable.config, about)
    if misfits:
        raise UserError(f"{portable.path} is no {layout.title}: that has no {', '.join(misfits)}.")
    table = core.invert(layout.table(portable.config))
    tensors = dict(portable.tensors)
    for key, tensor in layout.defaults.items():
        tensors.setdefault(core.CARRIED + key, tensor)
    known = {*networks.shapes(networks.network(portable.config)), *(k for k in tensors if k.startswith(core.CARRIED))}
    if set(tensors) != known:
        raise UserError(f"{portable.path} does not hold the arrays of its network: copy it again.")
    jobs = core.plan(table, _writable(table, tensors), None, str(portable.path))
    _make(target)
    arrays = (pair for job in jobs for pair in job.run(tensors))
    layout.write(target, _sizes(jobs, tensors), arrays, about)


def _writable(table: Iterable[core.Rule], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Names to write: all but what another layout's file carried."""
    carried = {source for line in table for source in line.sources if source.startswith(core.CARRIED)}
    for name in tensors:
        if not name.startswith(core.CARRIED) or core.matches(carried, name):
            yield name
