"""Turns a data set of images into token shards, on which a decoder trains without ever running the tokenizer again.

Each image goes through the preprocessing ops and the tokenizer, and is stored as its codes, with its captions and
label. Finished shards are skipped, so the same command again continues where it stopped; with several processes each
writes a part of the shards, and the result does not depend on how many there are.

  python -m imagegpt_jax.encode --tokenizer=runs/tokenizer --data=emoji:train --output=runs/tokens/train
  python -m imagegpt_jax.encode --tokenizer=runs/tokenizer --data=emoji:validation --output=runs/tokens/validation
  python -m imagegpt_jax.encode --tokenizer=runs/tokenizer --data=folder:/data/photos --output=runs/tokens/photos \\
      --ops="decode|resize_small(256)|central_crop(256)|value_range(-1,1)"
  python -m imagegpt_jax.train --config=configs/decoder.py:size=emoji --workdir=runs/decoder \\
      --config.tokenizer=runs/tokenizer --config.data.train=tokens:runs/tokens/train \\
      --config.data.validation=tokens:runs/tokens/validation
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from imagegpt_jax import cli, errors

if TYPE_CHECKING:
    from imagegpt_jax.data.interface import Source
    from imagegpt_jax.data.shards import ShardWriter
    from imagegpt_jax.inference.loading import Tokenizer

TOKENIZER = flags.DEFINE_string("tokenizer", None, "Workdir of a trained image tokenizer.", required=True)
DATA = flags.DEFINE_string(
    "data", None, "Images to encode, such as emoji:train, folder:/path or array_record:/path.", required=True
)
OUTPUT = flags.DEFINE_string("output", None, "Folder to write the token shards into.", required=True)
OPS = flags.DEFINE_string("ops", "", "Preprocessing; by default the tokenizer's own for evaluation.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint of the tokenizer to use; by default the newest.", lower_bound=0)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images encoded at once on each device.", lower_bound=1)
SHARD_SIZE = flags.DEFINE_integer("shard_size", 4096, "At most so many images go into one shard.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of random ops, if --ops has any.", lower_bound=0)

# What of a record stays beside its codes.
KEPT = ("id", "captions", "label")


class Kept:
    """A source that remembers what goes beside the codes of each record that was read from it, until it is taken."""

    def __init__(self, source: "Source"):
        self._source = source
        self._kept: dict[int, dict[str, Any]] = {}
        self.name, self.label_names, self.fingerprint = source.name, source.label_names, source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Records of the source."""
        records = self._source.__getitems__(indices)
        for index, record in zip(indices, records, strict=True):
            self._kept[int(index)] = {key: record[key] for key in KEPT if key in record}
        return [{key: value for key, value in record.items() if key in ("id", "image")} for record in records]

    def take(self, index: int) -> dict[str, Any]:
        """What was remembered of a record."""
        return self._kept.pop(index)


