"""Folders scored by the binary against torch-fidelity's network and metrics, fewer images than features."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def expected(fidelity, inception, pictures):
    """Scores of torch-fidelity: 16 dark pictures against 12 pale ones."""
    with torch.no_grad():
        chosen = torch.from_numpy(np.concatenate([pictures[:16], pictures[32:44]])).permute(0, 3, 1, 2)
        pool, logits = inception.network(chosen)
    metrics, one, other = fidelity.torch_fidelity, pool[:16], pool[16:]
    pair = [metrics.metric_fid.fid_features_to_statistics(features) for features in (one, other)]
    kid = metrics.metric_kid.kid_features_to_metric(one, other, kid_subsets=20, kid_subset_size=10, verbose=False)
    manifold = metrics.metric_prc.prc_features_to_metric(one, other, verbose=False, save_cpu_ram=False)
    return {
        "fid": metrics.metric_fid.fid_statistics_to_metric(*pair, False)["frechet_inception_distance"],
        "is": metrics.metric_isc.isc_features_to_metric(logits[:16], 10, True, 2020)["inception_score_mean"],
        "kid": kid["kernel_inception_distance_mean"],
        "precision": manifold["precision"],
        "recall": manifold["recall"],
    }


def test_scores_of_folders(expected, inception, pictures, binary, tmp_path):
    for name, chosen in (("images", pictures[:16]), ("reference", pictures[32:44])):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(chosen):
            Image.fromarray(picture).save(tmp_path / name / f"{i:02d}.png")
    binary(
        "evaluate",
        f"--images={tmp_path / 'images'}",
        f"--reference={tmp_path / 'reference'}",
        "--protocol=torch_fidelity",
        f"--metrics={','.join(expected)}",
        "--kid_subsets=20",
        "--kid_subset_size=10",
        f"--feature_weights={inception.path}",
        f"--output={tmp_path / 'm.json'}",
    ).main()
    scores = json.loads((tmp_path / "m.json").read_text())
    for name, value in expected.items():
        tolerance = 1e-4 if name in ("fid", "kid") else 1e-3
        assert scores[name]["value"] == pytest.approx(value, rel=tolerance), name
        assert scores[name]["n"] == 16
