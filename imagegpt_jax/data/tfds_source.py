"""A prepared TensorFlow Datasets set as a source: random access, images left encoded."""

import functools
import hashlib
import threading
from collections.abc import Sequence
from typing import Any

from imagegpt_jax.errors import UserError, suggest
from imagegpt_jax.runtime import logs

CAPTION_FEATURES = ("captions", "caption", "text")


@functools.cache
def import_tfds() -> Any:
    """Imports tensorflow_datasets with its chatter off."""
    logs.quiet()
    import tensorflow_datasets as tfds

    return tfds


def open_builder(name: str, data_dir: str | None) -> Any:
    """Finds a TFDS data set that is prepared on disk.

    Raises:
      UserError: if TFDS does not know it, or it is not prepared.
    """
    tfds = import_tfds()
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as e:
        raise UserError(f"TFDS knows no data set {name!r}.{_suggest(name)}") from e
    except Exception as e:  # a bad name, version or config: TFDS raises many kinds
        why = " ".join(str(e).split())[:300].rstrip(".")
        raise UserError(f"TFDS cannot open {name!r} ({why}): give tfds:NAME[/CONFIG][:VERSION].") from e
    if not builder.info.splits:
        where = f", data_dir={data_dir!r}" if data_dir else ""
        raise UserError(
            f'{name} is not prepared in {builder.data_dir}: prepare it once with python -c "import tensorflow_datasets'
            f" as tfds; tfds.builder('{name}'{where}, file_format='array_record').download_and_prepare()\""
        )
    return builder


def _suggest(name: str) -> str:
    near = suggest(name, import_tfds().list_builders())
    return near if near.startswith(" Did") else " The list is at tensorflow.org/datasets/catalog."


class TfdsExamples:
    """Turns TFDS examples of any image set into records: finds the image, caption and label features.

    Attributes:
      features: TFDS names of what is used, as {"image": ..., "captions": ..., "label": ..., "id": ...}.
      label_names: of the label feature, if there is one.
    """

    def __init__(self, builder: Any):
        tfds = import_tfds()
        features = dict(builder.info.features.items())

        def first(kind: Any, *preferred: str) -> str | None:
            names = [n for n, f in features.items() if isinstance(f, kind)]
            return next((n for n in (*preferred, *names) if n in names), None)

        image = first(tfds.features.Image, "image")
        if image is None:
            raise UserError(
                f"{builder.info.full_name} has no image feature ({', '.join(features)}): choose another set."
            )
        captions = next((n for n in CAPTION_FEATURES if n in features), None)
        label = first(tfds.features.ClassLabel, "label")
        names = {"image": image, "captions": captions, "label": label}
        self._images = [n for n, f in features.items() if isinstance(f, tfds.features.Image)]
        self.features = {k: n for k, n in names.items() if n is not None}
        identity = next((n for n in ("image/filename", "image/id", "file_name", "id") if n in features), None)
        if identity:
            self.features["id"] = identity
        self.label_names = tuple(features[label].names) if label else ()

    def decoders(self) -> dict[str, Any]:
        """TFDS decoders that leave every image encoded."""
        return dict.fromkeys(self._images, import_tfds().decode.SkipDecoding())

    def record(self, example: dict[str, Any], number: int) -> dict[str, Any]:
        """One TFDS example (NumPy) -> record."""
        identity = example[self.features["id"]] if "id" in self.features else None
        record: dict[str, Any] = {
            "id": str(number) if identity is None else _text(identity),
            "image": bytes(example[self.features["image"]]),
        }
        if "captions" in self.features:
            record["captions"] = _captions(example[self.features["captions"]])
        if "label" in self.features:
            record["label"] = int(example[self.features["label"]])
        return record


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _captions(value: Any) -> list[str]:
    """A text, a list of texts, or a list of dicts (or a dict of lists) with a "text" (COCO) -> list of str."""
    if isinstance(value, dict):
        value = value.get("text", value.get("caption", []))
    if isinstance(value, bytes | str):
        return [_text(value)]
    return [_text(v.get("text", v.get("caption", "")) if isinstance(v, dict) else v) for v in value]


class TfdsSource:
    """Random access over one split of a TFDS set that is prepared as array_record."""

    def __init__(self, name: str, *, split: str, data_dir: str | None = None):
        """Opens the set; nothing is downloaded.

        Raises:
          UserError: if it is unknown, not prepared, prepared only as TFRecord, or has no such split or no image.
        """
        builder = open_builder(name, data_dir)
        base = split.split("[", 1)[0]
        if not all(part.split("[", 1)[0].strip() in builder.info.splits for part in split.split("+")):
            raise UserError(f"{name} has no split {base!r}.{suggest(base, builder.info.splits)}")
        self._examples = TfdsExamples(builder)
        self.features = self._examples.features
        try:
            self._data = builder.as_data_source(split=split, decoders=self._examples.decoders())
        except NotImplementedError as e:
            where = f" --data_dir={data_dir}" if data_dir else ""
            raise UserError(
                f"{name} is prepared as {builder.info.file_format.value}, which has no random access: pack it once with"
                f" imagegpt-jax pack --tfds={name} --split={split}{where} --output=DIR, then use"
                " array_record:DIR."
            ) from e
        except ValueError as e:
            raise UserError(f"{name} has no split {split!r} ({' '.join(str(e).split())[:200]}).") from e
        self.name = f"tfds:{builder.info.full_name},split={split}"
        self.label_names = self._examples.label_names
        facts = f"{self.name}:{len(self._data)}:{[s.shard_lengths for s in builder.info.splits.values()]}"
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:16]
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._data)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Reads examples by their numbers."""
        with self._lock:  # TFDS promises nothing about threads
            examples = self._data.__getitems__([int(i) for i in indices])
        return [self._examples.record(e, int(i)) for e, i in zip(examples, indices, strict=True)]