def runs(shards: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers -> (first, last + 1) of each run of consecutive ones: [0, 1, 4] gives (0, 2), (4, 5)."""
    groups = itertools.groupby(enumerate(shards), lambda pair: pair[1] - pair[0])
    members = [[shard for _, shard in group] for _, group in groups]
    return [(group[0], group[-1] + 1) for group in members]


def records(
    tok: "Tokenizer", source: "Source", ops: str, start: int, stop: int, seed: int
) -> Generator[dict[str, Any], None, None]:
    """Encodes records start..stop of a source, in order; random ops depend on (seed, record number) alone."""
    from imagegpt_jax.data.pipeline import Batches

    kept = Kept(source)
    batches = Batches(
        kept, ops=ops, batch_size=tok.batch_size, seed=seed, position=start, shuffle=False, epochs=1, columns=("image",)
    )
    try:
        for batch in batches:
            grid = tok.grid(*batch["image"].shape[1:3])
            codes_BL = tok.encode(batch["image"], value_range=(-1, 1))
            for position, codes_L in zip(batch["position"].tolist(), codes_BL, strict=True):
                if position >= stop:
                    return
                yield {**kept.take(position), "codes": codes_L, "grid": grid}
    finally:
        batches.close()


def write(
    tok: "Tokenizer", source: "Source", ops: str, writer: "ShardWriter", shards: Sequence[int], seed: int
) -> None:
    """Writes those of `shards` that are not finished, with a progress bar."""
    from imagegpt_jax.runtime import distributed, progress

    missing = [shard for shard in shards if not writer.is_finished(shard)]
    planned = sum(stop - start for start, stop in writer.ranges)
    total = sum(stop - start for start, stop in (writer.ranges[shard] for shard in missing))
    if total < planned and distributed.is_main_process():
        print(f"{planned - total} of {planned} images are finished or another process's.", file=sys.stderr)
    grids = set()
    with progress.bar(total=total, desc="encode", unit="image") as bar:
        for first, last in runs(missing):
            stream = records(tok, source, ops, writer.ranges[first][0], writer.ranges[last - 1][1], seed)
            try:
                for shard in range(first, last):
                    start, stop = writer.ranges[shard]
                    writer.write(shard, _counted(itertools.islice(stream, stop - start), bar, grids))
            finally:
                stream.close()


def _counted(stream: Iterator[dict[str, Any]], bar: Any, grids: set[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    for record in stream:
        grids.add(record["grid"])
        if len(grids) > 1:
            sizes = " and ".join(f"{rows} x {columns}" for rows, columns in sorted(grids))
            raise errors.UserError(f"the images give code grids of {sizes}: add resize or a crop to --ops.")
        bar.update()
        yield record


def main() -> None:
    """Encodes the data set that the flags describe."""
    from imagegpt_jax import config as config_lib
    from imagegpt_jax.runtime import distributed

    config_lib.load(TOKENIZER.value)  # a wrong folder is told before JAX starts
    with distributed.distributed_context():
        encode()


def encode() -> None:
    """Does this process's part of the work, together with the others."""
    from etils import epath

    from imagegpt_jax import config as config_lib
    from imagegpt_jax.data import ops as ops_lib
    from imagegpt_jax.data import shards as shards_lib
    from imagegpt_jax.data import sources

    # --- Everything a person can get wrong, before devices and files.
    config: Any = config_lib.load(TOKENIZER.value)
    if "data" not in config and not OPS.value:
        raise errors.UserError(
            "published weights do not say what pictures they want: give --ops=..., with value_range(-1,1)."
        )
    ops = OPS.value or config.data.eval_ops
    ops_lib.parse(ops)
    source = sources.open_source(DATA.value, require="image")

    import jax

    from imagegpt_jax.inference import loading
    from imagegpt_jax.runtime import distributed

    tok = loading.load_tokenizer(TOKENIZER.value, STEP.value, batch_size=BATCH_SIZE.value)
    made_from = {"source": source.fingerprint, "ops": ops, "seed": SEED.value, "tokenizer": tok.fingerprint}
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    folder = epath.Path(OUTPUT.value)
    distributed.assert_equal(output=str(folder), data_and_tokenizer=digest)
    about = folder / shards_lib.SIDECAR
    if about.exists() and json.loads(about.read_text()).get("made_from") == digest:
        if distributed.is_main_process():
            print(f"Already encoded: tokens:{folder}", file=sys.stderr)
        return

    # --- Each process writes a consecutive part of the shards.
    ranges = shards_lib.shard_ranges(len(source), SHARD_SIZE.value)
    count, index = jax.process_count(), jax.process_index()
    if index:
        distributed.barrier()  # the first one has written the plan
    writer = shards_lib.ShardWriter(folder, "tokens", ranges, kind="tokens", made_from=digest)
    if not index:
        distributed.barrier()
    mine = range(len(ranges) * index // count, len(ranges) * (index + 1) // count)
    try:
        write(tok, source, ops, writer, mine, SEED.value)
    except errors.UserError:
        if count == 1:  # what a person has to change, changes the data set: a beginning without any shard is of no use
            writer.abandon(keep_finished=True)
        raise
    distributed.barrier()  # all shards are written

    # --- The description of the whole, which makes it a data set.
    if index == 0:
        (first,) = shards_lib.ShardSource(str(writer.path(0)), kind="tokens").__getitems__([0])
        about = writer.finish(
            label_names=source.label_names,
            made_from=digest,
            tokenizer=tok.fingerprint,
            tokenizer_path=TOKENIZER.value,
            tokenizer_step=tok.step,
            num_codes=tok.num_codes,
            downsample=tok.downsample,
            grid=list(first["grid"]),
            source=DATA.value,
            source_fingerprint=source.fingerprint,
            ops=ops,
            seed=SEED.value,
        )
        print(f"Encoded {about['num_records']} images into {len(ranges)} shards: tokens:{folder}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, joins=True, cache=True)
