"""Trains a text tokenizer (byte-level BPE) on the captions of a data set.

  python tools/train_text_tokenizer.py --data=emoji:train --vocab_size=1024 --output=runs/text

A decoder trains one by itself on the captions of its own data. Train one here to share it between decoders, or to make
it from other captions, and use it with --config.data.text_tokenizer=runs/text. Any string can be written with it.
"""

from collections.abc import Iterator

from absl import flags
from etils import epath
from tqdm import tqdm

from imagegpt_jax import cli
from imagegpt_jax.data import text
from imagegpt_jax.data.interface import Source
from imagegpt_jax.data.sources import open_source
from imagegpt_jax.errors import UserError

DATA = flags.DEFINE_string("data", None, "Data set with captions, such as emoji:train or folder:/path.", required=True)
VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 1024, "Number of tokens; 256 of them are the bytes.", lower_bound=text.BYTES
)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write, which must not hold a tokenizer.", required=True)

READ_AT_ONCE = 256  # records


def captions(source: Source) -> Iterator[str]:
    """Yields every caption of a source."""
    with tqdm(total=len(source), desc="Reading captions", unit="record") as progress:
        for start in range(0, len(source), READ_AT_ONCE):
            records = source.__getitems__(range(start, min(start + READ_AT_ONCE, len(source))))
            for record in records:
                yield from record.get("captions", ())
            progress.update(len(records))


def main() -> None:
    """Trains and saves the tokenizer."""
    output = epath.Path(OUTPUT.value)
    if (output / "tokenizer.json").exists():
        raise UserError(f"{output} already holds a tokenizer: give another folder, or delete it.")
    source = open_source(DATA.value, require="captions")
    tokenizer = text.train_tokenizer(captions(source), VOCAB_SIZE.value)
    tokenizer.save(output)
    print(f"{tokenizer.vocab_size} tokens: use them with --config.data.text_tokenizer={output}")


if __name__ == "__main__":
    cli.run(main)
