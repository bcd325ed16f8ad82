"""How scores of checkpoints are shown: the ones to look at, each beside its control."""

from imagegpt_jax.evaluation.checkpoint_data import Scores

# (what a line is called, key of its score, what the control is called, its key).
TABLE = (
    ("reconstruction PSNR, dB", "tokenizer/val_psnr", "mean colour", "tokenizer/val_psnr_mean_color"),
    ("rFID", "reconstruction/fid", "", ""),
    ("KID of reconstructions", "reconstruction/kid", "", ""),
    ("codebook usage", "tokenizer/codebook_usage", "", ""),
    ("codebook perplexity", "tokenizer/codebook_perplexity", "", ""),
    ("image bits per token", "decoder/val_image_bits_per_token", "unigram", "decoder/unigram_image_bits_per_token"),
    ("text bits per token", "decoder/val_text_bits_per_token", "unigram", "decoder/unigram_text_bits_per_token"),
    ("KID of samples", "samples/kid", "real pictures", "samples/kid_real"),
    ("top-1 retrieval", "generation/retrieval_top1", "prompts shuffled", "generation/retrieval_top1_shuffled"),
)


def table(scores: Scores) -> str:
    """The scores that are there, each with its control beside it."""
    return "\n".join(
        f"{name:<26}{scores[key]:>10.4f}" + (f"   {control:>16}{scores[control_key]:>10.4f}" if control else "")
        for name, key, control, control_key in TABLE
        if key in scores
    )


def rows(scores: Scores) -> list[tuple[str, str, str, str]]:
    """As `table`, for a page: name, score, name of the control, control; and the metrics of sets that are not in it."""
    lines = [line for line in TABLE if line[1] in scores]
    for key, value in scores.items():
        of_sets = key.startswith(("reconstruction/", "samples/")) and isinstance(value, float)
        if of_sets and not key.endswith(("_low", "_high", "_real")) and key not in [line[1] for line in TABLE]:
            control = f"{key}_real" if f"{key}_real" in scores else ""
            lines.append((key, key, "real pictures" if control else "", control))
    shown = {key: f"{value:.6g}" for key, value in scores.items() if not isinstance(value, str)}
    return [(name, shown[key], control, shown.get(control_key, "")) for name, key, control, control_key in lines]
