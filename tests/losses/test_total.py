"""The weighted sum: the reference, terms left out, weights that change, and batches that lack something."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from raydistill.config import Loss
from raydistill.losses.crd import Negatives
from raydistill.losses.task import UNLABELLED
from raydistill.losses.total import Outputs, distillation_loss
from raydistill.models.projections import ProjectionHead
from tests import reference

pytestmark = pytest.mark.usefixtures("one_thread")

NAN = float("nan")
PAPER = ("task", "kd", "alignment", "uniformity")  # what weighs anything by default
KEYS = [key for key in Loss.model_fields if key.endswith("_weight")]
NAMES = [key.removesuffix("_weight") for key in KEYS]
READS = {  # what a term reads of the student and of the teacher
    "task": ({"logits_BC"}, set()),
    "kd": ({"logits_BC"}, {"logits_BC"}),
    "dkd": ({"logits_BC"}, {"logits_BC"}),
    "dist": ({"logits_BC"}, {"logits_BC"}),
    "standardised_kd": ({"logits_BC"}, {"logits_BC"}),
    "alignment": ({"projected_BP"}, {"projected_BP"}),
    "uniformity": ({"projected_BP"}, {"projected_BP"}),
    "info_nce": ({"projected_BP"}, {"projected_BP"}),
    "crd": ({"projected_BP"}, {"projected_BP"}),
    "srrl": ({"adapted_BD", "adapted_logits_BC"}, {"features_BD", "logits_BC"}),
    "feature": ({"adapted_BD"}, {"features_BD"}),
    "rkd_distance": ({"features_BD"}, {"features_BD"}),
    "rkd_angle": ({"features_BD"}, {"features_BD"}),
}


def settings_of(weights: dict[str, object], **others: object) -> Loss:
    """A loss of these terms and no others."""
    return Loss(**{f"{name}_weight": weights.get(name, 0.0) for name in NAMES}, **others)


def random_outputs(seed: int, images: int = 6, classes: int = 5, dimensions: int = 8) -> tuple[Outputs, Outputs]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def outputs(width: int) -> Outputs:
        logits = 2 * draw(images, classes)
        return Outputs(logits, draw(images, width), normalize(draw(images, dimensions), dim=1))

    student, teacher = outputs(4), outputs(7)
    return replace(student, adapted_BD=draw(images, 7), adapted_logits_BC=2 * draw(images, classes)), teacher


def random_labels(seed: int, images: int = 6, labelled: int = 6) -> torch.Tensor:
    labels = torch.randint(5, (images,), generator=torch.Generator().manual_seed(seed))
    labels[labelled:] = UNLABELLED
    return labels


def random_negatives(seed: int, images: int = 6, count: int = 5, dimensions: int = 8) -> Negatives:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (normalize(torch.randn(count, dimensions, generator=generator), dim=1) for _ in range(2))
    return Negatives(student, teacher, torch.rand(images, count, generator=generator) < 0.7, torch.tensor([0.5, 1.0]))


def said(outputs: Outputs) -> reference.Said:
    tensors = (getattr(outputs, field.name) for field in fields(outputs))
    return reference.Said(*(() if tensor is None else tensor.tolist() for tensor in tensors))


def listed(negatives: Negatives) -> reference.Negatives:
    return reference.Negatives(
        negatives.student_KP.tolist(),
        negatives.teacher_KP.tolist(),
        negatives.allowed_BK.tolist(),
        tuple(negatives.log_mean.double().exp().tolist()),
    )


def with_gradient(outputs: Outputs) -> Outputs:
    tensors = {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    return Outputs(**{name: None if tensor is None else tensor.requires_grad_() for name, tensor in tensors.items()})


def without(outputs: Outputs, names: set[str]) -> Outputs:
    """Nothing but NaN in these fields."""
    return replace(outputs, **{name: torch.full_like(getattr(outputs, name), NAN) for name in names})


@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 5),
    weights=st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.0, 0.3, 1.0, 2.0])),
    settings=st.builds(
        reference.Settings,
        temperature=st.sampled_from([1.0, 2.0, 4.0]),
        alignment_alpha=st.sampled_from([1.0, 2.0]),
        uniformity_t=st.sampled_from([1.0, 2.0]),
        contrastive_temperature=st.sampled_from([0.07, 0.5]),
        dkd_target_factor=st.sampled_from([0.5, 1.0]),
        dkd_other_factor=st.sampled_from([2.0, 8.0]),
        feature_distance=st.sampled_from(["mse", "cosine"]),
    ),
    labelled=st.integers(0, 5),
)
def test_equals_the_reference(seed, images, weights, settings, labelled):
    student, teacher = random_outputs(seed, images)
    labels, negatives = random_labels(seed, images, labelled), random_negatives(seed, images)
    loss = settings_of(weights, **settings._asdict())
    total, terms = distillation_loss(loss, student, teacher, labels, negatives=negatives)
    expected = reference.total(weights, said(student), said(teacher), labels.tolist(), listed(negatives), settings)
    assert total.item() == pytest.approx(expected, rel=5e-6, abs=5e-5)
    assert set(terms) == {name for name, weight in weights.items() if weight}


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_of_the_config_is_a_term_that_is_computed_and_reported_under_its_name(name):
    student, teacher = random_outputs(0)
    labels, negatives = random_labels(0, labelled=4), random_negatives(0)
    total, terms = distillation_loss(settings_of({name: 3.0}), student, teacher, labels, negatives=negatives)
    expected = reference.term(name, said(student), said(teacher), labels.tolist(), listed(negatives))
    assert list(terms) == [name]
    assert terms[name].item() == pytest.approx(expected, rel=1e-5)
    assert total.item() == pytest.approx(3 * expected, rel=1e-5)


def test_the_weights_of_the_config_were_found():
    assert len(NAMES) >= 13
    assert set(PAPER) < set(NAMES)


def test_the_defaults_are_the_papers():
    student, teacher = random_outputs(0)
    labels = random_labels(0)
    total, terms = distillation_loss(Loss(), student, teacher, labels)
    expected = reference.total(dict.fromkeys(PAPER, 1), said(student), said(teacher), labels.tolist())
    assert list(terms) == list(PAPER)
    assert total.item() == pytest.approx(expected, abs=1e-6)
    assert total.item() == pytest.approx(sum(term.item() for term in terms.values()), abs=1e-6)


def test_the_other_defaults_are_those_of_the_reference():
    defaults = Loss()
    assert {name: getattr(defaults, name) for name in reference.Settings._fields} == reference.DEFAULTS._asdict()


def test_terms_are_reported_without_their_weights():
    student, teacher = random_outputs(0)
    labels, negatives = random_labels(0), random_negatives(0)
    plain = settings_of(dict.fromkeys(NAMES, 1.0))
    weighted = settings_of({name: [i + 2.0, 0.0] for i, name in enumerate(NAMES)})
    _, of_plain = distillation_loss(plain, student, teacher, labels, negatives=negatives)
    _, of_weighted = distillation_loss(weighted, student, teacher, labels, negatives=negatives)
    assert list(of_plain) == list(of_weighted) == NAMES
    assert {name: t.item() for name, t in of_weighted.items()} == {name: t.item() for name, t in of_plain.items()}


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (1.0, 0.0)])
def test_a_weight_may_change_linearly(progress, share):
    """Here kd gives way to alignment, and the task stays."""
    student, teacher = random_outputs(0)
    labels = random_labels(0)
    loss = settings_of({"task": 0.7, "kd": [1, 0], "alignment": [0, 4]})
    total, terms = distillation_loss(loss, student, teacher, labels, progress)
    expected = 0.7 * terms["task"] + share * terms["kd"] + 4 * (1 - share) * terms["alignment"]
    assert set(terms) == {"task", "kd", "alignment"}  # a term is reported even while it weighs nothing
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("weight", "computed"), [(0, False), ([0, 0], False), ([0, 1], True), ([1, 0], True), ([2, 2], True)]
)
def test_a_term_is_left_out_if_it_weighs_nothing_at_any_time(name, weight, computed):
    student, teacher = random_outputs(0)
    other = "kd" if name == "task" else "task"
    loss = settings_of({name: weight, other: 1.0})
    _, terms = distillation_loss(loss, student, teacher, random_labels(0), 0.0, random_negatives(0))
    assert set(terms) == ({name, other} if computed else {other})


@pytest.mark.parametrize("name", NAMES)
def test_a_term_reads_what_it_needs_and_nothing_else(name):
    student, teacher = random_outputs(0)
    labels, negatives = random_labels(0), random_negatives(0)
    loss = settings_of({name: 1.0})
    expected, _ = distillation_loss(loss, student, teacher, labels, negatives=negatives)
    of_student, of_teacher = READS[name]
    only_student = without(student, {field.name for field in fields(student)} - of_student)
    only_teacher = without(teacher, {"logits_BC", "features_BD", "projected_BP"} - of_teacher)
    no_labels = labels if name in ("task", "dkd") else torch.full((6,), 10**6)  # no class of that number
    found, _ = distillation_loss(
        loss, only_student, only_teacher, no_labels, negatives=negatives if name == "crd" else None
    )
    assert torch.equal(found, expected)
    for field in of_student:
        spoilt, _ = distillation_loss(loss, without(student, {field}), teacher, labels, negatives=negatives)
        assert torch.isnan(spoilt), field
    for field in of_teacher:
        spoilt, _ = distillation_loss(loss, student, without(teacher, {field}), labels, negatives=negatives)
        assert torch.isnan(spoilt), field


def test_without_a_teacher_it_is_the_cross_entropy():
    student, _ = random_outputs(0)
    labels = torch.tensor([0, 1, UNLABELLED, 3, 4, 0])
    total, terms = distillation_loss(settings_of({"task": 1.0}), Outputs(student.logits_BC), None, labels)
    assert list(terms) == ["task"]
    assert total.item() == pytest.approx(reference.cross_entropy(student.logits_BC.tolist(), labels.tolist()), abs=1e-6)


@pytest.mark.parametrize("label", [2, UNLABELLED])
@pytest.mark.parametrize("count", [1, 5])
def test_a_batch_of_one_is_finite(label, count):
    student, teacher = (with_gradient(outputs) for outputs in random_outputs(0, images=1))
    loss = settings_of(dict.fromkeys(NAMES, 1.0))
    total, terms = distillation_loss(
        loss, student, teacher, torch.tensor([label]), negatives=random_negatives(0, 1, count)
    )
    total.backward()
    assert set(terms) == set(NAMES)
    assert all(torch.isfinite(term) for term in terms.values())
    for field in fields(student):
        assert torch.isfinite(getattr(student, field.name).grad).all(), field.name
    assert torch.isfinite(teacher.projected_BP.grad).all()


def test_a_batch_without_labels_learns_from_the_teacher_alone():
    student, teacher = random_outputs(0)
    student = with_gradient(student)
    total, _ = distillation_loss(Loss(), student, teacher, torch.full((6,), UNLABELLED))
    total.backward()
    loss = settings_of({"kd": 1.0, "alignment": 1.0, "uniformity": 1.0})
    without_task = distillation_loss(loss, *random_outputs(0), torch.zeros(6, dtype=torch.long))[0]
    assert total.item() == pytest.approx(without_task.item(), abs=1e-6)
    assert student.logits_BC.grad.abs().sum() > 0


DEGENERATE = ["equal", "nearly equal", "near zero", "images alike", "one number differs", "huge"]


def degenerate(kind: str, scale: float, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """What collapsed, dead or exploding networks say."""
    noise = torch.randn(*shape, generator=generator)
    return {
        "equal": torch.full(shape, scale),
        "nearly equal": 0.3 + scale * noise,
        "near zero": scale * noise,
        "images alike": noise[:1] + scale * noise,
        "one number differs": torch.zeros(shape).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(scale)),
        "huge": 6e4 * noise.sign(),
    }[kind]


@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    kinds=st.tuples(*[st.sampled_from(DEGENERATE)] * 2),
    exponents=st.tuples(*[st.one_of(st.integers(-8, 4), st.integers(-30, 4))] * 2),
    seed=st.integers(0, 10**6),
    settings=st.fixed_dictionaries({
        "temperature": st.sampled_from([1.0, 4.0]), "alignment_alpha": st.sampled_from([1.0, 2.0]),
        "feature_distance": st.sampled_from(["mse", "cosine"]),
    }),
)  # fmt: skip
@example(torch.float16, ("near zero", "images alike"), (-7, 0), 0, {})
@example(torch.float16, ("near zero", "images alike"), (-5, 0), 0, {"temperature": 4.0})
@settings(max_examples=100)
def test_degenerate_outputs_have_a_finite_loss_and_gradient_in_their_own_dtype(dtype, kinds, exponents, seed, settings):
    """Every term that divides, takes a root or a logarithm, where what it divides by is next to nothing."""
    student, teacher = random_outputs(0)
    leaves, networks = [], []
    for outputs, kind, exponent in zip((student, teacher), kinds, exponents, strict=True):
        generator, said_of = torch.Generator().manual_seed(seed), {}
        for field in fields(outputs):
            if (like := getattr(outputs, field.name)) is not None:
                leaf = degenerate(kind, 10.0**exponent, tuple(like.shape), generator).to(dtype).requires_grad_()
                leaves.append(leaf)
                said_of[field.name] = onto_the_sphere(leaf) if field.name == "projected_BP" else leaf
        networks.append(Outputs(**said_of))
    labels, negatives = random_labels(0, labelled=4), random_negatives(0)
    loss = settings_of(dict.fromkeys(NAMES, 1.0), **settings)
    total, terms = distillation_loss(loss, *networks, labels, negatives=negatives)
    total.backward()
    assert all(torch.isfinite(term) for term in terms.values()), terms
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves if leaf.grad is not None)


def onto_the_sphere(features_BD: torch.Tensor) -> torch.Tensor:
    """As training does it, by a head that changes nothing else."""
    head = ProjectionHead("linear", features_BD.shape[1], features_BD.shape[1]).to(features_BD.dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.eye(len(parameter)) if parameter.ndim == 2 else torch.zeros(len(parameter)))
    return head(features_BD)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    student, teacher = random_outputs(0)
    labels, negatives = random_labels(0), random_negatives(0)
    loss = settings_of(dict.fromkeys(NAMES, 1.0))
    _, outside = distillation_loss(loss, student, teacher, labels, negatives=negatives)
    with torch.autocast("cpu", dtype):
        _, inside = distillation_loss(loss, student, teacher, labels, negatives=negatives)
    assert {name: term.item() for name, term in inside.items()} == {name: t.item() for name, t in outside.items()}
