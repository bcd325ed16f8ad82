"""Compiles presets for TPU slices and keeps the result: docs/scale.json, and the tables of docs/scale.md.

  python tools/scale/scale.py                   # every cell that is not there yet at these versions
  python tools/scale/scale.py --cells='20B*'    # compile (again) those whose name matches
  python tools/scale/scale.py --check           # recompile one small cell; fail if memory or communication moved by 2%
  python tools/scale/scale.py --render          # only write the page

A cell is a preset on a slice, compiled in a process of its own. Nothing here is measured on a TPU.
"""

import fnmatch
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags

from imagegpt_jax import cli, errors

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "docs"))
import marked

CELLS = flags.DEFINE_string("cells", "", "Pattern of cells to compile again, such as '20B*' or '* v5e-16'.")
CHECK = flags.DEFINE_bool("check", False, "Recompile one small cell and compare it with what is kept.")
RENDER = flags.DEFINE_bool("render", False, "Only write the page from what is kept.")

ROOT = pathlib.Path(__file__).resolve().parents[2]
KEPT, PAGE = ROOT / "docs" / "scale.json", ROOT / "docs" / "scale.md"
GIB = 1 << 30
SIZES = ("B", "L", "XL", "XXL", "3B", "7B", "20B")
SLICES = (("v4-128", 1), ("v5e-16", 1), ("v5e-256", 1), ("v5e-256", 2), ("v5p-128", 1), ("v5p-512", 1), ("v6e-256", 1))
# Not compiled: too large for sixteen chips of 16 GiB (12 bytes a parameter for state alone), or small on many chips.
LEFT_OUT = {
    "v5e-16": ("20B", "7B", "XXL"),
    "v5e-256": ("B", "L", "XL", "7B", "20B"),
    "2 x v5e-256": ("B", "L", "XL", "XXL", "20B"),
    "v6e-256": ("B", "L", "XL", "XXL", "7B"),
}
# Of these also the step that encodes the presets' images itself.
OF_IMAGES = ("B v5e-16", "L v5e-16", "3B v5e-256")
TENSOR = "B v5e-16"  # this one also with `tensor`
CHECKED = "B v5p-128"
TOLERANCE = 0.02
REPLICATED = 1 << 20
# Peak GiB per device that MaxText 0.2.5 (jax 0.12.0.1) compiles to at the same shapes, batch and state precision.
MAXTEXT = {
    "2.9B v5e-256": 1.88,
    "3.1B v5e-256 data 2": 1.96,
    "3.1B v5e-256 data 2, without its option": 1.96,
    "2.9B v5p-128": 2.35,
    "20B v5p-512": 6.46,
    "20B v5p-512 tensor 4": 7.09,
}


def cells() -> dict[str, list[str]]:
    """Name -> arguments of `tools/scale/compile_ahead.py`."""
    arguments: dict[str, list[str]] = {}
    for size in SIZES:
        for topology, slices in SLICES:
            where = f"{f'{slices} x ' if slices > 1 else ''}{topology}"
            if size not in LEFT_OUT.get(where, ()):
                name = f"{size} {where}"
                preset = [
                    f"--config=configs/decoder.py:size={size}", f"--topology={topology}", f"--slices={slices}",
                    "--programs=train",
                ]  # fmt: skip
                arguments[name] = preset
                if name in OF_IMAGES:
                    arguments[f"{name} of images"] = [*preset, "--inputs=images"]
                if name == TENSOR:
                    arguments[f"{name} tensor 2"] = [*preset, "--config.mesh.tensor=2"]
    for program in ("reconstruction", "adversarial"):
        arguments[f"vq16 {program} v5e-16"] = [
            "--config=configs/tokenizer.py:size=vq16", "--topology=v5e-16", f"--programs={program}", "--effort=-1",
        ]  # fmt: skip
    arguments["vq16 adversarial v5e-16 fsdp"] = [
        *arguments["vq16 adversarial v5e-16"], "--config.mesh.data=1", "--config.mesh.fsdp=-1"
    ]  # fmt: skip
    for size in ("B", "XL", "3B"):
        for topology in ("v5e-8", "v6e-8"):  # four images a chip, so eight rows
            arguments[f"{size} decode {topology}"] = [
                f"--config=configs/decoder.py:size={size}", f"--topology={topology}", "--batch_size=32",
                "--programs=decode",
            ]  # fmt: skip
    for depth in (8, 64):
        arguments[f"depth {depth} v5p-128"] = [
            "--config=configs/decoder.py:size=XL", "--topology=v5p-128", f"--config.model.depth={depth}",
            "--programs=train",
        ]  # fmt: skip
    reference = {
        "2.9B v5e-256": ["size=2.9B", "v5e-256"],
        "3.1B v5e-256 data 2": ["size=3.1B", "v5e-256"],
        "2.9B v5p-128": ["size=2.9B", "v5p-128"],
        "20B v5p-512": ["size=20B", "v5p-512"],
        "20B v5p-512 tensor 4": ["size=20B,tensor=4", "v5p-512"],
    }
    for name, (arg, topology) in reference.items():
        arguments[f"reference {name}"] = [
            f"--config=configs/reference.py:{arg}", f"--topology={topology}", "--programs=train"
        ]  # fmt: skip
    name = "reference 3.1B v5e-256 data 2"
    arguments[f"{name}, without its option"] = [*arguments[name], "--config.compiler_options="]
    # The batch is four a device: 256 devices by default.
    arguments["reference 2.9B v5p-128"] += ["--batch_size=256"]
    return arguments


