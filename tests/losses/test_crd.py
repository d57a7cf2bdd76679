"""Contrastive representation distillation: its loss against the reference, and what its memory keeps and hands out."""

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize, softplus

from raydistill.losses.crd import ContrastiveMemory, Negatives, crd
from raydistill.losses.task import UNLABELLED
from tests import reference

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPERATURES = [0.07, 0.5]
WHOLE = slice(None)


def on_sphere(seed: int, images: int, dimensions: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(images, dimensions, generator=generator), dim=1)


def random_case(seed: int, images: int, count: int, allowed: float = 0.7) -> tuple[torch.Tensor, ...]:
    """Student, teacher, and the negatives of both."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = on_sphere(seed, images), on_sphere(seed + 1, images)
    allowed_BK = torch.rand(images, count, generator=generator) < allowed
    log_mean = torch.randn(2, generator=generator)
    return student, teacher, Negatives(on_sphere(seed + 2, count), on_sphere(seed + 3, count), allowed_BK, log_mean)


def expected_of(student: torch.Tensor, teacher: torch.Tensor, negatives: Negatives, temperature: float) -> float:
    return reference.crd(
        student.tolist(),
        teacher.tolist(),
        (negatives.student_KP.tolist(), negatives.teacher_KP.tolist()),
        negatives.allowed_BK.tolist(),
        tuple(negatives.log_mean.double().exp().tolist()),
        temperature,
    )


def numbered(first: int, images: int, dimensions: int = 3) -> torch.Tensor:
    """Embeddings that tell which image they are of."""
    return torch.arange(first, first + images).float()[:, None].repeat(1, dimensions)


def put_numbered(memory: ContrastiveMemory, first: int, images: int, labels: torch.Tensor | None = None) -> None:
    image = torch.arange(first, first + images)
    labels = torch.full((images,), UNLABELLED) if labels is None else labels
    memory.put(numbered(first, images), -numbered(first, images), image, labels)


STRANGER = (torch.tensor([10**6]), torch.tensor([UNLABELLED]))  # an image that is in no memory


@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 6),
    count=st.integers(1, 12),
    temperature=st.sampled_from(TEMPERATURES),
    allowed=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_equals_the_reference(seed, images, count, temperature, allowed):
    student, teacher, negatives = random_case(seed, images, count, allowed)
    expected = expected_of(student, teacher, negatives, temperature)
    assert crd(student, teacher, negatives, temperature).item() == pytest.approx(expected, rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradients_equal_differences_of_the_reference(temperature):
    """Each network is taught as the anchor; as the other's positive it stands still, as the memory does."""
    student, teacher, negatives = random_case(0, 4, 5)
    student.requires_grad_()
    teacher.requires_grad_()
    crd(student, teacher, negatives, temperature).backward()
    allowed, means = negatives.allowed_BK.tolist(), negatives.log_mean.double().exp().tolist()

    def of_student(x):
        return reference.crd_of_anchor(
            x, teacher.tolist(), negatives.teacher_KP.tolist(), allowed, means[0], temperature
        )

    def of_teacher(x):
        return reference.crd_of_anchor(
            x, student.tolist(), negatives.student_KP.tolist(), allowed, means[1], temperature
        )

    for tensor, function in ((student, of_student), (teacher, of_teacher)):
        expected = torch.tensor(reference.slopes(function, tensor.tolist()))
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-5, atol=5e-6)


