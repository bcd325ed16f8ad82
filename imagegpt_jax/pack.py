"""Packs images with captions or labels into ArrayRecord shards, the form that training reads with random access.

    imagegpt-jax pack --input=/data/photos --output=/data/packed
    imagegpt-jax pack --input='/data/wds/*.tar' --output=/data/packed
    imagegpt-jax pack --input='/data/train-*.parquet' --output=/data/packed
    imagegpt-jax pack --tfds=coco_captions --split=train --output=/data/packed

Images keep their bytes. An interrupted run is continued by the same command. Afterwards the data set is
array_record:/data/packed. What is understood:

    folder    .txt files beside the images, metadata.jsonl / metadata.csv, or class sub-folders
    tar       webdataset: files of one sample share the name up to the first dot; .jpg .png .webp ... with .txt
              (captions), .json (with caption or text) and .cls (class number)
    parquet   a column of image bytes (or of Hugging Face's {bytes, path}), with text / caption(s) and label columns
    tfds      a prepared TFDS set in any file format, with an image feature and captions or a class label
"""

import io
from collections.abc import Iterator
from typing import Any

from absl import flags
from PIL import Image, UnidentifiedImageError

from imagegpt_jax import cli
from imagegpt_jax.data.images import FORMATS
from imagegpt_jax.data.pack_inputs import TfdsInput, open_input
from imagegpt_jax.data.shards import ShardWriter, shard_ranges
from imagegpt_jax.errors import UserError
from imagegpt_jax.runtime import progress

INPUT = flags.DEFINE_string("input", None, "A folder of images, or a pattern of .tar or .parquet files.")
TFDS = flags.DEFINE_string("tfds", None, "Instead of --input: name of a TFDS set that is prepared on this machine.")
SPLIT = flags.DEFINE_string("split", "train", "Split of the TFDS set.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps its data, if not in the usual place.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write; made if it is not there.")
NAME = flags.DEFINE_string("name", "train", "First part of the names of the files.")
SHARD_SIZE = flags.DEFINE_integer("shard_size", 4096, "Largest number of images in one file.")


def checked(records: Iterator[dict[str, Any]], bar: Any) -> Iterator[dict[str, Any]]:
    """Passes records on; raises UserError for one whose image is none (by its header: nothing is decoded)."""
    for record in records:
        try:
            Image.open(io.BytesIO(record["image"]), formats=FORMATS).close()
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as e:
            raise UserError(f"{record['id']} is not an image: replace or remove it, then run this again.") from e
        bar.update()
        yield record


def main() -> None:
    """Packs one data set."""
    if bool(INPUT.value) == bool(TFDS.value):
        raise UserError("give either --input=FOLDER_OR_PATTERN or --tfds=NAME; see --help.")
    if OUTPUT.value is None:
        raise UserError("--output is missing: give the folder to write, --output=DIR.")
    source = TfdsInput(TFDS.value, SPLIT.value, DATA_DIR.value) if TFDS.value else open_input(INPUT.value or "")
    ranges = shard_ranges(len(source), SHARD_SIZE.value)
    writer = ShardWriter(OUTPUT.value, NAME.value, ranges, kind="images", made_from=source.fingerprint)
    try:
        with progress.bar(total=len(source), desc="Packing", unit="image") as bar:
            for shard, (start, stop) in enumerate(ranges):
                if writer.is_finished(shard):
                    bar.update(stop - start)
                else:
                    writer.write(shard, checked(source.records(start, stop), bar))
        about = writer.finish(label_names=source.label_names, source=INPUT.value or f"tfds:{TFDS.value},{SPLIT.value}")
    except UserError:  # what is packed has to change, so nothing of this can be continued
        writer.abandon(keep_finished=False)
        raise
    except BaseException:
        writer.abandon(keep_finished=True)
        raise
    print(f"{about['num_records']} images in {len(ranges)} files: use it as array_record:{OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
