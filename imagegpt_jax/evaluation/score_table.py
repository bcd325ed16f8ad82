"""How scores of checkpoints are shown: the ones to look at, each beside its control."""

import dataclasses

from imagegpt_jax.evaluation.checkpoint_data import Scores


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the printed table: a score and its control, by their keys."""

    name: str
    key: str
    control: str = ""
    control_key: str = ""


TABLE = (
    Line("reconstruction PSNR, dB", "tokenizer/val_psnr", "mean colour", "tokenizer/val_psnr_mean_color"),
    Line("rFID", "reconstruction/fid"),
    Line("KID of reconstructions", "reconstruction/kid"),
    Line("codebook usage", "tokenizer/codebook_usage"),
    Line("codebook perplexity", "tokenizer/codebook_perplexity"),
    Line("image bits per token", "decoder/val_image_bits_per_token", "unigram", "decoder/unigram_image_bits_per_token"),
    Line("text bits per token", "decoder/val_text_bits_per_token", "unigram", "decoder/unigram_text_bits_per_token"),
    Line("KID of samples", "samples/kid", "real pictures", "samples/kid_real"),
    Line("top-1 retrieval", "generation/retrieval_top1", "prompts shuffled", "generation/retrieval_top1_shuffled"),
)


def table(scores: Scores) -> str:
    """The scores that are there, each with its control beside it."""
    lines = []
    for line in TABLE:
        if line.key in scores:
            text = f"{line.name:<26}{scores[line.key]:>10.4f}"
            lines.append(text + (f"   {line.control:>16}{scores[line.control_key]:>10.4f}" if line.control else ""))
    return "\n".join(lines)


def rows(scores: Scores) -> list[tuple[str, str, str, str]]:
    """As `table`, for a page: name, score, name of the control, control; and the metrics of sets that are not in it."""
    cells, lines = [], list(TABLE)
    for key, value in scores.items():
        of_sets = key.startswith(("reconstruction/", "samples/")) and isinstance(value, float)
        if of_sets and not key.endswith(("_low", "_high", "_real")) and key not in {line.key for line in TABLE}:
            control = f"{key}_real" if f"{key}_real" in scores else ""
            lines.append(Line(key, key, "real pictures" if control else "", control))
    for line in lines:
        if line.key in scores:
            control = f"{scores[line.control_key]:.6g}" if line.control else ""
            cells.append((line.name, f"{scores[line.key]:.6g}", line.control, control))
    return cells
