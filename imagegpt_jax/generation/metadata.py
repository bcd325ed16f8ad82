"""The request in a PNG's metadata, also as files of before this version had it: then, as flags of the binary."""

from collections.abc import Mapping
from typing import Any

from imagegpt_jax import images
from imagegpt_jax.errors import UserError
from imagegpt_jax.generation import modes
from imagegpt_jax.generation.postprocess import Postprocessing
from imagegpt_jax.generation.request import GenerationRequest, ImageInput, mode_of_entry
from imagegpt_jax.sampling.settings import renamed


def read(path: str) -> tuple[dict[str, Any], GenerationRequest]:
    """The metadata of a PNG, and the request that it is of. Raises UserError if it is no picture of this program."""
    try:
        with open(path, "rb") as file:
            metadata = images.read_metadata(file.read())
    except (OSError, ValueError) as e:
        raise UserError(f"--from_image={path} cannot be read ({e}): give a PNG that this program wrote.") from None
    if "request" not in metadata:
        raise UserError(f"--from_image={path} has no metadata of this program: give a PNG that it wrote.")
    metadata = renewed(metadata)
    return metadata, GenerationRequest.from_json(metadata["request"])


def renewed(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata, or a line of samples.jsonl, as this version writes them."""
    if "draw" not in metadata:
        return metadata
    kept = {name: value for name, value in metadata.items() if name not in ("draw", "finish", "found")}
    request, sampler = of_flags(metadata).to_json(), renamed(metadata["sampler"])
    return kept | {"sampler": sampler, "request": request, "results": metadata.get("found", {})}


def of_flags(metadata: Mapping[str, Any]) -> GenerationRequest:
    """The request of metadata that hold flags: "request", "draw", "sampler" and "finish"."""
    flags, finish = metadata["request"], dict(metadata.get("finish", {}))
    finish["resize"] = _whole(finish.get("resize", ()))
    hashes = flags.get("files", {})
    mode = next((name for name in modes.OF_IMAGES if name in flags), "")
    fields: dict[str, Any] = {
        "prompts": tuple(flags["prompt"]),
        "classes": tuple(flags.get("class", ())),
        "negative": (flags["negative"],) if "negative" in flags else (),
    }
    if mode:
        fields |= {name: flags[name] for name in ("keep", "strength", "style", "source_style") if name in flags}
        fields |= {name: _whole(flags[name]) for name in ("margins", "region") if name in flags}
        inputs = {"images": flags[mode][0], "mask": flags.get("mask", "")}
        fields |= {name: (ImageInput(path, hashes.get(path, "")),) for name, path in inputs.items() if path}
    elif "interpolate" in flags:
        mode = "interpolate"
        shares = modes.shares_of(flags["frames"])
        fields |= {"second_prompt": flags["interpolate"], "shares": (shares[flags["frame"]],)}
    else:
        mode = mode_of_entry(fields["prompts"], fields["classes"])
        fields["grid"] = _whole(flags["grid"]) if "grid" in flags else None
    return GenerationRequest(
        mode=mode,
        settings=renamed(metadata["sampler"]),
        seed=metadata["seed"],
        sample_indices=(metadata["draw"],),
        postprocess=Postprocessing(**finish),
        **fields,
    )


def _whole(numbers: Any) -> tuple[Any, ...]:
    return tuple(int(number) for number in numbers)