def compile_cell(name: str, arguments: list[str]) -> dict[str, Any]:
    """Compiles a cell in its own process.

    Raises:
      UserError: with the last words of the compilation, if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "cell.json"
        command = [sys.executable, str(ROOT / "tools" / "scale" / "compile_ahead.py"), *arguments, f"--output={output}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            words = done.stderr.strip().splitlines()
            raise errors.UserError(f"cell {name!r} did not compile: {words[-1] if words else done.returncode}")
        (report,) = json.loads(output.read_text())
    return {"name": name, **report}


def kept() -> dict[str, dict[str, Any]]:
    """Name -> report of every cell that is kept."""
    return {cell["name"]: cell for cell in json.loads(KEPT.read_text())} if KEPT.exists() else {}


def keep(reports: dict[str, dict[str, Any]]) -> None:
    """Writes the cells, in the order of `cells`, one object each."""
    ordered = [reports[name] for name in cells() if name in reports]
    KEPT.write_text("[\n" + ",\n".join(json.dumps(cell, sort_keys=True) for cell in ordered) + "\n]\n")


def choose(pattern: str, reports: dict[str, dict[str, Any]], versions: dict[str, str]) -> list[str]:
    """Names of the cells to compile: those that match a pattern, or without one those not kept at these versions.

    Raises:
      UserError: if none matches.
    """
    if not pattern:
        return [name for name in cells() if reports.get(name, {}).get("versions") != versions]
    matches = [name for name in cells() if fnmatch.fnmatch(name, pattern)]
    if not matches:
        raise errors.UserError(f"no cell is named {pattern!r}.{errors.suggest(pattern, cells())}")
    return matches


def check() -> None:
    """Compares one small cell, compiled now, with what is kept.

    Raises:
      UserError: if peak memory or communication differ by more than 2%; if scores of attention or all float32 logits
        are ever in memory; if a parameter of more than 1 MiB is on every device.
    """
    import reports as reports_lib

    old = kept()[CHECKED]
    if old["versions"] != reports_lib.versions():
        print(f"{CHECKED} is kept for {old['versions']}, and these are {reports_lib.versions()}: nothing to compare.")
        return
    new = compile_cell(CHECKED, cells()[CHECKED])
    for key in ("peak_bytes", "collective_bytes"):
        change = new[key] / old[key] - 1
        print(f"{CHECKED}: {key} {new[key]:,} against {old[key]:,} ({change:+.2%})")
        if abs(change) > TOLERANCE:
            raise errors.UserError(
                f"{key} of cell {CHECKED!r} moved by {change:+.1%}: if that is meant, compile the cells again with"
                " `make scale`."
            )
    print(
        f"{CHECKED}: scores of attention {new['attention_scores_bytes']:,} bytes, largest float32 array"
        f" {new['largest_float32_bytes']:,} (all logits: {new['full_logits_bytes']:,}), largest replicated parameter"
        f" {new['largest_replicated_parameter_bytes']:,}"
    )
    if new["attention_scores_bytes"]:
        raise errors.UserError(f"the program of cell {CHECKED!r} holds length x length scores of attention.")
    if new["largest_float32_bytes"] >= new["full_logits_bytes"]:
        raise errors.UserError(f"the program of cell {CHECKED!r} holds a float32 array as large as all logits.")
    if new["largest_replicated_parameter_bytes"] > REPLICATED:
        raise errors.UserError(f"cell {CHECKED!r} holds a parameter of more than {REPLICATED:,} bytes on every device.")


# ------------------------------------------------------------------------------------------------------------ the page


def row(cell: dict[str, Any]) -> str:
    """A line of the table."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in cell["mesh"].items() if size > 1)
    slices = f"{cell['slices']} x " if cell["slices"] > 1 else ""
    bound = cell["collective_bound_bytes"]
    ratio = f"{cell['collective_bytes'] / bound:.2f}" if bound else ""
    estimate = cell["roofline_estimate_seconds"]
    times = [f"{1e3 * estimate[name]:.0f}" for name in ("compute", "hbm", "ici", "dcn") if name in estimate]
    accumulate = cell["config"]["accumulate"]
    batch = f"{cell['batch_size']:,}" + (f" in {accumulate}" if accumulate > 1 else "")
    label = cell["name"].split(" v")[0].replace(f" {cell['slices']} x", "")
    return (
        f"| {label} | {slices}{cell['topology']} | {mesh} | {cell['inputs']} | {batch} |"
        f" {cell['compile_seconds']:.0f} |"
        f" {cell['argument_bytes'] / GIB:.2f} / {cell['temp_bytes'] / GIB:.2f} |"
        f" {cell['peak_bytes'] / GIB:.2f} ({cell['peak_bytes'] / cell['hbm_bytes']:.0%}) |"
        f" {cell['collective_bytes'] / 1e9:.2f} | {ratio} |"
        f" {' / '.join(times)} |"
    )


