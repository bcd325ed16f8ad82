"""MaskGIT's VQGAN (arXiv:2202.04200) as its authors publish it: Flax arrays whose names are numbers in order of use.

`encoder` is Conv_0, then the residual blocks of all levels and of the middle as ResBlock_0, 1, ..., GroupNorm_0 and
Conv_1; `decoder` is Conv_0, the middle's blocks and those of all levels from low to high resolution, with Conv_1, 2,
... after each upsampling, GroupNorm_0 and the last Conv. So the counts tell the number of levels and of blocks.
"""

import re
from collections.abc import Mapping

from imagegpt_jax.convert.core import Rule, rule
from imagegpt_jax.convert.vqgan import MASKGIT, SHARED, quantizer
from imagegpt_jax.errors import UserError
from imagegpt_jax.models.vq import VQConfig
from imagegpt_jax.weight_files.tensor import Tensor

_CODEBOOK = "quantizer.codebook"
_FIRST = "encoder.ResBlock_0.Conv_0.kernel"
# Layers of a residual block.
_LAYERS = {"GroupNorm_0": "norm1", "Conv_0": "conv1", "GroupNorm_1": "norm2", "Conv_1": "conv2",
           "Conv_2": "nin_shortcut"}  # fmt: skip


def is_maskgit(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of one."""
    return _FIRST in tensors and _CODEBOOK in tensors


def config(tensors: Mapping[str, Tensor]) -> VQConfig:
    """Config from names and shapes; raises UserError if they are not those of such a network."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"the weights of MaskGIT's tokenizer have an array {name}, and these have none.")
        return tensors[name].shape

    def count(template: str) -> int:
        return len({m[1] for name in tensors if (m := re.match(rf"{template}_(\d+)\.", name))})

    if count("encoder.Conv") != 2:
        raise UserError("a MaskGIT tokenizer that halves pictures by convolutions is not supported: only means are.")
    levels, blocks = count("decoder.Conv") - 1, count("encoder.ResBlock")
    if levels < 1 or blocks % (levels + 1) or blocks != count("decoder.ResBlock"):
        raise UserError(
            f"{blocks} residual blocks in the encoder, {count('decoder.ResBlock')} in the decoder and {levels} levels"
            " are no tokenizer of MaskGIT's, which has as many blocks in each level as in the middle."
        )
    each = blocks // (levels + 1)
    base = shape("encoder.Conv_0.kernel")[3]
    widths = [shape(f"encoder.ResBlock_{i * each}.Conv_0.kernel")[3] for i in range(levels)]
    codes, dim = shape(_CODEBOOK)
    return VQConfig(
        in_channels=shape("encoder.Conv_0.kernel")[2],
        base_width=base,
        width_mults=tuple(width // base for width in widths),
        encoder_blocks=each,
        decoder_blocks=each,
        attention_levels=(),
        mid_attention=False,
        mid_blocks=each,
        z_channels=dim,
        quant_conv=False,
        plain_blocks=True,
        unit_pixels=MASKGIT.unit_pixels,
        quantizer=quantizer(codes, dim, l2_normalize=False),
        **SHARED,
    )


def table(config: VQConfig) -> list[Rule]:
    """The rules; arrays lie as they do here."""
    levels, each = len(config.width_mults), config.encoder_blocks
    encoder = [f"conv_blocks.{i}.res.{j}" for i in range(levels) for j in range(each)]
    middle = [f"mid.{j}" for j in range(each)]
    rules = [rule(_CODEBOOK, "quantize.embedding")]
    for half, blocks in (("encoder", encoder + middle), ("decoder", middle + encoder)):
        last = 1 if half == "encoder" else levels
        convs = {0: "conv_in", last: "conv_out"} | {i: f"conv_blocks.{i - 1}.upsample.conv" for i in range(1, last)}
        for number, ours in convs.items():
            rules += [rule(f"{half}.Conv_{number}.{k}", f"{half}.{ours}.{k}") for k in ("kernel", "bias")]
        rules += [rule(f"{half}.GroupNorm_0.{k}", f"{half}.norm_out.{k}") for k in ("scale", "bias")]
        for number, block in enumerate(blocks):
            for theirs, ours in _LAYERS.items():
                kinds = ("scale", "bias") if "Norm" in theirs else ("kernel",)
                source, target = f"{half}.ResBlock_{number}.{theirs}", f"{half}.{block}.{ours}"
                rules += [rule(f"{source}.{k}", f"{target}.{k}") for k in kinds]
    return rules
