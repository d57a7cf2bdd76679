"""InfoNCE between the two networks, with the other images of the batch as negatives. Van den Oord, Li & Vinyals 2018,
arXiv 1807.03748, in the symmetric form of CLIP (arXiv 2103.00020).

Shapes: B images, P dimensions of the projection; rows are expected to have unit length.
"""

import torch
from torch.nn import functional


def info_nce(student_BP: torch.Tensor, teacher_BP: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean cross-entropy, in nats, of finding each student embedding's own teacher embedding in the batch by cosine
    similarity over `temperature`, and each teacher embedding's student embedding; 0 for a single image, log B at
    chance."""
    similarity_BB = student_BP.float() @ teacher_BP.float().T / temperature
    own = torch.arange(len(similarity_BB), device=similarity_BB.device)
    there, back = functional.cross_entropy(similarity_BB, own), functional.cross_entropy(similarity_BB.T, own)
    return (there + back) / 2
