"""Batches of NumPy arrays from a source: the position in the run goes in, a batch comes out, nothing is remembered.

Shape suffixes: B rows of the batch on this host, H height, W width, L codes of one image.

Global position p decides everything about an example: which record (`order.Order`), which of its captions, and every
random number of its augmentation. A batch is `batch_size` consecutive positions, of which a host loads its `rows`. So
the only state is how many examples have been drawn, resuming is exact, and the number of hosts changes nothing.

A source with a `quarantine` (see quarantine.py) has its bad records replaced by the next position's; without one they
raise.

Images take this way: `Dataset.range` over batches -> one call that fetches all records of a batch -> image by image,
in parallel: decode and ops -> batch. What is not an image goes around TensorFlow, and a source without images never
loads it. A thread of ours runs ahead of the consumer and calls `host_fn`.
"""

import dataclasses
import functools
import os
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from imagegpt_jax.data import ops as ops_lib
from imagegpt_jax.data.images import decode_image, sniff
from imagegpt_jax.data.interface import Source
from imagegpt_jax.data.mixture import Mixture
from imagegpt_jax.data.order import Order, hash_positions
from imagegpt_jax.data.prefetch import AHEAD, Prefetch
from imagegpt_jax.data.quarantine import Quarantine
from imagegpt_jax.data.sources import first_record
from imagegpt_jax.errors import UserError

Batch = dict[str, np.ndarray]

# Batch key -> key of the record it is made from.
COLUMNS = {"image": "image", "caption": "captions", "label": "label", "codes": "codes"}
# What keeps the random numbers of different uses apart (order.py uses (seed, source, epoch)).
_CAPTION, _AUGMENT = 1 << 40, 1 << 41