HEADER = (
    "| config | slice | mesh | inputs | batch | compile s | argument / temp GiB | peak GiB (of memory) |"
    " GB communicated | / minimum | estimate ms: compute / HBM / ICI (/ DCN) |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def tables(reports: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Marker -> table."""
    presets = [r for n, r in reports.items() if not n.startswith(("reference", "depth")) and r["program"] != "decode"]
    decoding = [
        f"| {cell['name'].split(' ')[0]} | {cell['topology']} | {cell['weights_bytes'] / GIB:.3f} |"
        f" {cell['cache_bytes'] / GIB:.3f} | {cell['alias_bytes'] / GIB:.3f} | {cell['bytes_accessed'] / GIB:.3f} |"
        f" {cell['accessed_over_read']:.2f} | {cell['peak_bytes'] / GIB:.3f} |"
        for cell in reports.values()
        if "bytes_accessed" in cell
    ]
    columns = ("weights", "cache", "updated in place", "moved", "moved / (weights + cache)", "peak")
    head = f"| config | slice | {' | '.join(columns)} |"
    reference = []
    for name, peak in MAXTEXT.items():
        if (cell := reports.get(f"reference {name}")) is not None:
            ours = cell["peak_bytes"] / GIB
            sent = cell["collective_bytes"] / cell["collective_bound_bytes"]
            reference.append(f"| {name} | {ours:.2f} | {peak} | {ours / peak:.2f} | {sent:.2f} |")
    depth = [reports[n] for n in ("depth 8 v5p-128", "depth 64 v5p-128") if n in reports]
    kinds = ("compile_seconds", "compile_processor_seconds")
    seconds = [
        f"{d['config']['model']['depth']} layers: {d[kinds[0]]:.1f} s, {d[kinds[1]]:.1f} s of a processor"
        for d in depth
    ]
    ratios = [f"{depth[1][kind] / depth[0][kind]:.2f}" for kind in kinds] if len(depth) == 2 else []
    ratio = f"; ratio {', '.join(ratios)}" if ratios else ""
    head_of_reference = (
        "| shape | peak GiB, ours | MaxText | ratio | communicated / minimum, ours |\n|---|---|---|---|---|"
    )
    return {
        "cells": "\n".join([HEADER, *map(row, presets)]),
        "reference": "\n".join([head_of_reference, *reference]),
        "decoding": "\n".join([head, "|---|---|---|---|---|---|---|---|", *decoding]),
        "depth": "; ".join(seconds) + ratio + ".",
    }


def render() -> None:
    """Writes the tables between the marks of the page."""
    marked.fill(PAGE, **tables(kept()))


def main() -> None:
    """Compiles, checks or renders."""
    if CHECK.value:
        check()
        return
    if not RENDER.value:
        import reports as reports_lib

        reports, plan = kept(), cells()
        wanted = choose(CELLS.value, reports, reports_lib.versions())
        for i, name in enumerate(wanted, 1):
            print(f"[{i}/{len(wanted)}] {name}", file=sys.stderr, flush=True)
            reports[name] = compile_cell(name, plan[name])
            keep(reports)
    render()


if __name__ == "__main__":
    cli.run(main)
