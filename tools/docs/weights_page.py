"""The page docs/weights.md: the matrix of what is read and written.

The parity tests write the page: what a test has shown of a layout stands in its row (`CHECKS`), and what none has,
does not.
"""

from collections.abc import Iterable, Mapping

from imagegpt_jax.convert.formats import FORMATS, TOKENIZER

# What a test can have shown, in the order of the page.
CHECKS = {
    "codes": "codes identical",
    "pixels": "pixels within 1e-4",
    "logits": "logits within 1e-5",
    "greedy": "greedy continuations identical",
    "whole": "found within a whole model",
    "bits": "round trip gives the same bits",
}
_PAGE = """# Weights of published systems

This page is written by `make parity`: each ✓ is a test that compared with the reference at random weights, and passed.

```python
tok = ig.load_tokenizer("folder or file")  # recognised by content
gpt = ig.load_decoder("folder or file")
```

```sh
python -m imagegpt_jax.convert SOURCE TARGET               # to a portable folder
python -m imagegpt_jax.convert PORTABLE TARGET             # back to the layout it came from
python -m imagegpt_jax.convert SOURCE TARGET --to=janus    # to another layout of the same network
```

{tables}
PyTorch is not needed for any of this. Arrays keep their dtype: weights in bfloat16 or float16 are computed with in
float32, as rounded as they are. A layout of another system is written only if all that the network is has a place in
it; else the error names what has none.

Good to know:

- **Janus.** `transformers` leaves LlamaGen's normalisation out when it encodes, and has it when it decodes. Here both
  have it, as the network was trained: codes can differ from `JanusVQVAE.encode`, pixels do not.
- **Chameleon** in `transformers` has no decoder: such a tokenizer only encodes.
- **Emu3** makes one grid of codes out of several frames. A picture is a film of equal frames.
- **LlamaGen's** weights do not tell the number of heads: it is known for the published sizes, else give `heads=`. Ids
  are the codes, then the classes, then "no class"; `gpt.logits(ids)` begins with the class and gives scores of the
  codes. Prefix tokens keep no queries and keys, as in LlamaGen's code (`GPTConfig.rope_zero_prefix`).
  Text-conditional models take features: `gpt.logits(ids, features=(features_BPE, mask_BP))`.
- **ImageGPT** is two things in one folder: a decoder, and 512 colours that `load_tokenizer` finds in
  `preprocessor_config.json`.
  Its attention divides by the root of the heads' width, as OpenAI trained it. `transformers` 5.17 rounds that root down
  to an integer first, which changes the numbers of M and L (heads of 128 and 96), not of S (64); 5.23 does not.
- **dalle-mini's VQGAN** is read as taming-transformers defines it. The Flax code of dalle-mini applies all attention
  blocks of a level after each of its residual blocks; where a level has several, its codes differ a little.
- The pixels of **dalle-mini's** and **MaskGIT's** networks lie in [0, 1]. Here images are float in [-1, 1] or uint8 for
  all tokenizers, and mapped.
- A language model without its head (`GPT2Model`) is read if the head is tied to its embedding.

{memory}"""


def page(shown: Mapping[str, Iterable[str]], memory: Mapping[str, Mapping[str, float]]) -> str:
    """The page.

    Args:
      shown: layout -> keys of `CHECKS` that a test has shown of it.
      memory: what tools/benchmarks/import_memory.py printed, by size and dtype.
    """
    tables = []
    for kind in (TOKENIZER, "decoder"):
        keys = [k for k in CHECKS if any(k in set(shown.get(n, ())) for n, f in FORMATS.items() if f.kind == kind)]
        header = ["layout", kind, "reads", "writes", *(CHECKS[k] for k in keys)]
        lines = [header, ["---"] * len(header)]
        for name, entry in FORMATS.items():
            if entry.kind == kind:
                marks = ["✓" if key in set(shown.get(name, ())) else "" for key in keys]
                lines.append([f"`{name}`", entry.title, entry.files, entry.writes, *marks])
        tables.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return _PAGE.format(tables="\n\n".join(tables) + "\n", memory=_memory(memory))


def _memory(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The table of the memory that an import takes."""
    lines = [
        "## Memory",
        "",
        "Most memory that a process held which did nothing else, as a multiple of the file"
        " (`python tools/benchmarks/import_memory.py --size=3B --dtype=float32`).",
        "",
        "| LlamaGen | file | `load_decoder` | `convert` |",
        "|---|---|---|---|",
    ]
    for name, f in figures.items():
        lines.append(f"| {name} | {f['file_bytes'] / 1e9:.1f} GB | {f['load_decoder']:.2f} x | {f['convert']:.2f} x |")
    return "\n".join(lines) + "\n"
