"""`QuantizerConfig`: every choice that defines a quantizer, checked before any device work."""

import dataclasses
import math

from imagegpt_jax.errors import UserError, suggest

KINDS = ("vq", "ibq", "fsq", "lfq")
# Kinds that keep a learned table of codes; the codes of the others follow from their index.
TABLE_KINDS = ("vq", "ibq")
UPDATES = ("gradient", "ema")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """A quantizer and its losses; the defaults are LlamaGen's.

    A vector of `code_dim` numbers becomes `codes_per_vector` indices: it is cut into `groups`, each with codes of its
    own (product quantization), and each group is quantized `depth` times, every time what the last left over.

    Attributes:
      kind: "vq", the nearest code of a learned codebook (arXiv:1711.00937); "ibq", index backpropagation
        (arXiv:2412.02692); "fsq", finite scalar quantization (arXiv:2309.15505); "lfq", signs (arXiv:2310.05737), which
        with `l2_normalize` is BSQ (arXiv:2406.07548).
      num_codes: K, codes of each group: the product of `levels` for "fsq", 2^(code_dim / groups) for "lfq".
      code_dim: numbers in a vector, all groups together.
      groups: parts that a vector is cut into.
      depth: codes of each group, added up (RQ-VAE, arXiv:2203.01941; one codebook for all depths). "vq" only.
      levels: values of each number of a group, for "fsq"; () otherwise.
      l2_normalize: whether vectors and codes are compared on the unit sphere (ViT-VQGAN, arXiv:2110.04627).
      codebook_update: how "vq" learns its codes: "gradient", or "ema", moving averages of the vectors that chose them
        (arXiv:1711.00937, appendix A.1).
      codebook_decay: of the moving averages of the codes' use, and with "ema" of the codes.
      commitment_weight: weight of |z - sg(code)|^2, which moves the encoder (the beta of VQ-VAE, arXiv:1711.00937).
      codebook_weight: weight of |sg(z) - code|^2, which moves the codebook; not of "ema", "fsq" and "lfq".
      index_weight: weight of |z - code|^2 with the gradient to all codes, for "ibq".
      entropy_weight: weight of the entropy loss; 0 leaves it out. Not for "fsq".
      entropy_temperature: divides the negative distances in its softmax.
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
        _check(self.kind in KINDS, f"unknown quantizer kind {self.kind!r}.{suggest(self.kind, KINDS)}")
        _check(
            self.codebook_update in UPDATES,
            f"unknown codebook_update {self.codebook_update!r}.{suggest(self.codebook_update, UPDATES)}",
        )
        for name in ("num_codes", "code_dim", "groups", "depth", "chunk_codes"):
            _check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")
        _check(
            self.code_dim % self.groups == 0,
            f"code_dim={self.code_dim} does not divide by groups={self.groups}: change one.",
        )
        _check(0 <= self.codebook_decay < 1, f"codebook_decay={self.codebook_decay} must be in [0, 1).")
        if self.has_table:
            _check(
                self.num_codes <= self.chunk_codes or self.num_codes % self.chunk_codes == 0,
                f"chunk_codes={self.chunk_codes} does not divide num_codes={self.num_codes}: use a divisor.",
            )
        else:
            _check(not self.revival_steps, f"kind={self.kind!r} has no codebook to revive: set revival_steps=0.")
        _check(
            self.codebook_update == "gradient" or self.kind == "vq",
            f"codebook_update='ema' is for kind='vq': set codebook_update='gradient' for {self.kind!r}.",
        )
        _check(
            self.depth == 1 or (self.kind == "vq" and not self.l2_normalize),
            f"depth={self.depth} needs kind='vq' and l2_normalize=False: what is left over has no fixed length.",
        )
        self._check_lattice()

    def _check_lattice(self) -> None:
        if self.kind == "fsq":
            product = math.prod(self.levels)
            _check(
                len(self.levels) == self.group_dim and min(self.levels, default=0) >= 2,
                f"kind='fsq' needs levels of 2 or more for each of the {self.group_dim} numbers of a group, not"
                f" {self.levels}: set levels, and code_dim = groups x their number.",
            )
            _check(
                self.num_codes == product,
                f"levels={self.levels} have {product} codes, and num_codes={self.num_codes}: set num_codes={product}.",
            )
            _check(not self.l2_normalize, "kind='fsq' does not compare lengths: set l2_normalize=False.")
            _check(not self.entropy_weight, "kind='fsq' has no losses: set entropy_weight=0.")
            return
        _check(not self.levels, f"levels={self.levels} are for kind='fsq': leave them empty for {self.kind!r}.")
        if self.kind == "lfq":
            _check(
                self.group_dim <= 30 and self.num_codes == 2**self.group_dim,
                f"kind='lfq' has one bit for each of the {self.group_dim} numbers of a group: set"
                f" num_codes={2 ** min(self.group_dim, 30)} (it is {self.num_codes}), or another code_dim.",
            )

    @property
    def has_table(self) -> bool:
        """Whether there is a learned codebook."""
        return self.kind in TABLE_KINDS

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
