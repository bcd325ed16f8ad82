"""Text to ids and back, by a fast tokenizer of the `tokenizers` library.

Either one trained on the captions at hand (byte-level BPE: every string can be written with it), or any folder that
`transformers.AutoTokenizer` loads offline. Ids are 0 .. vocab_size - 1, without special tokens: those belong to
`packing.TokenSpace`.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence

import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from imagegpt_jax.errors import UserError

BYTES = 256


class TextTokenizer:
    """Text to ids and back.

    Attributes:
      vocab_size: number of ids.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        # A tokenizer from elsewhere may cut, pad, or add special tokens: packing does that here.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # Not the number of tokens: some vocabularies have gaps.
        self.vocab_size = 1 + max(tokenizer.get_vocab().values(), default=-1)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; an empty text has none."""
        # A command line that is not UTF-8 gives lone surrogates, which the library refuses.
        texts = [t.encode("utf-8", "replace").decode() for t in texts]
        return [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, as `normalize` left it; bytes that end in the middle of a character become U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids]).strip()

    def normalize(self, text: str) -> str:
        """The text as the tokenizer sees it: for one trained here in NFKC, lower case, and with single spaces."""
        normalizer = self._tokenizer.normalizer
        return normalizer.normalize_str(text) if normalizer else text

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the tokenizer: 16 hexadecimal digits of a SHA-256."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]

    def save(self, folder: epath.PathLike) -> None:
        """Writes a folder that both `load_tokenizer` and `transformers.AutoTokenizer` load."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_bytes(self._tokenizer.to_str(pretty=True).encode())
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n")


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Trains byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) on captions, after NFKC and lower-casing.

    The vocabulary is smaller than asked for if the captions have fewer pairs to merge.

    Raises:
      UserError: if the vocabulary has no room for the bytes, or there are no captions.
    """
    if vocab_size < BYTES:
        raise UserError(f"text_vocab_size={vocab_size} is too small: byte-level BPE needs at least {BYTES}.")
    texts = [c for c in captions if c.strip()]
    if not texts:
        raise UserError("there are no captions to train a text tokenizer on: give data with captions.")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    single_spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), single_spaces, normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return TextTokenizer(tokenizer)


def no_words() -> TextTokenizer:
    """A tokenizer without any id, for decoders that see no text: every text is empty to it."""
    return TextTokenizer(tokenizers.Tokenizer(models.BPE()))


def load_tokenizer(folder: epath.PathLike) -> TextTokenizer:
    """Loads a folder with a `tokenizer.json`, or one that `transformers.AutoTokenizer` makes a fast tokenizer of.

    Raises:
      UserError: if the folder is missing, or holds no tokenizer or a damaged one.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the folder of a text tokenizer.")
    path = folder / "tokenizer.json"
    if path.exists():
        try:
            return TextTokenizer(tokenizers.Tokenizer.from_buffer(path.read_bytes()))
        except Exception as e:  # the library raises bare Exception for a malformed file
            raise UserError(f"{path} is not a tokenizer ({e}): copy it again.") from e
    from transformers import AutoTokenizer

    try:
        slow_or_fast = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return TextTokenizer(slow_or_fast.backend_tokenizer)
    except Exception as e:  # which ones depends on the kind of tokenizer that the folder seems to hold
        why = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"{folder} holds no tokenizer that can be used here ({why}): give one with tokenizer.json."
        ) from e
