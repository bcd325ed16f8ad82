"""CLIP and DINOv2 against `transformers`, EfficientNet-Lite0 against its definition in torch.nn, at random weights."""

import jax
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imagegpt_jax.models.pretrained import clip, dinov2, efficientnet

pytestmark = pytest.mark.parity


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert theirs.std() > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def lively(module):
    """Random weights with which nothing is near zero, biases and norms included."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.08)
        else:
            nn.init.normal_(parameter, mean=0.7 if "norm" in name or "lambda" in name else 0.0, std=0.2)
    return module.eval()


def sizes(width, layers):
    """Of one tower; published ones differ in these, in heads of 64 and in MLPs four times as wide."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 64,
        "num_hidden_layers": layers,
    }


# A small one, and ViT-B/32 and ViT-L/14 of one layer each: (image tower, image side, patch, text tower, embedding).
CLIPS = {
    "small": (sizes(128, 3), 32, 8, sizes(64, 2), 24),
    "B/32": (sizes(768, 1), 224, 32, sizes(512, 1), 512),
    "L/14": (sizes(1024, 1), 224, 14, sizes(768, 1), 768),
}


@pytest.fixture(scope="module", params=CLIPS)
def pair(request, tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    image, side, patch, text, embedding = CLIPS[request.param]
    words = {"vocab_size": 60, "max_position_embeddings": 12, "eos_token_id": 59, "bos_token_id": 58}
    config = CLIPConfig(
        text_config={**text, **words},
        vision_config={**image, "image_size": side, "patch_size": patch},
        projection_dim=embedding,
    )
    reference = lively(CLIPModel(config))
    folder = tmp_path_factory.mktemp("clip")
    reference.save_pretrained(folder)
    return clip.CLIP.load(folder), reference, side


def test_images_of_clip(pair):
    ours, reference, side = pair
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3)).astype(np.uint8)
    pixels = torch.from_numpy((images.astype(np.float32) / 255 - clip.MEAN) / clip.DEVIATION).permute(0, 3, 1, 2)
    vision = reference.vision_model(pixel_values=pixels).pooler_output
    assert (ours.size, ours.length) == (side, 12)
    close(jax.jit(type(ours).embed_images)(ours, images), reference.visual_projection(vision))


def test_texts_of_clip(pair):
    ours, reference, _ = pair
    tokens = np.array([[58, 4, 9, 59, 59, 59, 59], [58, 11, 3, 8, 20, 31, 59]])
    text = reference.text_model(input_ids=torch.from_numpy(tokens)).pooler_output
    close(jax.jit(type(ours).embed_texts)(ours, tokens), reference.text_projection(text))


# Small ones, and ViT-B/14 and ViT-L/14 of one layer at the side that FD-DINOv2 takes: (tower, trained side, side).
DINOS = {
    "small": (sizes(128, 3), 70, 56),
    "small, cut": (sizes(128, 3), 70, 42),
    "B/14": (sizes(768, 1), 518, dinov2.SIZE),
    "L/14": (sizes(1024, 1), 518, dinov2.SIZE),
}


@pytest.mark.parametrize("name", DINOS)
def test_dinov2(tmp_path, name):
    from transformers import Dinov2Config, Dinov2Model

    tower, trained, side = DINOS[name]
    reference = lively(Dinov2Model(Dinov2Config(**tower, mlp_ratio=4, image_size=trained, patch_size=14)))
    reference.save_pretrained(tmp_path)
    ours = dinov2.DINOv2.load(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3)).astype(np.uint8)
    pixels = torch.from_numpy((images.astype(np.float32) / 255 - dinov2.MEAN) / dinov2.DEVIATION).permute(0, 3, 1, 2)
    close(jax.jit(type(ours).__call__)(ours, images), reference(pixel_values=pixels).pooler_output)


class Reference(nn.Module):
    """EfficientNet-Lite0 by the names of the published file."""

    def __init__(self):
        super().__init__()
        self.units, width = nn.ModuleDict(), 32
        self.add("_conv_stem", "_bn0", 3, 32, 3, 2)
        self.plan = []
        for repeats, kernel, stride, expand, out in [
            (1, 3, 1, 1, 16),
            (2, 3, 2, 6, 24),
            (2, 5, 2, 6, 40),
            (3, 3, 2, 6, 80),
            (3, 5, 1, 6, 112),
            (4, 5, 2, 6, 192),
            (1, 3, 1, 6, 320),
        ]:
            for i in range(repeats):
                block, step, wide = f"_blocks.{len(self.plan)}.", stride if i == 0 else 1, width * expand
                if expand > 1:
                    self.add(f"{block}_expand_conv", f"{block}_bn0", width, wide, 1, 1)
                self.add(f"{block}_depthwise_conv", f"{block}_bn1", wide, wide, kernel, step, wide)
                self.add(f"{block}_project_conv", f"{block}_bn2", wide, out, 1, 1)
                self.plan.append((block, expand > 1, step == 1 and width == out))
                width = out
        self.add("_conv_head", "_bn1", 320, 1280, 1, 1)

    def add(self, conv, norm, c_in, c_out, size, stride, groups=1):
        layer = nn.Conv2d(c_in, c_out, size, stride, bias=False, groups=groups)
        nn.init.normal_(layer.weight, std=(2 / (size * size * c_in / groups)) ** 0.5)
        batch = nn.BatchNorm2d(c_out, eps=1e-3)
        batch.running_mean.normal_(0, 0.1)
        batch.running_var.uniform_(0.8, 1.2)
        self.units[conv.replace(".", "/")] = nn.ModuleList([layer, batch])
        self.names = {**getattr(self, "names", {}), conv: norm}

    def run(self, conv, x, relu=True):
        layer, batch = self.units[conv.replace(".", "/")]
        padding = []
        for side in (x.shape[3], x.shape[2]):  # TensorFlow's "SAME": the odd zero comes last
            size, stride = layer.kernel_size[0], layer.stride[0]
            total = max((-(-side // stride) - 1) * stride + size - side, 0)
            padding += [total // 2, total - total // 2]
        y = batch(layer(F.pad(x, padding)))
        return F.relu6(y) if relu else y

    def forward(self, x):
        x = self.run("_conv_stem", (x - 127) / 128)
        for block, expand, residual in self.plan:
            y = self.run(f"{block}_expand_conv", x) if expand else x
            y = self.run(f"{block}_project_conv", self.run(f"{block}_depthwise_conv", y), relu=False)
            x = x + y if residual else y
        return self.run("_conv_head", x).mean((2, 3))

    def arrays(self):
        results = {}
        for conv, norm in self.names.items():
            layer, batch = self.units[conv.replace(".", "/")]
            results[f"{conv}.weight"] = layer.weight.detach()
            results |= {f"{norm}.{name}": value.detach() for name, value in batch.state_dict().items()}
        return results | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


@pytest.mark.parametrize("legacy", [True, False])
def test_efficientnet(tmp_path, legacy):
    torch.manual_seed(0)
    reference = Reference().eval()
    path = tmp_path / "lite0.pth"
    torch.save(reference.arrays(), path, _use_new_zipfile_serialization=not legacy)
    images = np.random.default_rng(0).integers(0, 256, (2, 97, 64, 3)).astype(np.uint8)
    expected = reference(torch.from_numpy(images).permute(0, 3, 1, 2).float())
    close(jax.jit(lambda m, x: m(x))(efficientnet.EfficientNetLite0.load(path), images), expected)
