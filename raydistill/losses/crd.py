"""Contrastive representation distillation with a bounded memory of negatives. Tian, Krishnan & Isola 2020, arXiv
1910.10699.

It differs from the authors' code in two points, so that its cost does not grow with the data set: the memory is a ring
of the latest embeddings, not a bank with a row for every image, and the positive pair shows the same view.

Shapes: B images of this worker, G images of the global batch, M places of the memory, K negatives, P dimensions of the
projection; embeddings are expected to have unit length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from raydistill.losses.task import UNLABELLED


@dataclass(frozen=True)
class Negatives:
    """The negatives of every image of the batch. `allowed_BK` excludes the embeddings of the image itself and of its
    class; `log_mean` is the log of the mean of exp(similarity / temperature) over the first negatives, one number for
    each of the two anchors."""

    student_KP: torch.Tensor
    teacher_KP: torch.Tensor
    allowed_BK: torch.Tensor
    log_mean: torch.Tensor


def crd(student_BP: torch.Tensor, teacher_BP: torch.Tensor, negatives: Negatives, temperature: float) -> torch.Tensor:
    """NCE with each network once as the anchor: mean over images of -log h(positive) - sum log(1 - h(negative)), added
    over both anchors.

    h = P / (P + K/N) is the posterior that a pair belongs together; P = exp(similarity / temperature) / Z with
    Z = N * mean over the first negatives (in the authors' code, positives too). N cancels, so
    h = sigmoid(similarity / temperature - log_mean - log K). Without negatives K is 1.
    """
    student_BP, teacher_BP = student_BP.float(), teacher_BP.float()
    sides = (
        (student_BP, teacher_BP.detach(), negatives.teacher_KP, negatives.log_mean[0]),
        (teacher_BP, student_BP.detach(), negatives.student_KP, negatives.log_mean[1]),
    )
    log_K_B = negatives.allowed_BK.sum(dim=1).clamp(min=1).log()
    total = student_BP.new_zeros(())
    for anchor_BP, positive_BP, negative_KP, log_mean in sides:
        offset_B = log_mean + log_K_B
        positive_B = (anchor_BP * positive_BP).sum(dim=1) / temperature - offset_B
        negative_BK = anchor_BP @ negative_KP.T / temperature - offset_B[:, None]
        apart_B = (functional.softplus(negative_BK) * negatives.allowed_BK).sum(dim=1)
        total = total + (functional.softplus(-positive_B) + apart_B).mean()
    return total


class ContrastiveMemory(nn.Module):
    """A ring of the latest embeddings of both networks, with the image and the label of each. All workers put in the
    same global batch and draw the same negatives, so their memories stay equal. Checkpoints hold its state."""

    def __init__(self, places: int, projection_dim: int) -> None:
        super().__init__()
        self.register_buffer("student_MP", torch.zeros(places, projection_dim))
        self.register_buffer("teacher_MP", torch.zeros(places, projection_dim))
        self.register_buffer("image_M", torch.full((places,), -1))
        self.register_buffer("label_M", torch.full((places,), UNLABELLED))
        self.register_buffer("put_in", torch.zeros((), dtype=torch.int64))
        self.register_buffer("log_mean", torch.full((2,), torch.nan))
        self._forget_what_is_known()
        self.register_load_state_dict_post_hook(ContrastiveMemory._forget_what_is_known)

    def _forget_what_is_known(self, *_: object) -> None:
        """What the host knows of the buffers, so that a step does not wait for the device to ask."""
        self._known_put_in: int | None = None
        self._is_measured = False

    def _num_put_in(self) -> int:
        if self._known_put_in is None:
            self._known_put_in = int(self.put_in)
        return self._known_put_in

    @torch.no_grad()
    def put(
        self, student_GP: torch.Tensor, teacher_GP: torch.Tensor, image_G: torch.Tensor, label_G: torch.Tensor
    ) -> None:
        """Replace the oldest entries by a global batch."""
        places = len(self.image_M)
        student_GP, teacher_GP, image_G, label_G = (x[-places:] for x in (student_GP, teacher_GP, image_G, label_G))
        before = self._num_put_in()
        at = (before + torch.arange(len(image_G), device=image_G.device)) % places
        self.student_MP[at], self.teacher_MP[at] = student_GP.float(), teacher_GP.float()
        self.image_M[at], self.label_M[at] = image_G, label_G
        self.put_in += len(image_G)
        self._known_put_in = before + len(image_G)

    @torch.no_grad()
    def draw(
        self,
        count: int,
        image_G: torch.Tensor,
        label_G: torch.Tensor,
        mine: torch.Tensor | slice,
        seed: list[int],
        temperature: float,
    ) -> Negatives:
        """Draw at most `count` entries without replacement for the rows `mine` of the batch, after its `put`."""
        filled = min(self._num_put_in(), len(self.image_M))
        drawn = torch.from_numpy(np.random.default_rng(seed).permutation(filled)[:count])
        at = drawn.pin_memory().to("cuda", non_blocking=True) if self.image_M.is_cuda else drawn
        other_GK = image_G[:, None] != self.image_M[at][None]
        same_class_GK = (label_G[:, None] == self.label_M[at][None]) & (label_G[:, None] != UNLABELLED)
        allowed_GK = other_GK & ~same_class_GK
        if not self._is_measured:
            if bool(self.log_mean.isnan().any()):
                self._measure(at, allowed_GK, image_G, temperature)
            self._is_measured = not bool(self.log_mean.isnan().any())
        log_mean = self.log_mean.nan_to_num(nan=0.0)  # a copy; 0 until there is a negative
        return Negatives(self.student_MP[at], self.teacher_MP[at], allowed_GK[mine], log_mean)

    def _measure(self, at: torch.Tensor, allowed_GK: torch.Tensor, image_G: torch.Tensor, temperature: float) -> None:
        """Compute the posterior's constant from the first global batch with negatives, the latest in the ring."""
        latest = (self._num_put_in() - torch.arange(min(len(image_G), len(self.image_M)), 0, -1)) % len(self.image_M)
        allowed = allowed_GK[-len(latest) :]
        if not bool(allowed.any()):
            return
        for side, (anchor, other) in enumerate(
            ((self.student_MP, self.teacher_MP), (self.teacher_MP, self.student_MP))
        ):
            similarity = anchor[latest.to(at.device)] @ other[at].T / temperature
            self.log_mean[side] = similarity[allowed].logsumexp(dim=0) - allowed.sum().log()
