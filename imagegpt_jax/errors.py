"""Errors that a person can put right: suggestions for what was meant, and tables of what settings may be."""

import dataclasses
import difflib
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

EXIT_FAILURE = 1
EXIT_USAGE = 2


class UserError(Exception):
    """Something the person at the keyboard can put right: its message is one sentence that says how."""


# Our name -> the same thing elsewhere: in papers, and in the flags and configs of other codebases.
SYNONYMS = {
    "accumulate": "gradient_accumulation gradient_accumulation_steps grad_accum accumulation_steps micro_batches",
    "b1": "beta1 adam_b1 adam_beta1 momentum",
    "b2": "beta2 adam_b2 adam_beta2",
    "batch_size": "bs batch global_batch_size train_batch_size",
    "best_of": "best_of_n n_candidates",
    "cfg_scale": "guidance_scale guidance cfg guidance_weight",
    "checkpoint": "ckpt ckpt_path model_path",
    "clip_norm": "grad_clip max_grad_norm gradient_clip gradient_clip_norm gradient_clipping clip",
    "code_dim": "codebook_dim embedding_dim codebook_embed_dim",
    "commitment_weight": "commitment_cost commitment_loss commitment_loss_beta beta",
    "config": "cfg_file config_file",
    "decoder": "model ckpt ckpt_path gpt_ckpt",
    "depth": "num_layers n_layer n_layers layers num_hidden_layers num_blocks",
    "dtype": "precision compute_dtype mixed_precision",
    "ema_decay": "ema ema_rate",
    "eval_every": "eval_interval eval_steps eval_freq",
    "every": "save_every save_steps save_interval ckpt_every checkpoint_every checkpoint_interval",
    "final_lr_ratio": "min_lr_ratio end_lr min_lr",
    "gan_start": "disc_start discriminator_start",
    "guidance_dropout": "class_dropout_prob cond_drop_prob label_dropout cfg_dropout text_dropout",
    "heads": "num_heads n_head n_heads num_attention_heads",
    "init_from": "pretrained resume init_checkpoint finetune_from restore_from",
    "kv_heads": "num_kv_heads n_kv_head n_kv_heads num_key_value_heads",
    "log_every": "log_interval logging_steps log_freq log_steps",
    "lpips": "perceptual_weight perceptual",
    "lr": "learning_rate base_lr peak_lr max_lr base_learning_rate",
    "max_length": "block_size max_seq_len max_position_embeddings context_length",
    "mlp_width": "intermediate_size mlp_dim d_ff ffn_dim hidden_features",
    "name": "optimizer optimiser",
    "negative": "negative_prompt",
    "num_codes": "codebook_size n_embed num_embeddings",
    "num_images": "num_samples n_samples samples n",
    "num_classes": "n_classes",
    "output": "output_dir outdir out_dir out save_dir",
    "remat": "gradient_checkpointing checkpoint_activations rematerialize activation_checkpointing",
    "res": "resolution image_size img_size size",
    "residual_dropout": "dropout resid_pdrop dropout_rate",
    "schedule": "lr_schedule scheduler lr_scheduler lr_scheduler_type",
    "steps": "num_steps max_steps train_steps num_train_steps total_steps iterations max_iters epochs num_epochs",
    "temperature": "temp",
    "text_length": "max_text_length cls_token_num text_len",
    "text_vocab_size": "vocab_size",
    "tokenizer": "vae vqgan vq_ckpt tokenizer_path",
    "train": "train_data dataset data_dir data_path train_dir image_folder",
    "validation": "val val_data eval_data valid val_dir",
    "warmup_steps": "warmup num_warmup_steps warmup_iters",
    "weight_decay": "wd decay",
    "width": "hidden_size d_model n_embd embed_dim dim hidden_dim emb_dim",
    "workdir": "output_dir output logdir log_dir run_dir save_dir outdir out",
}


def _same(word: str, names: Iterable[str]) -> str | None:
    """The name that is `word` but for its case and hyphens, or means the same elsewhere."""
    word, names = word.lower().replace("-", "_"), list(names)
    meant = [name for name in names if name.lower() == word]
    meant += [name for name in names if word in SYNONYMS.get(name, "").split()]
    return meant[0] if meant else None


def _nearest(word: str, names: Iterable[str]) -> str | None:
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return _same(word, by_lower.values()) or (by_lower[near[0]] if near else None)


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the known word that is meant by `word`, else the list of what is known."""
    names = sorted(str(k) for k in known)
    if near := _nearest(word, names):
        return f" Did you mean {near!r}?"
    return f" Known: {', '.join(names)}." if names else ""


def suggest_key(path: str, keys: Iterable[str]) -> str:
    """`suggest` for a key with dots, also where it stands elsewhere: 'optim.lr' for optim.learning_rate, or for lr."""
    keys = sorted(keys, key=lambda key: (key.count("."), len(key)))
    prefix, name = path[: path.rfind(".") + 1], path[path.rfind(".") + 1 :]
    inside = list(dict.fromkeys(key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)))
    elsewhere = [(key, key.rpartition(".")) for key in keys]

    def likeness(key: str) -> float:
        return difflib.SequenceMatcher(None, prefix, key).ratio()

    if (near := _same(name, inside)) is None and (same := _same(name, [last for _, (_, _, last) in elsewhere])):
        return f" Did you mean {max((key for key, (_, _, last) in elsewhere if last == same), key=likeness)!r}?"
    if near := near or _nearest(name, inside):
        return f" Did you mean {prefix + near!r}?"
    if not inside and (near := _nearest(path, keys)):
        return f" Did you mean {near!r}?"
    return suggest("", (prefix + other for other in inside) if inside else {key.split(".")[0] for key in keys})


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting may be, from `at_least` or `above`.

    Attributes:
      low: the least.
      high: the largest.
      without_low: whether `low` itself is left out.
      without_high: whether `high` itself is left out.
      whole: whether only whole numbers are meant.
      meaning: what a bound stands for, such as "0 keeps all".
    """

    low: float
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False
    whole: bool = False
    meaning: str = ""

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.without_low else value >= self.low
        below = value < self.high if self.without_high else value <= self.high
        return above and below and (not self.whole or int(value) == value)

    def __str__(self) -> str:
        text = "a whole number, " * self.whole + f"{'above' if self.without_low else 'at least'} {self.low}"
        if self.high < math.inf:
            text += f" and {'below' if self.without_high else 'at most'} {self.high}"
        return text + (f" ({self.meaning})" if self.meaning else "")


def at_least(
    low: float, meaning: str = "", *, at_most: float = math.inf, below: float | None = None, whole: bool = False
) -> Range:
    """Numbers from `low` on, up to `at_most` or to what is `below` a limit."""
    return Range(low, at_most if below is None else below, False, below is not None, whole, meaning)


def above(low: float, meaning: str = "", *, at_most: float = math.inf) -> Range:
    """Numbers larger than `low`, up to `at_most`."""
    return Range(low, at_most, without_low=True, meaning=meaning)


# A part of a whole.
SHARE = at_least(0, at_most=1)


def check_ranges(values: Any, ranges: Mapping[str, Range], where: str = "") -> None:
    """Checks that settings lie in their ranges.

    Args:
      values: a dataclass, or a config.
      ranges: name of a setting, with dots if it lies deeper, -> the numbers that it may be.
      where: what stands before the names in an error, such as "--config.optim.".

    Raises:
      UserError: for the first that does not.
    """
    for name, allowed in ranges.items():
        value = functools.reduce(getattr, name.split("."), values)
        if value not in allowed:
            raise UserError(f"{where}{name}={value} must be {allowed}.")
