"""Writes tests/golden/metrics.npz: what torch-fidelity makes of small inputs. Needs what `make parity` installs.

Look at the differences before you commit it.
"""

import pathlib
import tempfile
from typing import Any

import numpy as np
import reference_programs
from absl import app

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "metrics.npz"
SEED = 7
KID = {"kid_subsets": 10, "kid_subset_size": 20}
SPLITS = 5
# Of the long outputs of the network only every so manieth number is kept.
EVERY = {"pool": 16, "logits": 8, "spatial": 16}


def inputs() -> dict[str, np.ndarray]:
    """Features of two sets (`wide`: fewer rows than columns), logits, and two images."""
    rng = np.random.default_rng(SEED)

    def features(rows: int, columns: int, shift: float) -> np.ndarray:
        mix = np.random.default_rng(SEED + 1).normal(size=(columns, columns)) / columns**0.5
        scale = np.geomspace(1, 0.05, columns)
        return np.abs((rng.normal(size=(rows, columns)) * scale) @ mix + 0.3 + shift).astype(np.float32)

    return {
        "images": features(60, 24, 0.05),
        "references": features(50, 24, 0.0),
        "wide_images": features(22, 40, 0.05),
        "wide_references": features(25, 40, 0.0),
        "logits": rng.normal(0, 2, (60, 20)).astype(np.float32),
        "pixels": rng.integers(0, 256, (2, 9, 9, 3)).repeat(5, axis=1).repeat(5, axis=2).astype(np.uint8),
    }


def expected(given: dict[str, np.ndarray]) -> dict[str, Any]:
    """What torch-fidelity makes of them."""
    import torch

    programs = reference_programs.fidelity()
    metrics, scores = programs.torch_fidelity, {}
    for prefix in ("", "wide_"):
        one, other = (torch.from_numpy(given[f"{prefix}{name}"]) for name in ("images", "references"))
        pair = [metrics.metric_fid.fid_features_to_statistics(features) for features in (one, other)]
        scores[f"{prefix}fid"] = metrics.metric_fid.fid_statistics_to_metric(*pair, False)["frechet_inception_distance"]
        kid = metrics.metric_kid.kid_features_to_metric(one, other, verbose=False, **KID)
        scores[f"{prefix}kid"] = [kid[f"kernel_inception_distance_{part}"] for part in ("mean", "std")]
        manifold = metrics.metric_prc.prc_features_to_metric(one, other, verbose=False, save_cpu_ram=False)
        scores[f"{prefix}precision_recall"] = [manifold["precision"], manifold["recall"]]
    score = metrics.metric_isc.isc_features_to_metric(torch.from_numpy(given["logits"]), SPLITS, True, 2020)
    scores["is"] = [score["inception_score_mean"], score["inception_score_std"]]

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "inception.pth"
        reference_programs.save_torch(reference_programs.random_inception(SEED), path)
        network = reference_programs.torch_inception(programs, path)
    spatial = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, x, out: spatial.append(out))
    with torch.no_grad():
        pool, logits = network(torch.from_numpy(given["pixels"]).permute(0, 3, 1, 2))
    outputs = {"pool": pool, "logits": logits, "spatial": spatial[0][:, :7].permute(0, 2, 3, 1).flatten(1)}
    return scores | {name: value.numpy()[:, :: EVERY[name]] for name, value in outputs.items()}


def main(argv: list[str]) -> None:
    """Writes the file."""
    del argv
    given = inputs()
    arrays: dict[str, Any] = {f"expected_{name}": np.asarray(value) for name, value in expected(given).items()}
    np.savez_compressed(GOLDEN, **given, **arrays)


if __name__ == "__main__":
    app.run(main)
