"""`QuantizerConfig`: every choice that defines a quantizer, checked before device work; `Kind`: what a kind does."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

from imagegpt_jax.errors import UserError, at_least, check_ranges, suggest
from imagegpt_jax.plugins import plug_in

# Every kind of quantizer, and where its `Kind` is; a user's own is named in the same way, as module:name.
KINDS = {name: f"imagegpt_jax.models.quantizers.{name}:{name.upper()}" for name in ("vq", "ibq", "fsq", "lfq")}
UPDATES = ("gradient", "ema")
RANGES = {
    **dict.fromkeys(("num_codes", "code_dim", "groups", "depth", "chunk_codes"), at_least(1)),
    "codebook_decay": at_least(0, below=1),
}
# Options that only some kinds have, and their values for those that do not.
NEUTRAL: dict[str, Any] = {
    "depth": 1,
    "levels": (),
    "l2_normalize": False,
    "codebook_update": "gradient",
    "entropy_weight": 0.0,
    "revival_steps": 0,
}


class Group(NamedTuple):
    """What quantizing one group of every vector gives.

    Attributes:
      zq_NZ: the chosen codes; their gradient goes to the input as the kind has it.
      codes_ND: int32, their indices within the group, one for each depth.
      vectors_NDZ: what each was chosen for.
      losses: unweighted terms, of "commitment", "codebook", "index" and "entropy".
    """

    zq_NZ: Float[Array, "N Z"]
    codes_ND: Int[Array, "N D"]
    vectors_NDZ: Float[Array, "N D Z"]
    losses: dict[str, Float[Array, ""]]


# What `Kind.nearest` gives: codes, and what each was chosen for.
Nearest = tuple[Int[Array, "N D"], Float[Array, "N D Z"]]
# Learned codes, [K, Z] of a group or [I, Z] of all. A function: kinds without `init` have none, and do not call it.
Codebook = Callable[[], Float[Array, "I Z"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of quantizer. `codebook()` gives what `init` made and training changed, as it is compared and decoded.

    Attributes:
      quantize: (config, codebook [K, Z] of the group, z_NZ) -> Group, in training.
      nearest: (config, codebook, z_NZ) -> (codes_ND, vectors_NDZ), the same without losses and gradient.
      lookup: (config, codebook [I, Z] of all groups, ids of any shape) -> codes [..., Z], the values of `quantize`.
      init: (config, param_dtype, key) -> learned codebook [I, Z]; None for codes that follow from their index.
      check: config -> None; raises UserError for what this kind cannot do.
      learn: as `use.learn`, which is what None stands for.
      options: which of `NEUTRAL` it has; the others are refused.
    """

    quantize: Callable[..., Group]
    nearest: Callable[..., Nearest]
    lookup: Callable[..., Float[Array, "... Z"]]
    init: Callable[..., Float[Array, "I Z"]] | None = None
    check: Callable[["QuantizerConfig"], None] | None = None
    learn: Callable[..., Any] | None = None
    options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """A quantizer and its losses; the defaults are LlamaGen's.

    A vector of `code_dim` numbers becomes `codes_per_vector` indices: it is cut into `groups`, each with codes of its
    own (product quantization), and each group is quantized `depth` times, every time what the last left over.

    Attributes:
      kind: "vq", the nearest code of a learned codebook (arXiv:1711.00937); "ibq", index backpropagation
        (arXiv:2412.02692); "fsq", finite scalar quantization (arXiv:2309.15505); "lfq", signs (arXiv:2310.05737), which
        with `l2_normalize` is BSQ (arXiv:2406.07548); or "module:name" of a `Kind` of your own.
      num_codes: K, codes of each group: the product of `levels` for "fsq", 2^(code_dim / groups) for "lfq".
      code_dim: numbers in a vector, all groups together.
      groups: parts that a vector is cut into.
      depth: codes of each group, added up (RQ-VAE, arXiv:2203.01941; one codebook for all depths). "vq" only.
      levels: values of each number of a group, for "fsq"; () otherwise.
      l2_normalize: whether vectors and codes are compared on the unit sphere (ViT-VQGAN, arXiv:2110.04627).
      codebook_update: how "vq" learns its codes: "gradient", or "ema", moving averages of the vectors that chose them
        (arXiv:1711.00937, appendix A.1).
      codebook_decay: decay of the moving averages of the codes' use, and with "ema" of the codes.
      commitment_weight: weight of |z - sg(code)|^2, which moves the encoder (the beta of VQ-VAE, arXiv:1711.00937).
      codebook_weight: weight of |sg(z) - code|^2, which moves the codebook; not of "ema", "fsq" and "lfq".
      index_weight: weight of |z - code|^2 with the gradient to all codes, for "ibq".
      entropy_weight: weight of the entropy loss; 0 leaves it out. Not for "fsq".
      entropy_temperature: divides the negative distances in the softmax of the entropy loss.
      revival_steps: a code that no vector chose for so many steps is replaced by a vector of the batch; 0 is never. For
        kinds with a codebook.
      chunk_codes: codes compared at a time, which bounds memory at N x chunk_codes; must divide a larger K.
    """

    kind: str = "vq"
    num_codes: int = 16384
    code_dim: int = 8
    groups: int = 1
    depth: int = 1
    levels: tuple[int, ...] = ()
    l2_normalize: bool = True
    codebook_update: str = "gradient"
    codebook_decay: float = 0.99
    commitment_weight: float = 0.25
    codebook_weight: float = 1.0
    index_weight: float = 0.0
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01
    revival_steps: int = 0
    chunk_codes: int = 16384

    def __post_init__(self):
        _check(
            self.codebook_update in UPDATES,
            f"unknown codebook_update {self.codebook_update!r}.{suggest(self.codebook_update, UPDATES)}",
        )
        check_ranges(self, RANGES)
        _check(
            self.code_dim % self.groups == 0,
            f"code_dim={self.code_dim} does not divide by groups={self.groups}: change one.",
        )
        rules = self.rules
        for name, neutral in NEUTRAL.items():
            value = getattr(self, name)
            _check(
                name in rules.options or value == neutral,
                f"kind={self.kind!r} has no {name}: set {name}={neutral!r} (it is {value!r}).",
            )
        _check(
            not self.has_codebook or self.num_codes <= self.chunk_codes or self.num_codes % self.chunk_codes == 0,
            f"chunk_codes={self.chunk_codes} does not divide num_codes={self.num_codes}: use a divisor.",
        )
        if rules.check:
            rules.check(self)

    @property
    def rules(self) -> Kind:
        """What the kind does."""
        kind = plug_in(KINDS.get(self.kind, self.kind), "quantizer kind", KINDS)
        _check(isinstance(kind, Kind), f"quantizer kind {self.kind!r} is no quantizers.Kind: make it one.")
        return kind

    @property
    def has_codebook(self) -> bool:
        """Whether there is a learned codebook."""
        return self.rules.init is not None

    @property
    def group_dim(self) -> int:
        """Numbers in a group of a vector."""
        return self.code_dim // self.groups

    @property
    def codes_per_vector(self) -> int:
        """Indices that a vector becomes."""
        return self.groups * self.depth

    @property
    def num_ids(self) -> int:
        """Different indices there are: those of group g are g K to (g + 1) K - 1."""
        return self.groups * self.num_codes


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)
