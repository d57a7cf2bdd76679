"""The modules that only training uses: a student's projection onto the unit sphere, and its adapter to the teacher.

Shapes: B images, D features, P dimensions of the projection.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class ProjectionHead(nn.Module):
    """A trained map from features to the unit sphere, in one of the four forms of the paper's code: `linear`;
    `two_layer` as in MoCo v2 (arXiv 2003.04297); `simclr` with batch norm (2002.05709); `simclrv2` with a third
    layer (2006.10029). The hidden layers are as wide as the features."""

    def __init__(self, kind: str, num_features: int, projection_dim: int) -> None:
        super().__init__()
        if kind == "linear":
            layers: list[nn.Module] = [nn.Linear(num_features, projection_dim)]
        elif kind == "two_layer":
            layers = [
                nn.Linear(num_features, num_features),
                nn.ReLU(inplace=True),
                nn.Linear(num_features, projection_dim),
            ]
        else:
            num_hidden = {"simclr": 1, "simclrv2": 2}[kind]
            layers = []
            for _ in range(num_hidden):
                layers += [nn.Linear(num_features, num_features, bias=False), nn.BatchNorm1d(num_features)]
                layers += [nn.ReLU(inplace=True)]
            layers += [nn.Linear(num_features, projection_dim, bias=False)]
            layers += [nn.BatchNorm1d(projection_dim, affine=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features_BD: torch.Tensor) -> torch.Tensor:
        projected_BP = self.layers(features_BD)
        # The length divides the gradient, and the dtype has to hold it.
        return functional.normalize(projected_BP.float(), dim=1, eps=torch.finfo(projected_BP.dtype).eps)


class Adapter(nn.Sequential):
    """A trained map from the student's features to the teacher's, for losses that compare the two. The hidden layer of
    `two_layer` is half as wide as both together, as in SRRL's code, but no ReLU follows: features may be negative."""

    def __init__(self, kind: str, num_features: int, teacher_features: int) -> None:
        hidden = (num_features + teacher_features) // 2
        if kind == "linear":
            super().__init__(nn.Linear(num_features, teacher_features))
        else:
            super().__init__(
                nn.Linear(num_features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, teacher_features)
            )
