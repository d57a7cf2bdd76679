"""The weighted sum: the reference, terms left out, and batches that lack something."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from raydistill.config import Loss
from raydistill.losses.task import UNLABELLED
from raydistill.losses.total import Outputs, distillation_loss
from tests import reference

pytestmark = pytest.mark.usefixtures("one_thread")

NAN = float("nan")
NAMES = ("task", "kd", "alignment", "uniformity")


def settings_of(weights: tuple[float, float, float, float], **others: float) -> Loss:
    return Loss(**{f"{name}_weight": weight for name, weight in zip(NAMES, weights, strict=True)}, **others)


def random_outputs(seed: int, images: int = 6, classes: int = 5, dimensions: int = 8) -> tuple[Outputs, Outputs]:
    generator = torch.Generator().manual_seed(seed)

    def outputs() -> Outputs:
        logits = 2 * torch.randn(images, classes, generator=generator)
        return Outputs(logits, normalize(torch.randn(images, dimensions, generator=generator), dim=1))

    return outputs(), outputs()


def with_gradient(outputs: Outputs) -> Outputs:
    assert outputs.projected_BD is not None
    return Outputs(outputs.logits_BC.requires_grad_(), outputs.projected_BD.requires_grad_())


@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 8),
    weights=st.tuples(*[st.sampled_from([0.0, 0.3, 1.0, 2.0])] * 4),
    temperature=st.sampled_from([1.0, 2.0, 4.0]),
    alpha=st.sampled_from([1.0, 2.0]),
    t=st.sampled_from([1.0, 2.0]),
    labelled=st.integers(0, 8),
)
def test_equals_the_reference(seed, images, weights, temperature, alpha, t, labelled):
    student, teacher = random_outputs(seed, images)
    labels = torch.randint(5, (images,), generator=torch.Generator().manual_seed(seed))
    labels[labelled:] = UNLABELLED
    loss = settings_of(weights, temperature=temperature, alignment_alpha=alpha, uniformity_t=t)
    total, terms = distillation_loss(loss, student, teacher, labels)
    expected = reference.total(
        weights,
        (student.logits_BC.tolist(), teacher.logits_BC.tolist()),
        (student.projected_BD.tolist(), teacher.projected_BD.tolist()),
        labels.tolist(),
        temperature,
        alpha,
        t,
    )
    assert total.item() == pytest.approx(expected, rel=1e-6, abs=2e-6)
    assert set(terms) == {name for name, weight in zip(NAMES, weights, strict=True) if weight}


def test_the_defaults_are_the_papers():
    student, teacher = random_outputs(0)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    total, terms = distillation_loss(Loss(), student, teacher, labels)
    expected = reference.total(
        (1, 1, 1, 1),
        (student.logits_BC.tolist(), teacher.logits_BC.tolist()),
        (student.projected_BD.tolist(), teacher.projected_BD.tolist()),
        labels.tolist(),
        temperature=4,
        alpha=2,
        t=2,
    )
    assert total.item() == pytest.approx(expected, abs=1e-6)
    assert total.item() == pytest.approx(sum(term.item() for term in terms.values()), abs=1e-6)


def test_terms_are_reported_without_their_weights():
    student, teacher = random_outputs(0)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    _, plain = distillation_loss(settings_of((1, 1, 1, 1)), student, teacher, labels)
    _, weighted = distillation_loss(settings_of((3, 5, 7, 9)), student, teacher, labels)
    assert {name: term.item() for name, term in weighted.items()} == {name: t.item() for name, t in plain.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_zero_keeps_what_its_term_reads_out_of_the_sum(name):
    student, teacher = random_outputs(0)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    weights = {f"{other}_weight": float(other not in (name, "alignment", "uniformity")) for other in NAMES}
    if name == "task":
        labels = torch.full((6,), 10**6)  # no class of that number
    elif name == "kd":
        teacher = Outputs(torch.full((6, 5), NAN), teacher.projected_BD)
    else:
        teacher = Outputs(teacher.logits_BC, torch.full((6, 8), NAN))
    student = with_gradient(student)
    total, terms = distillation_loss(Loss(**weights), student, teacher, labels)
    total.backward()
    assert name not in terms
    assert torch.isfinite(total)
    assert torch.isfinite(student.logits_BC.grad).all()


def test_without_a_teacher_it_is_the_cross_entropy():
    student, _ = random_outputs(0)
    labels = torch.tensor([0, 1, UNLABELLED, 3, 4, 0])
    loss = settings_of((1, 0, 0, 0))
    total, terms = distillation_loss(loss, Outputs(student.logits_BC), None, labels)
    assert list(terms) == ["task"]
    assert total.item() == pytest.approx(reference.cross_entropy(student.logits_BC.tolist(), labels.tolist()), abs=1e-6)


@pytest.mark.parametrize("label", [2, UNLABELLED])
def test_a_batch_of_one_is_finite(label):
    student, teacher = (with_gradient(outputs) for outputs in random_outputs(0, images=1))
    total, terms = distillation_loss(Loss(), student, teacher, torch.tensor([label]))
    total.backward()
    assert set(terms) == set(NAMES)
    assert torch.isfinite(total)
    for tensor in (student.logits_BC, student.projected_BD, teacher.projected_BD):
        assert torch.isfinite(tensor.grad).all()


def test_a_batch_without_labels_learns_from_the_teacher_alone():
    student, teacher = random_outputs(0)
    student = with_gradient(student)
    total, _ = distillation_loss(Loss(), student, teacher, torch.full((6,), UNLABELLED))
    total.backward()
    without_task = distillation_loss(settings_of((0, 1, 1, 1)), *random_outputs(0), torch.zeros(6, dtype=torch.long))[0]
    assert total.item() == pytest.approx(without_task.item(), abs=1e-6)
    assert student.logits_BC.grad.abs().sum() > 0


def test_gradients_equal_differences_of_the_reference():
    student, teacher = (with_gradient(outputs) for outputs in random_outputs(0, images=4, classes=3, dimensions=3))
    labels = torch.tensor([0, 1, UNLABELLED, 2])
    weights = (1.0, 0.5, 2.0, 0.7)
    distillation_loss(settings_of(weights), student, teacher, labels)[0].backward()
    logits = (student.logits_BC.tolist(), teacher.logits_BC.tolist())
    projected = (student.projected_BD.tolist(), teacher.projected_BD.tolist())
    expected = {
        "student logits": reference.slopes(
            lambda x: reference.total(weights, (x, logits[1]), projected, labels.tolist()), logits[0]
        ),
        "student projection": reference.slopes(
            lambda x: reference.total(weights, logits, (x, projected[1]), labels.tolist()), projected[0]
        ),
        "teacher projection": reference.slopes(
            lambda x: reference.total(weights, logits, (projected[0], x), labels.tolist()), projected[1]
        ),
    }
    found = {
        "student logits": student.logits_BC.grad,
        "student projection": student.projected_BD.grad,
        "teacher projection": teacher.projected_BD.grad,
    }
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, torch.tensor(expected[name]), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_summed_in_fp32(dtype, images):
    student, teacher = (
        Outputs(outputs.logits_BC.to(dtype), outputs.projected_BD.to(dtype)) for outputs in random_outputs(0, images)
    )
    labels = torch.arange(images) % 5
    total, _ = distillation_loss(Loss(), student, teacher, labels)
    expected = reference.total(
        (1, 1, 1, 1),
        (student.logits_BC.tolist(), teacher.logits_BC.tolist()),
        (student.projected_BD.tolist(), teacher.projected_BD.tolist()),
        labels.tolist(),
    )
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected, rel=1e-6, abs=2e-6)
