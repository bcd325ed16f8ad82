"""Writes tests/golden/weights: tiny published weights and what their references compute, so that tests need no PyTorch.

Run it where the extra `parity` is installed: `python tools/golden/make_golden_weights.py`. Then look at the difference.
"""

import argparse
import pathlib
import sys

import numpy as np
import torch
import transformers
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "golden" / "weights"
IDS = np.arange(22).reshape(2, 11) * 7 % 16


def main() -> None:
    """Writes everything."""
    sys.path.insert(0, str(ROOT / "tests" / "parity"))
    import references

    torch.manual_seed(0)
    expected = {"ids": IDS}
    small = {"vocab_size": 17, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    decoders = {
        "llama": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0,
                "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            )
        ),
        "gpt2": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**small, bos_token_id=0, eos_token_id=0, scale_attn_by_inverse_layer_idx=True)
        ),
        "imagegpt": transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**small)),
    }  # fmt: skip
    with torch.no_grad():
        for name, model in decoders.items():
            references.randomize(model, 0.2).save_pretrained(FOLDER / name)
            expected[name] = model(torch.tensor(IDS)).logits.numpy()
        colours = np.random.default_rng(0).uniform(-1, 1, (16, 3)).round(4)
        ImageGPTImageProcessorPil(clusters=colours, size={"height": 4, "width": 4}).save_pretrained(FOLDER / "imagegpt")

        llamagen = references.LlamaGen(
            codes=16, width=16, depth=2, heads=2, kv_heads=2, mlp_width=24, classes=3, grid=4
        )
        references.randomize(llamagen, 0.2)
        # As a training checkpoint has it: the weights among other things, and arguments that are no tensors.
        torch.save(
            {"model": llamagen.state_dict(), "optimizer": {"state": {}}, "steps": 7, "args": argparse.Namespace(a=1)},
            FOLDER / "llamagen.pt",
        )
        expected["llamagen"] = llamagen(llamagen.condition(torch.tensor([1, 3])), torch.tensor(IDS[:, 1:])).numpy()

        janus = JanusVQVAE(
            JanusVQVAEConfig(
                base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, latent_channels=8, embed_dim=4,
                num_embeddings=16, num_patches=4,
            )
        )  # fmt: skip
        references.randomize(janus, 0.05).to(torch.float16).save_pretrained(FOLDER / "janus")
        janus = JanusVQVAE.from_pretrained(FOLDER / "janus", dtype=torch.float32)
        images = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
        nchw = torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        z = janus.quant_conv(janus.encoder(nchw)).permute(0, 2, 3, 1).reshape(-1, 4).double()
        normalize = torch.nn.functional.normalize
        distances = torch.cdist(normalize(z, dim=-1), normalize(janus.quantize.embedding.weight.double(), dim=-1))
        expected |= {"images": images, "codes": distances.argmin(-1).reshape(2, -1).numpy()}
        expected["pixels"] = janus.decode(torch.tensor(IDS.ravel()[:16].reshape(1, 16))).permute(0, 2, 3, 1).numpy()
    np.savez(FOLDER / "expected.npz", **expected)


if __name__ == "__main__":
    main()
