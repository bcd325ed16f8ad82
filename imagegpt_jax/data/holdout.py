"""Which records are kept aside for validation where no validation set is named: a share of the training set, by name.

A record's side follows from its name alone. So pictures may be added to a folder, and the token shards of a folder are
split as the folder is.
"""

import hashlib
import re
from typing import Any

from imagegpt_jax.config import Config
from imagegpt_jax.data.interface import Source
from imagegpt_jax.data.subset import Subset
from imagegpt_jax.errors import UserError, above, check_ranges

SUBSETS = ("train", "validation")
# Kind -> what stands in the specs of both splits, of sets that have their own.
_OWN = {"emoji": ("emoji:train", "emoji:validation"), "tfds": (",split=train", ",split=validation")}


def resolve(config: Config) -> Config:
    """The config, with specs of both splits that any binary opens; a copy if `config.data.validation` is "".

    Raises:
      UserError: for a `config.data.validation_share` that is none.
    """
    if "validation" not in config.data or config.data.validation != "":  # a user's task may have none
        return config
    check_ranges(config, {"data.validation_share": above(0, at_most=0.5)}, "--config.")
    config = config.copy_and_resolve_references()
    share, parts = config.data.validation_share, re.split(r"(\s\+\s)", config.data.train)
    for split in SUBSETS:
        config.data[split] = "".join(part if i % 2 else _spec(part, split, share) for i, part in enumerate(parts))
    return config


def _spec(part: str, split: str, share: float) -> str:
    kind = part.rpartition("*")[2].strip().partition(":")[0]
    for train, validation in (_OWN.get(kind, ("", "")), (",subset=train", ",subset=validation")):
        if train and train in part:
            return part.replace(train, validation) if split == "validation" else part
    return f"{part},subset={split},validation_share={share:g}"


def take(source: Source, subset: str, share: float, name: str) -> Source:
    """One side of a source: of each name a hash decides, and each side gets at least one record.

    Raises:
      UserError: if there is no such subset, or the source has fewer than two records.
    """
    if subset not in SUBSETS or not 0 < share < 1:
        raise UserError(f"data {name!r}: subset is train or validation, and validation_share between 0 and 1.")
    if len(source) < 2:
        raise UserError(f"{source.name} has {len(source)} record, none to keep aside: give --config.data.validation.")
    names: Any = getattr(source, "names", None) or map(str, range(len(source)))
    hashes = [hashlib.sha256(name.encode("utf-8", "replace")).digest()[:8] for name in names]
    aside = [int.from_bytes(digest, "big") < share * 2**64 for digest in hashes]
    aside[min(range(len(hashes)), key=hashes.__getitem__)] = True
    aside[max(range(len(hashes)), key=hashes.__getitem__)] = False
    return Subset(source, [i for i, kept in enumerate(aside) if kept == (subset == "validation")], name)
