"""The losses again, slow and obvious: float64, one loop an index, nothing of torch. What the package computes is held
against these."""

import math
from collections.abc import Callable, Sequence

Matrix = Sequence[Sequence[float]]


def softmax(row: Sequence[float], temperature: float = 1.0) -> list[float]:
    scaled = [value / temperature for value in row]
    highest = max(scaled)
    powers = [math.exp(value - highest) for value in scaled]
    return [power / sum(powers) for power in powers]


def log_softmax(row: Sequence[float], temperature: float = 1.0) -> list[float]:
    scaled = [value / temperature for value in row]
    highest = max(scaled)
    log_sum = highest + math.log(sum(math.exp(value - highest) for value in scaled))
    return [value - log_sum for value in scaled]


def cross_entropy(logits: Matrix, labels: Sequence[int]) -> float:
    """Mean over the rows with a label; a label of -1 is none."""
    losses = [-log_softmax(row)[label] for row, label in zip(logits, labels, strict=True) if label != -1]
    return sum(losses) / len(losses) if losses else 0.0


def soft_target_kl(student: Matrix, teacher: Matrix, temperature: float) -> float:
    total = 0.0
    for student_row, teacher_row in zip(student, teacher, strict=True):
        log_student, log_teacher = log_softmax(student_row, temperature), log_softmax(teacher_row, temperature)
        for of_student, of_teacher in zip(log_student, log_teacher, strict=True):
            total += math.exp(of_teacher) * (of_teacher - of_student)
    return temperature**2 * total / len(student)


def squared_distance(first: Sequence[float], second: Sequence[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True))


def alignment(student: Matrix, teacher: Matrix, alpha: float) -> float:
    total = 0.0
    for student_row, teacher_row in zip(student, teacher, strict=True):
        total += math.sqrt(squared_distance(student_row, teacher_row)) ** alpha
    return total / len(student)


def uniformity(points: Matrix, t: float) -> float:
    potentials = []
    for i in range(len(points)):
        for j in range(i + 1, len(points)):
            potentials.append(math.exp(-t * squared_distance(points[i], points[j])))
    return math.log(sum(potentials) / len(potentials)) if potentials else 0.0


def total(
    weights: tuple[float, float, float, float],
    logits: tuple[Matrix, Matrix],
    projected: tuple[Matrix, Matrix],
    labels: Sequence[int],
    temperature: float = 4.0,
    alpha: float = 2.0,
    t: float = 2.0,
) -> float:
    """Of (student, teacher) pairs; the weights are those of task, soft targets, alignment and uniformity."""
    task, kd, align, uniform = weights
    spread = (uniformity(projected[0], t) + uniformity(projected[1], t)) / 2
    return (
        task * cross_entropy(logits[0], labels)
        + kd * soft_target_kl(*logits, temperature)
        + align * alignment(*projected, alpha)
        + uniform * spread
    )


def slopes(function: Callable[[list[list[float]]], float], point: Matrix, step: float = 1e-5) -> list[list[float]]:
    """The gradient by central differences, one entry at a time."""
    gradient = []
    for i in range(len(point)):
        gradient.append([])
        for j in range(len(point[i])):
            ends = []
            for sign in (1, -1):
                moved = [list(row) for row in point]
                moved[i][j] += sign * step
                ends.append(function(moved))
            gradient[i].append((ends[0] - ends[1]) / (2 * step))
    return gradient
