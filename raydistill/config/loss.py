"""loss: the terms, their weights and their temperatures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raydistill.config.section import Count, Positive, Section, Weight


class Loss(Section):
    """A weighted sum. Each `*_weight` is a number, or [first, last] for one that changes linearly over training."""

    task_weight: Weight | tuple[Weight, Weight] = 1.0
    """Cross-entropy with the labels; unlabelled images do not take part in it."""
    class_weights: Literal["balanced"] | dict[str, Positive] | None = None
    """Weights of the classes in `task`, as {rare: 5}; a class that is not named has 1. `balanced`: N / (K * n_c) of N
    labelled train images, n_c of them in class c, in K classes that have any (scikit-learn). Generated images are not
    counted, but weighed. null: all images weigh the same. The teacher's probe has teacher.class_balanced of its own."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each label in `task` that is spread evenly over all classes (Szegedy et al. 2016)."""
    kd_weight: Weight | tuple[Weight, Weight] = 1.0
    """Soft-target KL divergence (Hinton et al. 2015)."""
    temperature: Positive = 4.0
    """Softens both distributions of the terms on logits: kd, dkd, dist and standardised_kd."""
    alignment_weight: Weight | tuple[Weight, Weight] = 1.0
    """Distance of the two networks' projected features of one view (Wang & Isola 2020)."""
    uniformity_weight: Weight | tuple[Weight, Weight] = 1.0
    """Spread of the projected features over the unit sphere, averaged over both networks."""
    alignment_alpha: Positive = 2.0
    """Power of the distance in the alignment term."""
    uniformity_t: Positive = 2.0
    """Sharpness of the Gaussian potential in the uniformity term."""
    info_nce_weight: Weight | tuple[Weight, Weight] = 0.0
    """InfoNCE between student and teacher, the other images of a worker's batch as negatives (van den Oord 2018)."""
    crd_weight: Weight | tuple[Weight, Weight] = 0.0
    """Contrastive representation distillation with a memory of negatives (Tian et al. 2020)."""
    contrastive_temperature: Positive = 0.07
    """Divides the cosine similarities of info_nce and crd."""
    crd_negatives: Count = 4096
    """Negatives in a step of crd, at most."""
    crd_memory: Count = 16384
    """Embeddings that crd remembers of each network; the oldest make room."""
    srrl_weight: Weight | tuple[Weight, Weight] = 0.0
    """Features and what the teacher's head makes of them (SRRL, Yang et al. 2021)."""
    dkd_weight: Weight | tuple[Weight, Weight] = 0.0
    """Decoupled KD (Zhao et al. 2022)."""
    dkd_target_factor: Weight = 1.0
    """Of the part about the target class in dkd (the paper's alpha)."""
    dkd_other_factor: Weight = 8.0
    """Of the part about the other classes in dkd (the paper's beta)."""
    dist_weight: Weight | tuple[Weight, Weight] = 0.0
    """Correlations within images and within classes (DIST, Huang et al. 2022)."""
    standardised_kd_weight: Weight | tuple[Weight, Weight] = 0.0
    """Soft-target KL of standardised logits (Sun et al. 2024)."""
    feature_weight: Weight | tuple[Weight, Weight] = 0.0
    """Adapted student features against the teacher's (Romero et al. 2015)."""
    feature_distance: Literal["mse", "cosine"] = "mse"
    """How far apart features are in the feature term."""
    rkd_distance_weight: Weight | tuple[Weight, Weight] = 0.0
    """Relative distances of pairs of images (RKD, Park et al. 2019, who use 25)."""
    rkd_angle_weight: Weight | tuple[Weight, Weight] = 0.0
    """Angles of triples of images (RKD, who use 50)."""
    projection_head: Literal["linear", "two_layer", "simclr", "simclrv2"] = "simclr"
    """The trained map to the unit sphere, on both sides, for alignment, uniformity, info_nce and crd. `simclr` has
    batch norm: where the uniformity term stays near 0 for long, all embeddings lie on one point, and it helps."""
    projection_dim: Annotated[int, Field(ge=2)] = 128
    """Dimension of the unit sphere that both projection heads map to."""
    adapter: Literal["linear", "two_layer"] = "two_layer"
    """The trained map from the student's features to the teacher's, for srrl and feature."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms whose weight is above 0 at some time, in the order of declaration."""
        weights = self.model_dump(include={key for key in Loss.model_fields if key.endswith("_weight")})
        heaviest = {key: max(w) if isinstance(w, list | tuple) else w for key, w in weights.items()}
        return tuple(key.removesuffix("_weight") for key, weight in heaviest.items() if weight > 0)

    def weight(self, term: str, progress: float) -> float:
        """The weight of a term when the share `progress` of all steps is done."""
        weight = getattr(self, f"{term}_weight")
        return float(weight[0] + (weight[1] - weight[0]) * progress if isinstance(weight, tuple) else weight)

    @property
    def weighs_classes(self) -> bool:
        return self.class_weights is not None and "task" in self.terms

    @property
    def needs_projection(self) -> bool:
        return not {"alignment", "uniformity", "info_nce", "crd"}.isdisjoint(self.terms)

    @property
    def projects_with_batch_norm(self) -> bool:
        return self.needs_projection and self.projection_head.startswith("simclr")

    @property
    def needs_adapter(self) -> bool:
        return not {"srrl", "feature"}.isdisjoint(self.terms)

    @property
    def needs_teacher(self) -> bool:
        return not {"task"}.issuperset(self.terms)