def test_the_number_of_images_of_the_data_set_cancels():
    student, teacher, negatives = random_case(0, 4, 5)
    values = [
        reference.crd_of_anchor(
            student.tolist(),
            teacher.tolist(),
            negatives.teacher_KP.tolist(),
            negatives.allowed_BK.tolist(),
            2.0,
            0.5,
            n,
        )
        for n in (10, 10**7)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


@pytest.mark.parametrize("count", [1, 4, 256])
def test_a_posterior_that_knows_nothing(count):
    """Where every similarity is the measured mean, h is 1 / (1 + K): one pair in 1 + K belongs together."""
    point = on_sphere(0, 1)
    temperature = 0.5
    negatives = Negatives(
        point.repeat(count, 1), point.repeat(count, 1), torch.ones(3, count).bool(), torch.full((2,), 1 / temperature)
    )
    same = point.repeat(3, 1)
    expected = 2 * (math.log(1 + count) + count * math.log((1 + count) / count))
    assert crd(same, same, negatives, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_partners_swapped_cost_their_similarity():
    """What lies far above the mean of the negatives is known to belong together; the others' partners are not."""
    student, _, negatives = random_case(0, 8, 32, allowed=1.0)
    right = crd(student, student, negatives, 0.07).item()
    wrong = crd(student, student.roll(1, dims=0), negatives, 0.07).item()
    offsets = negatives.log_mean + math.log(32)
    similarity = (student * student.roll(1, dims=0)).sum(dim=1) / 0.07
    cost = sum((softplus(offset - similarity).mean() - softplus(offset - 1 / 0.07)).item() for offset in offsets)
    assert cost > 1
    assert wrong - right == pytest.approx(cost, rel=1e-4)


@given(seed=st.integers(0, 10**6), images=st.integers(1, 6), temperature=st.sampled_from(TEMPERATURES))
def test_never_negative_and_the_order_of_images_and_negatives_does_not_matter(seed, images, temperature):
    student, teacher, negatives = random_case(seed, images, 7)
    expected = crd(student, teacher, negatives, temperature).item()
    generator = torch.Generator().manual_seed(seed)
    order, places = torch.randperm(images, generator=generator), torch.randperm(7, generator=generator)
    shuffled = Negatives(
        negatives.student_KP[places],
        negatives.teacher_KP[places],
        negatives.allowed_BK[order][:, places],
        negatives.log_mean,
    )
    assert expected >= 0
    found = crd(student[order], teacher[order], shuffled, temperature).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_what_is_not_allowed_changes_nothing():
    student, teacher, negatives = random_case(0, 4, 5)
    more = Negatives(
        torch.cat([negatives.student_KP, on_sphere(8, 3)]),
        torch.cat([negatives.teacher_KP, on_sphere(9, 3)]),
        torch.cat([negatives.allowed_BK, torch.zeros(4, 3).bool()], dim=1),
        negatives.log_mean,
    )
    torch.testing.assert_close(crd(student, teacher, more, 0.07), crd(student, teacher, negatives, 0.07))


@pytest.mark.parametrize("allowed", [0.0, 1.0])
@pytest.mark.parametrize("temperature", [1e-4, 0.07])
def test_a_batch_of_one_is_finite_whatever_the_temperature(allowed, temperature):
    student, teacher, negatives = random_case(0, 1, 5, allowed)
    student.requires_grad_()
    teacher.requires_grad_()
    loss = crd(student, teacher, negatives, temperature)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert torch.isfinite(teacher.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_points_are_computed_in_fp32(dtype):
    student, teacher, negatives = random_case(0, 16, 32)
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss = crd(student, teacher, negatives, 0.07)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected_of(student, teacher, negatives, 0.07), rel=1e-5)


@given(places=st.integers(1, 9), batches=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_the_ring_keeps_the_latest_and_overwrites_the_oldest(places, batches):
    memory = ContrastiveMemory(places, 3)
    put = 0
    for images in batches:
        put_numbered(memory, put, images)
        put += images
        drawn = memory.draw(places, *STRANGER, WHOLE, [0], 1e3)
        latest = list(range(max(0, put - places), put))
        assert sorted(drawn.student_KP[:, 0].tolist()) == latest
        assert sorted((-drawn.teacher_KP[:, 0]).tolist()) == latest  # both of one place are of one image


def test_its_size_stays_as_it_is():
    memory = ContrastiveMemory(64, 8)

    def size() -> int:
        file = io.BytesIO()
        torch.save(memory.state_dict(), file)
        return file.tell()

    at_first = size()
    for step in range(200):
        image = torch.arange(16) + 16 * step
        memory.put(on_sphere(step, 16, 8), on_sphere(step + 1, 16, 8), image, image % 5)
        drawn = memory.draw(48, image, image % 5, WHOLE, [step], 0.07)
        assert len(drawn.student_KP) <= 48
    assert size() == at_first
    assert len(drawn.student_KP) == len(drawn.teacher_KP) == drawn.allowed_BK.shape[1] == 48


@pytest.mark.parametrize(("count", "drawn"), [(1, 1), (5, 5), (8, 8), (100, 8)])
def test_no_more_negatives_than_asked_for_or_there_are_and_none_twice(count, drawn):
    memory = ContrastiveMemory(20, 3)
    put_numbered(memory, 0, 8)
    found = memory.draw(count, *STRANGER, WHOLE, [0], 1e3).student_KP[:, 0].tolist()
    assert len(found) == len(set(found)) == drawn
    assert set(found) <= set(range(8))


def test_neither_the_image_itself_nor_its_class_is_a_negative():
    memory = ContrastiveMemory(12, 3)
    labels = torch.tensor([0, 0, 1, UNLABELLED, UNLABELLED, 2])
    put_numbered(memory, 0, 6, labels)
    put_numbered(memory, 0, 6, labels)  # the same images again, an epoch later
    drawn = memory.draw(12, torch.arange(6), labels, WHOLE, [0], 1e3)
    images = drawn.student_KP[:, 0].int().tolist()
    assert sorted(images) == sorted([*range(6), *range(6)])
    for image in range(6):
        negatives = {other for other, ok in zip(images, drawn.allowed_BK[image].tolist(), strict=True) if ok}
        own_class = {other for other in range(6) if labels[other] == labels[image] != UNLABELLED}
        assert negatives == set(range(6)) - own_class - {image}


def test_unlabelled_images_are_negatives_of_each_other():
    memory = ContrastiveMemory(4, 3)
    put_numbered(memory, 0, 4)
    drawn = memory.draw(4, torch.arange(4), torch.full((4,), UNLABELLED), WHOLE, [0], 1e3)
    assert drawn.allowed_BK.sum(dim=1).tolist() == [3, 3, 3, 3]


def test_the_same_seed_draws_the_same():
    memory = ContrastiveMemory(64, 3)
    put_numbered(memory, 0, 64)

    def drawn(seed: list[int]) -> list[float]:
        return memory.draw(16, *STRANGER, WHOLE, seed, 1e3).student_KP[:, 0].tolist()

    assert drawn([3, 7]) == drawn([3, 7])
    assert drawn([3, 7]) != drawn([3, 8])
    assert drawn([3, 7]) != drawn([4, 7])


def test_every_entry_gets_its_turn():
    memory = ContrastiveMemory(32, 3)
    put_numbered(memory, 0, 32)
    seen = {
        image for seed in range(60) for image in memory.draw(4, *STRANGER, WHOLE, [seed], 1e3).student_KP[:, 0].tolist()
    }
    assert seen == set(range(32))


def filled(places: int = 16, images: int = 8, seed: int = 0) -> tuple[ContrastiveMemory, tuple[torch.Tensor, ...]]:
    """A memory that has seen one batch; the batch."""
    memory = ContrastiveMemory(places, 6)
    batch = (on_sphere(seed, images), on_sphere(seed + 1, images), torch.arange(images), torch.arange(images) % 4)
    memory.put(*batch)
    return memory, batch


@pytest.mark.parametrize("temperature", [0.005, 0.07, 1.0])
@pytest.mark.parametrize("places", [5, 8, 16])
def test_the_first_draw_measures_the_mean_and_no_later_one_does(temperature, places):
    """In a memory smaller than the batch, over those of its images that are in it."""
    memory, (student, teacher, image, label) = filled(places)
    first = memory.draw(16, image, label, WHOLE, [0], temperature).log_mean
    for side, (anchors, others) in enumerate(((student, teacher), (teacher, student))):
        kept = range(max(0, 8 - places), 8)
        similarities = [
            reference.dot(anchors[i].tolist(), others[k].tolist()) / temperature
            for i in kept
            for k in kept
            if label[i] != label[k]
        ]
        highest = max(similarities)
        mean = sum(math.exp(value - highest) for value in similarities) / len(similarities)
        assert first[side].item() == pytest.approx(highest + math.log(mean), rel=1e-5, abs=1e-6)
    memory.put(on_sphere(8, 8), on_sphere(9, 8), image + 8, label)
    later = memory.draw(16, image + 8, label, WHOLE, [1], temperature).log_mean
    assert torch.equal(later, first)


def test_the_mean_waits_for_the_first_batch_that_has_a_negative():
    memory, _ = filled(images=1)
    alone = memory.draw(16, torch.tensor([0]), torch.tensor([0]), WHOLE, [0], 0.07)
    assert not alone.allowed_BK.any()
    assert torch.isfinite(crd(on_sphere(0, 1), on_sphere(1, 1), alone, 0.07))
    other = on_sphere(2, 1), on_sphere(3, 1)
    memory.put(*other, torch.tensor([1]), torch.tensor([1]))
    found = memory.draw(16, torch.tensor([1]), torch.tensor([1]), WHOLE, [1], 0.07)
    of_student, of_teacher = found.log_mean.tolist()
    assert found.allowed_BK.sum() == 1
    assert of_student == pytest.approx((other[0] @ on_sphere(1, 1).T).item() / 0.07, rel=1e-5)
    assert of_teacher == pytest.approx((other[1] @ on_sphere(0, 1).T).item() / 0.07, rel=1e-5)


def test_what_it_hands_out_does_not_change_with_it():
    memory, (_, _, image, label) = filled(places=8)
    drawn = memory.draw(8, image, label, WHOLE, [0], 0.07)
    before = [tensor.clone() for tensor in (drawn.student_KP, drawn.teacher_KP, drawn.allowed_BK, drawn.log_mean)]
    memory.put(on_sphere(8, 8), on_sphere(9, 8), image + 8, label)
    memory.draw(8, image + 8, label, WHOLE, [1], 0.07)
    for tensor, kept in zip(
        (drawn.student_KP, drawn.teacher_KP, drawn.allowed_BK, drawn.log_mean), before, strict=True
    ):
        assert torch.equal(tensor, kept)


def test_it_keeps_no_graph_and_learns_nothing():
    memory, (_, _, image, label) = filled()
    memory.put(on_sphere(8, 8).requires_grad_(), on_sphere(9, 8).requires_grad_(), image + 8, label)
    drawn = memory.draw(16, image, label, WHOLE, [0], 0.07)
    assert not drawn.student_KP.requires_grad
    assert not drawn.teacher_KP.requires_grad
    assert list(memory.parameters()) == []


def losses_of(memory: ContrastiveMemory, steps: range) -> list[float]:
    losses = []
    for step in steps:
        image = torch.arange(4) + 4 * (step % 5)
        student, teacher = on_sphere(2 * step, 4), on_sphere(2 * step + 1, 4)
        memory.put(student, teacher, image, image % 3)
        drawn = memory.draw(6, image, image % 3, WHOLE, [0, step], 0.07)
        losses.append(crd(student, teacher, drawn, 0.07).item())
    return losses


@pytest.mark.parametrize("break_after", [0, 1, 4])
def test_a_restored_memory_goes_on_as_if_nothing_had_been(break_after):
    unbroken = losses_of(ContrastiveMemory(10, 6), range(8))
    memory, file = ContrastiveMemory(10, 6), io.BytesIO()
    first = losses_of(memory, range(break_after))
    torch.save(memory.state_dict(), file)
    file.seek(0)
    restored = ContrastiveMemory(10, 6)
    restored.load_state_dict(torch.load(file))
    assert first + losses_of(restored, range(break_after, 8)) == unbroken


def share_of(memory: ContrastiveMemory, step: int, mine: slice) -> float:
    """The loss of these rows of a global batch of eight."""
    image = torch.arange(8) + 8 * (step % 3)
    label = torch.where(image % 4 == 3, UNLABELLED, image % 4)
    student, teacher = on_sphere(2 * step, 8), on_sphere(2 * step + 1, 8)
    memory.put(student, teacher, image, label)
    drawn = memory.draw(10, image, label, mine, [0, step], 0.07)
    return crd(student[mine], teacher[mine], drawn, 0.07).item()


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("places", [6, 32])
def test_workers_share_out_the_loss_of_the_whole_batch(workers, places):
    """Each puts in the same global batch and takes its own rows: the mean of their losses is that of one worker."""
    together, apart = ContrastiveMemory(places, 6), [ContrastiveMemory(places, 6) for _ in range(workers)]
    for step in range(4):
        whole = share_of(together, step, WHOLE)
        shares = [share_of(memory, step, slice(rank, None, workers)) for rank, memory in enumerate(apart)]
        assert sum(shares) / workers == pytest.approx(whole, rel=1e-6)
    for memory in apart:
        for name, value in memory.state_dict().items():
            assert torch.equal(value, together.state_dict()[name])
