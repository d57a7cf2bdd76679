"""What compact soft targets change in a head's answers, beside principal components alone.

    python -m benchmarks.compact_targets WORKSPACE/teach-… WORKSPACE/adapt-…

The projection is fitted to the views of four of five images, and measured on those of the others. The directory holds
full features.
"""

from __future__ import annotations

import sys
from glob import glob

import numpy as np
from scipy.special import softmax

from raydistill.data.compact import Projection, dequantised, fit_projection, quantised
from raydistill.data.targets import read_all_targets
from raydistill.models.heads import LinearHead, load_head, projection_loss


def principal(features_ND: np.ndarray, share: float) -> Projection:
    """The fewest principal components with this share of the variance."""
    mean_D = features_ND.mean(axis=0)
    variances_D, vectors_DD = np.linalg.eigh(np.cov(features_ND.T.astype(np.float64)))
    held_D = np.cumsum(variances_D[::-1])
    kept = int(np.searchsorted(held_D, share * held_D[-1])) + 1
    components_JD = np.ascontiguousarray(vectors_DD[:, ::-1][:, :kept].T, np.float32)
    return Projection(mean_D, components_JD, np.sqrt(variances_D[::-1][:kept]).astype(np.float32), len(features_ND))


def distance(head: LinearHead, projection: Projection, features_ND: np.ndarray) -> float:
    """Mean KL divergence in nats from the probabilities of full features to those of compact ones."""
    coordinates_1NJ = projection.project(features_ND[None])
    stored_NJ = dequantised(*quantised(coordinates_1NJ, projection.deviations_J), projection.deviations_J)[0]
    full_NC, compact_NC = softmax(head.logits(features_ND), 1), softmax(head.of(projection).logits(stored_NJ), 1)
    return float((full_NC * (np.log(full_NC + 1e-12) - np.log(compact_NC + 1e-12))).sum(axis=1).mean())


def main(taught: str, adapted: str) -> None:
    features_KRD = np.concatenate([read_all_targets(file)[1] for file in sorted(glob(f"{taught}/train-*"))], axis=1)
    head, is_seen_R = load_head(adapted), np.arange(features_KRD.shape[1]) % 5 > 0
    seen_KRD, unseen_ND = features_KRD[:, is_seen_R], np.concatenate(features_KRD[:, ~is_seen_R]).astype(np.float32)
    print(f"{len(unseen_ND):,} views of other images; full: {2 * unseen_ND.shape[1]:,} bytes a view")
    ways = {"compact": fit_projection([seen_KRD], head.weight_CD)}
    for share in (0.8, 0.9, 0.99):
        ways[f"principal components, {share:.0%}"] = principal(np.concatenate(seen_KRD).astype(np.float32), share)
    for name, projection in ways.items():
        equal, difference = projection_loss(head, projection, unseen_ND)
        size, divergence = len(projection.deviations_J) + 2, distance(head, projection, unseen_ND)
        print(f"{name:<26} {size:>6,} bytes  {equal / len(unseen_ND):.4f} equal  {difference:.3f}  KL {divergence:.5f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
