"""`GPTConfig`: every choice that defines the decoder, checked before any device work."""

import dataclasses
import math

from imagegpt_jax.errors import UserError, at_least, check_ranges, suggest
from imagegpt_jax.models import layers
from imagegpt_jax.models.rope import RopeScaling

# What the flash kernel of cuDNN computes: these dtypes, and heads up to this size (from Hopper on, twice that).
CUDNN_DTYPES, CUDNN_HEAD = ("bfloat16", "float16"), 128
CHOICES = {
    "norm": layers.NORMS,
    "mlp": ("swiglu", "gelu"),
    "activation": ("", *layers.ACTIVATIONS),
    "position": ("rope", "learned"),
    "conditioning": ("prefix", "adaptive_norm"),
    "remat": ("none", "full", "attention", "dots"),
    "attention": ("auto", "xla", "splash", "cudnn"),
}
RANGES = {
    **dict.fromkeys(("vocab_size", "width", "depth", "heads", "mlp_width"), at_least(1)),
    **dict.fromkeys(("token_dropout", "residual_dropout", "mlp_dropout", "attention_dropout"), at_least(0, below=1)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Everything that defines the decoder.

    Attributes:
      vocab_size: tokens of the one vocabulary (`TokenSpace.vocab_size`).
      width: D, model width.
      depth: number of blocks.
      heads: N, query heads.
      kv_heads: K, key/value heads; 0 = as many as heads.
      head_dim: H; 0 = width / heads.
      mlp_width: F, hidden width of the mlp.
      norm: "rms" or "layer".
      norm_eps: added to the variance.
      mlp: "swiglu" (arXiv:2002.05202) or "gelu" (one hidden layer, in GPT-2's tanh form).
      activation: what stands in for SiLU in "swiglu" or GELU in "gelu", one of `layers.ACTIVATIONS`; "" = as named.
      bias: biases in linear maps and in layer norm.
      attention_bias: biases in the linear maps of attention, without `bias`.
      mlp_bias: biases in the linear maps of the mlp, without `bias`.
      attention_scale: multiplies queries times keys; 0 = 1 / sqrt(H).
      attention_scale_by_layer: layer i (from 0) divides its attention scale by i + 1 as well, as GPT-2 may.
      position: "rope" (rotary) or "learned" (one table for each of t, row, column, summed).
      rope_theta: base of the rotary wavelengths.
      rotary_dims: head dimensions turned by (t, row, column); () = a quarter, three eighths, three eighths.
      rope_scaling: stretches the wavelengths for longer sequences; for rotary_dims along t alone.
      rope_zero_prefix: tokens with t <= 0 get cos = sin = 0, so that no query or key of theirs is left, as LlamaGen's
        code does with its class and text prefix; for its weights only.
      max_length: rows of each learned position table; positions must be below it. Unused by "rope".
      qk_norm: RMS norm of queries and keys per head (arXiv:2302.05442).
      tie_embeddings: the token table is also the output head.
      head_size: ids 0 .. head_size - 1 are scored, the others can only be read; 0 = all.
      token_dropout: dropout after the embedding.
      residual_dropout: dropout of each attention output.
      mlp_dropout: dropout of each mlp output.
      attention_dropout: dropout of the attention weights.
      target_positions: each token is also told the position of the token it is to predict (any-order prediction, as in
        RAR, arXiv:2411.00776).
      feature_width: E, width of a text encoder's features; 0 = none.
      feature_length: P, number of features per example.
      feature_begins: the last feature stands in place of the first token, as in LlamaGen, which has no <boi>.
      conditioning: "prefix" (features are put before the tokens), or "adaptive_norm": each block is modulated by the
        embedding of `Sequence.condition_B` and the mean of the features (adaLN-zero, arXiv:2212.09748).
      attention: how whole sequences are attended to: "xla" (any platform), "splash" (TPU), "cudnn" (GPU), or "auto".
      remat: what the backward pass recomputes, from most to least: "full" (everything but block inputs), "attention"
        (also keeps attention outputs), "dots" (all but products with weights), "none".
      scan: apply blocks by `lax.scan` (compile time does not grow with depth), else unrolled (no copies of slices).
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int = 0
    head_dim: int = 0
    mlp_width: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    mlp: str = "swiglu"
    activation: str = ""
    bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float = 0.0
    attention_scale_by_layer: bool = False
    position: str = "rope"
    rope_theta: float = 10000.0
    rotary_dims: tuple[int, ...] = ()
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    rope_zero_prefix: bool = False
    max_length: int = 0
    qk_norm: bool = False
    tie_embeddings: bool = False
    head_size: int = 0
    token_dropout: float = 0.0
    residual_dropout: float = 0.0
    mlp_dropout: float = 0.0
    attention_dropout: float = 0.0
    target_positions: bool = False
    feature_width: int = 0
    feature_length: int = 0
    feature_begins: bool = False
    conditioning: str = "prefix"
    attention: str = "auto"
    remat: str = "none"
    scan: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        check_ranges(self, RANGES, "decoder config: ")
        for name, known in CHOICES.items():
            value = getattr(self, name)
            check(value in known, f"{name}={value!r} is not one of {', '.join(known)}", suggest(str(value), known))
        layers.as_dtype(self.dtype)
        layers.as_dtype(self.param_dtype)
        check(
            self.head_dim >= 1 or (self.head_dim == 0 and self.width % self.heads == 0),
            f"width={self.width} does not divide by heads={self.heads}: change one, or give head_dim",
        )
        check(
            1 <= self.num_kv_heads <= self.heads and self.heads % self.num_kv_heads == 0,
            f"kv_heads={self.kv_heads} must divide heads={self.heads}",
        )
        if self.position == "rope":
            check(self.head_width % 2 == 0, f"head_dim={self.head_width} must be even for rotary positions")
            dims = self.rotary_axes
            check(
                len(dims) == 3 and all(d >= 0 and d % 2 == 0 for d in dims) and 0 < sum(dims) <= self.head_width,
                f"rotary_dims={self.rotary_dims} must be three even sizes (t, row, column) that sum to at most"
                f" head_dim={self.head_width}",
            )
            check(self.rope_theta > 1, f"rope_theta={self.rope_theta} must be above 1")
            check(
                self.rope_scaling.kind == "default" or dims == (dims[0], 0, 0),
                f"rope_scaling={self.rope_scaling.kind!r} is for positions along t alone, and rotary_dims={dims}",
            )
        else:
            check(self.max_length >= 1, f"learned positions need max_length >= 1, not {self.max_length}")
        check(
            (self.feature_width > 0) == (self.feature_length > 0) and min(self.feature_width, self.feature_length) >= 0,
            f"feature_width={self.feature_width} and feature_length={self.feature_length} must be both 0 or both > 0",
        )
        check(
            not self.attention_dropout or self.attention in ("auto", "xla"),
            f"attention_dropout={self.attention_dropout} needs attention='xla': flash kernels have no dropout",
        )
        check(
            self.attention != "cudnn" or (self.dtype in CUDNN_DTYPES and self.head_width <= CUDNN_HEAD),
            f"attention='cudnn' computes in {' or '.join(CUDNN_DTYPES)} with heads of at most {CUDNN_HEAD},"
            f" and dtype is {self.dtype!r} with heads of {self.head_width}: change those, or set attention='auto'",
        )
        check(
            0 <= self.head_size <= self.vocab_size and not (self.head_size and self.tie_embeddings),
            f"head_size={self.head_size} must be 0 to vocab_size={self.vocab_size}, and 0 with tied embeddings",
        )
        check(
            not self.feature_begins or (self.feature_width > 0 and self.conditioning == "prefix"),
            "feature_begins needs prefix features: give feature_width and feature_length",
        )
        check(not self.target_positions or self.width % 2 == 0, "target_positions needs an even width")

    @property
    def head_width(self) -> int:
        """H, with its default filled in."""
        return self.head_dim or self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        """K, with its default filled in."""
        return self.kv_heads or self.heads

    @property
    def rotary_axes(self) -> tuple[int, ...]:
        """Head dimensions for (t, row, column), with the default filled in."""
        return self.rotary_dims or split_dims(self.head_width)

    @property
    def residual_scale(self) -> float:
        """What the initial projections into the residual stream are scaled by (GPT-2): 1 / sqrt(2 depth)."""
        return 1.0 / math.sqrt(2 * self.depth)


def check(ok: bool, what: str, hint: str = "") -> None:
    """Raises UserError unless `ok`."""
    if not ok:
        raise UserError(f"decoder config: {what}.{hint}")


def split_dims(width: int) -> tuple[int, int, int]:
    """Divides an even width among (t, row, column): three eighths each, rounded down to even, for row and column."""
    side = 2 * (3 * width // 16)
    return width - 2 * side, side, side