class Batches:
    """An iterator of batches; `position` is its only state.

    A batch is a dict, with the keys the source has records for:

        "image"     what the ops make, float32 [B, H, W, 3] after value_range, else uint8
        "caption"   object [B] of str: one caption of the record, chosen by position; "" if it has none
        "label"     int32 [B]; -1 if the record has none
        "codes"     int32 [B, L]
        "id"        object [B] of str
        "position"  int64 [B], global
        "mask"      bool [B], False for the rows that fill up the last batch, and unless shuffled for replaced ones

    Arrays may be read-only. Rows that fill up the last batch repeat the last example.

    Attributes:
      position: global examples drawn so far, by all hosts together; what a checkpoint keeps.
    """

    def __init__(
        self,
        source: Source,
        *,
        ops: str = "decode|value_range(-1,1)",
        batch_size: int,
        seed: int = 0,
        position: int = 0,
        skipped: Sequence[tuple[int, int]] = (),
        rows: slice | Sequence[int] | np.ndarray | None = None,
        shuffle: bool = True,
        epochs: int | None = None,
        host_fn: Callable[[Batch], Any] | None = None,
        columns: Sequence[str] | None = None,
    ):
        """Prepares to iterate; reading begins with the first `next`.

        Args:
          source: see `sources.open_source`.
          ops: op string for the images; not looked at if there are none.
          batch_size: global rows of a batch.
          seed: of order, captions and augmentation.
          position: where to begin: 0, or what `position` was.
          skipped: windows of positions, (first, end) each and ascending, of which no batch begins in any.
          rows: the rows of the global batch that this host loads; all by default.
          shuffle: a new order every epoch, with mixture weights; else the order of the source, one part after another.
          epochs: how often to go through len(source) examples; forever by default.
          host_fn: called with every batch ahead of time, in a thread; what it returns is what the iterator gives.
          columns: which of "image", "caption", "label", "codes" to make; by default all that the source has.

        Raises:
          UserError: for a wrong op string, batch size or column.
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} should be 1 or more.")
        every_B = np.arange(batch_size)
        has = _columns(source)
        wanted = tuple(columns) if columns is not None else has
        for name in wanted:
            if name not in COLUMNS:
                raise ValueError(f"columns has {name!r}, known are {', '.join(COLUMNS)}")
            if name not in has:
                raise UserError(f"{source.name} has no {name}, only {', '.join(has)}: choose another data set.")
        parts, weights = (source.sources, source.weights) if isinstance(source, Mixture) else ([source], None)
        order = Order([len(s) for s in parts], weights, seed=seed, shuffle=shuffle)
        self.position, self._given = position, 0
        self._reader = _Reader(
            source=source,
            order=order,
            ops=ops_lib.parse(ops) if "image" in wanted else [],
            row_B=every_B if rows is None else every_B[rows if isinstance(rows, slice) else np.asarray(rows)],
            batch_size=batch_size,
            seed=seed,
            start=position,
            skipped=tuple(skipped),
            end=None if epochs is None else epochs * len(source),
            shuffle=shuffle,
            columns=wanted,
            host_fn=host_fn or (lambda batch: batch),
        )
        self._prefetch: Prefetch | None = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Any:
        """The next batch.

        Raises:
          UserError: for an image that cannot be read, naming it.
        """
        if self._prefetch is None:
            self._prefetch = Prefetch(self._reader.batches)
            weakref.finalize(self, self._prefetch.stop)
        batch = self._prefetch.get()
        self.position = self._reader.first_position(self._given) + self._reader.batch_size
        if self._reader.end is not None:
            self.position = min(self.position, self._reader.end)
        self._given += 1
        return batch

    def close(self) -> None:
        """Stops reading ahead; done as well when the iterator is no longer referenced."""
        if self._prefetch is not None:
            self._prefetch.stop()


def position_after(start: int, batches: int, batch_size: int, skipped: Sequence[tuple[int, int]] = ()) -> int:
    """Where the next batch begins, `batches` batches after one that was to begin at `start`.

    Args:
      start: position to count from.
      batches: how many batches come before.
      batch_size: positions of each.
      skipped: windows that no batch begins in, (first, end) each, ascending.
    """
    position, left = start, batches
    for first, end in skipped:
        if end <= position:
            continue
        before = max(0, -(-(first - position) // batch_size))  # batches that begin before the window
        if left < before:
            break
        position, left = max(position + before * batch_size, end), left - before
    return position + left * batch_size


def _columns(source: Source) -> tuple[str, ...]:
    """What the source can fill, judged by the first record of each part: images and codes if all have them."""
    parts = source.sources if isinstance(source, Mixture) else [source]
    keys = [set(first_record(part)) for part in parts]
    some, every = set.union(*keys), set.intersection(*keys)
    return tuple(n for n, key in COLUMNS.items() if key in (every if n in ("image", "codes") else some))


@dataclasses.dataclass(kw_only=True, eq=False)
class _Reader:
    """Makes the batches. Apart from `Batches`, so that the thread that reads ahead does not keep that one alive."""

    source: Source
    order: Order
    ops: list[ops_lib.Op]
    row_B: np.ndarray
    batch_size: int
    seed: int
    start: int
    skipped: tuple[tuple[int, int], ...]
    end: int | None
    columns: tuple[str, ...]
    host_fn: Callable[[Batch], Any]
    shuffle: bool

    def __post_init__(self):
        self.quarantine: Quarantine | None = getattr(self.source, "quarantine", None)
        self.failed: dict[int, Exception] = {}
        self.fetched: dict[tuple[int, int], Batch] = {}  # what goes around TensorFlow, by graph and number of the batch
        self.graphs = 0

    def batches(self) -> Iterator[Any]:
        if "image" not in self.columns:
            for number in self._numbers():
                yield self.host_fn(self._batch(number, *self._records(number)))
            return
        # A change of range is the same for every pixel: done last, on whole batches, it costs least.
        *process, last = self.ops
        ranged = last.name == "value_range"
        for images_BHWC, batch in self._images(process if ranged else self.ops):
            if ranged:
                images_BHWC = ops_lib.value_range_numpy(images_BHWC, **last.arguments)
            yield self.host_fn({"image": images_BHWC, **batch})

    def _numbers(self) -> range:
        """Numbers of the batches, counted from the start of this iterator."""
        left = 2**62 if self.end is None else max(0, self.end - self.start)
        return range(-(-left // self.batch_size))

    def first_position(self, number: int) -> int:
        """Global position of the first row of a batch."""
        return position_after(self.start, number, self.batch_size, self.skipped)

    def _positions(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Global positions of the rows of a batch, and which of them count."""
        position_B = self.first_position(number) + self.row_B
        return position_B, np.ones(position_B.shape, bool) if self.end is None else position_B < self.end

    def _records(self, number: int) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
        """The records of a batch, their numbers in the source, and which of them are their position's own."""
        position_B, mask_B = self._positions(number)
        if self.end is not None:
            position_B = np.where(mask_B, position_B, self.end - 1)
        if self.quarantine is not None:
            return self.quarantine.fetch(self.source, self.order, position_B)
        index_B = self.order(position_B)
        return self.source.__getitems__(index_B.tolist()), index_B, np.ones(len(index_B), bool)

    def _batch(self, number: int, records: list[dict[str, Any]], index_B: np.ndarray, own_B: np.ndarray) -> Batch:
        """All of a batch but the images."""
        del index_B
        position_B, mask_B = self._positions(number)
        if not self.shuffle:  # an evaluation counts nothing twice
            mask_B = mask_B & own_B
        batch: Batch = {"id": _objects([r["id"] for r in records]), "position": position_B, "mask": mask_B}
        if "caption" in self.columns:
            choice_B = hash_positions(position_B, self.seed, _CAPTION)
            texts = (r.get("captions") or [""] for r in records)
            batch["caption"] = _objects([c[int(choice) % len(c)] for c, choice in zip(texts, choice_B, strict=True)])
        if "label" in self.columns:
            batch["label"] = np.array([r.get("label", -1) for r in records], np.int32)
        if "codes" in self.columns:
            codes = [np.asarray(r["codes"], np.int32) for r in records]
            if len({len(c) for c in codes}) > 1:
                raise UserError(f"{self.source.name} has code grids of several sizes: mix only sets of one tokenizer.")
            batch["codes"] = np.stack(codes)
        return batch

    # ------------------------------------------------------------------ images, by tf.data

    def _images(self, ops: list[ops_lib.Op]) -> Iterator[tuple[np.ndarray, Batch]]:
        """Images of every batch, with the rest of it. A graph whose batch has a bad record is begun anew after it."""
        tf = ops_lib.import_tf()
        process = ops_lib.build(ops)
        number = 0
        while True:
            graph = self.graphs = self.graphs + 1
            try:
                for images_BHWC in self._dataset(process, graph, number):
                    yield images_BHWC, self.fetched.pop((graph, number))
                    number += 1
                return
            except tf.errors.OpError as e:
                if not self._put_aside(number, process):
                    raise self._explain(number, process, e) from e
                self.fetched.clear()

    def _dataset(self, process: Callable[..., Any], graph: int, start: int) -> Iterator[np.ndarray]:
        """The images of the batches from number `start` on."""
        tf = ops_lib.import_tf()
        threads = os.cpu_count() or 1
        rows = len(self.row_B)
        fetch_batch = functools.partial(self._fetch, graph)

        def fetch(number: Any) -> tuple[Any, Any, Any]:
            data, image_format, seed = tf.numpy_function(
                fetch_batch, [number], [tf.string, tf.int32, tf.int64], stateful=True
            )
            data.set_shape([rows])
            image_format.set_shape([rows])
            seed.set_shape([rows, 2])
            return data, image_format, seed

        dataset = tf.data.Dataset.range(start, self._numbers().stop)
        dataset = dataset.map(fetch, num_parallel_calls=AHEAD).prefetch(AHEAD).unbatch()
        dataset = dataset.map(process, num_parallel_calls=threads, deterministic=True)
        dataset = dataset.batch(rows, drop_remainder=True)
        options = tf.data.Options()
        options.deterministic = True
        options.autotune.enabled = False
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        yield from dataset.prefetch(AHEAD).with_options(options).as_numpy_iterator()

    def _put_aside(self, number: int, process: Callable[..., Any]) -> bool:
        """Puts the records of a failed batch that cannot be processed into quarantine; whether there were any."""
        if self.quarantine is None or number in self.failed:
            return False
        tf = ops_lib.import_tf()
        any_bad = False
        records, index_B, _ = self._records(number)
        for record, index in zip(records, index_B.tolist(), strict=True):
            try:
                process(record["image"], tf.constant(sniff(record["image"])), tf.zeros(2, tf.int64))
            except (tf.errors.OpError, ValueError) as e:  # outside a graph, what Pillow says comes as it is
                self.quarantine.add(index, str(record["id"]), f"cannot be processed ({_reason(e)})")
                any_bad = True
        return any_bad

    def _fetch(self, graph: int, number: np.int64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encoded images, formats and int64 [B, 2] seeds of a batch; the rest of it is kept for `batches`."""
        try:
            records, *rest = self._records(int(number))
            batch = self._batch(int(number), records, *rest)
            data = [r["image"] for r in records]
        except Exception as e:
            self.failed[int(number)] = e  # TensorFlow would pass on no more than its text
            raise
        if graph == self.graphs:
            self.fetched[graph, int(number)] = batch
        hash_B = hash_positions(batch["position"], self.seed, _AUGMENT)
        seeds_B2 = np.stack([hash_B.view(np.int64), np.zeros_like(batch["position"])], axis=1)
        return _objects(data), np.array([sniff(d) for d in data], np.int32), seeds_B2

    def _explain(self, number: int, process: Callable[..., Any], error: Exception) -> Exception:
        """Finds which record of a batch that failed is to blame: by doing them again, one by one."""
        if number in self.failed:
            return self.failed[number]
        tf = ops_lib.import_tf()
        shapes = {}
        for record in self._records(number)[0]:
            name = f"image {record['id']!r} of {self.source.name}"
            try:
                decode_image(record["image"])
                image = process(record["image"], tf.constant(sniff(record["image"])), tf.zeros(2, tf.int64))
                shapes.setdefault(tuple(image.shape), name)
            except ValueError as e:
                return UserError(f"{name} is {e}: replace or remove it.")
            except tf.errors.OpError as e:
                return UserError(f"{name} cannot be processed ({_reason(e)}): replace it, or change the ops.")
        if len(shapes) > 1:
            (a, first), (b, second), *_ = shapes.items()
            return UserError(
                f"the ops {'|'.join(op.name for op in self.ops)!r} leave images of different sizes ({first}: {a[0]} x"
                f" {a[1]}, {second}: {b[0]} x {b[1]}): add resize or a crop."
            )
        return error


def _reason(error: Exception) -> str:
    text = str(getattr(error, "message", error)).strip()
    text = re.sub(r".*Summarized data:|\{\{.*?\}\}|\[Op:\w+\].*|\bb'|'$", " ", text.replace("\n", " ").strip())
    return " ".join(text.split())[:300]


def _objects(items: Sequence[Any]) -> np.ndarray:
    out = np.empty(len(items), object)
    out[:] = items
    return out
