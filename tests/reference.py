"""The losses again, slow and obvious: float64, one loop an index, nothing of torch. What the package computes is held
against these."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

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


def cross_entropy(
    logits: Matrix, labels: Sequence[int], smoothing: float = 0.0, weights: Sequence[float] | None = None
) -> float:
    """Mean over the rows with a label, by the weights of their classes; a label of -1 is none. Smoothing gives each
    class an equal part of that share of the label."""
    total = weight = 0.0
    for row, label in zip(logits, labels, strict=True):
        if label == -1:
            continue
        logs, each = log_softmax(row), [1.0] * len(row) if weights is None else weights
        for c in range(len(row)):
            total -= ((1 - smoothing) * (c == label) + smoothing / len(row)) * each[c] * logs[c]
        weight += each[label]
    return total / weight if weight else 0.0


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


def dot(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))


def info_nce(student: Matrix, teacher: Matrix, temperature: float) -> float:
    """-log of the softmax's share of the own partner, in both directions, over all 2B of them."""
    images = range(len(student))
    total = 0.0
    for i in images:
        own = dot(student[i], teacher[i]) / temperature
        total -= own - math.log(sum(math.exp(dot(student[i], teacher[j]) / temperature) for j in images))
        total -= own - math.log(sum(math.exp(dot(student[j], teacher[i]) / temperature) for j in images))
    return total / (2 * len(student))


def crd_of_anchor(
    anchors: Matrix,
    positives: Matrix,
    negatives: Matrix,
    allowed: Sequence[Sequence[bool]],
    mean: float,
    temperature: float,
    number: int = 50_000,
) -> float:
    """-log h of the positive and -log(1 - h) of every negative that is allowed; h = P / (P + K/N), P = exp(.)/Z and Z =
    N * the mean that was measured once. `number` is N, the images of the data set. With no negative at all K is 1."""
    z = number * mean
    total = 0.0
    for i in range(len(anchors)):
        chance = max(sum(allowed[i]), 1) / number
        p = math.exp(dot(anchors[i], positives[i]) / temperature) / z
        total -= math.log(p / (p + chance))
        for k in range(len(negatives)):
            if allowed[i][k]:
                p = math.exp(dot(anchors[i], negatives[k]) / temperature) / z
                total -= math.log(chance / (p + chance))
    return total / len(anchors)


def crd(
    student: Matrix,
    teacher: Matrix,
    negatives: tuple[Matrix, Matrix],
    allowed: Sequence[Sequence[bool]],
    means: tuple[float, float],
    temperature: float,
) -> float:
    """`negatives` are those of the student and of the teacher; `means` those with the student and the teacher as the
    anchor."""
    return crd_of_anchor(student, teacher, negatives[1], allowed, means[0], temperature) + crd_of_anchor(
        teacher, student, negatives[0], allowed, means[1], temperature
    )


def mean_squared_error(first: Matrix, second: Matrix) -> float:
    total = sum(squared_distance(a, b) for a, b in zip(first, second, strict=True))
    return total / (len(first) * len(first[0]))


def srrl(adapted: Matrix, adapted_logits: Matrix, teacher: Matrix, teacher_logits: Matrix) -> float:
    return mean_squared_error(adapted, teacher) + mean_squared_error(adapted_logits, teacher_logits)


def binary_kl(
    student_logits: Sequence[float], teacher_logits: Sequence[float], target: int, temperature: float
) -> float:
    """KL(b^T || b^S) of b = (p_t, 1 - p_t)."""
    p_student, p_teacher = softmax(student_logits, temperature), softmax(teacher_logits, temperature)
    # 1 - p_t as the sum of the others keeps its digits where p_t is near 1.
    not_student = sum(p for c, p in enumerate(p_student) if c != target)
    not_teacher = sum(p for c, p in enumerate(p_teacher) if c != target)
    of_target = p_teacher[target] * math.log(p_teacher[target] / p_student[target])
    return of_target + not_teacher * math.log(not_teacher / not_student)


def others_kl(
    student_logits: Sequence[float], teacher_logits: Sequence[float], target: int, temperature: float
) -> float:
    """KL(p^T || p^S) of the probabilities of all other classes, renormalised to sum to 1."""
    p_student, p_teacher = softmax(student_logits, temperature), softmax(teacher_logits, temperature)
    others = [c for c in range(len(p_student)) if c != target]
    not_student, not_teacher = sum(p_student[c] for c in others), sum(p_teacher[c] for c in others)
    total = 0.0
    for c in others:
        hat_student, hat_teacher = p_student[c] / not_student, p_teacher[c] / not_teacher
        total += hat_teacher * math.log(hat_teacher / hat_student)
    return total


def dkd(
    student: Matrix, teacher: Matrix, labels: Sequence[int], temperature: float, alpha: float, beta: float
) -> float:
    """Without a label, the teacher's first choice is the target."""
    total = 0.0
    for student_row, teacher_row, label in zip(student, teacher, labels, strict=True):
        target = list(teacher_row).index(max(teacher_row)) if label == -1 else label
        total += alpha * binary_kl(student_row, teacher_row, target, temperature)
        total += beta * others_kl(student_row, teacher_row, target, temperature)
    return temperature**2 * total / len(student)


def pearson(first: Sequence[float], second: Sequence[float]) -> float:
    """0 where one of the two has no spread."""
    mean_first, mean_second = sum(first) / len(first), sum(second) / len(second)
    covariance = sum((a - mean_first) * (b - mean_second) for a, b in zip(first, second, strict=True))
    variance_first = sum((a - mean_first) ** 2 for a in first)
    variance_second = sum((b - mean_second) ** 2 for b in second)
    if variance_first == 0 or variance_second == 0:
        return 0.0
    return covariance / (math.sqrt(variance_first) * math.sqrt(variance_second))


def dist(student: Matrix, teacher: Matrix, temperature: float) -> float:
    p_student = [softmax(row, temperature) for row in student]
    p_teacher = [softmax(row, temperature) for row in teacher]
    images, classes = range(len(student)), range(len(student[0]))
    inter = sum(1 - pearson(p_student[i], p_teacher[i]) for i in images) / len(images)
    intra = 0.0
    for c in classes:
        intra += 1 - pearson([p_student[i][c] for i in images], [p_teacher[i][c] for i in images])
    return temperature**2 * (inter + intra / len(classes))


def z_score(row: Sequence[float]) -> list[float]:
    """(value - mean) / standard deviation, that of a sample (over n - 1)."""
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / (len(row) - 1))
    return [(value - mean) / deviation for value in row]


def standardised_kl(student: Matrix, teacher: Matrix, temperature: float) -> float:
    return soft_target_kl([z_score(row) for row in student], [z_score(row) for row in teacher], temperature)


def feature_distance(adapted: Matrix, teacher: Matrix, distance: str) -> float:
    if distance == "mse":
        return mean_squared_error(adapted, teacher)
    total = 0.0
    for a, b in zip(adapted, teacher, strict=True):
        total += 1 - dot(a, b) / (math.sqrt(dot(a, a)) * math.sqrt(dot(b, b)))
    return total / len(adapted)


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) <= 1 else abs(difference) - 0.5


def relative_distances(features: Matrix) -> list[float]:
    distances = []
    for i in range(len(features)):
        for j in range(i + 1, len(features)):
            distances.append(math.sqrt(squared_distance(features[i], features[j])))
    mean = sum(distances) / len(distances)
    return [distance / mean for distance in distances]


def rkd_distance(student: Matrix, teacher: Matrix) -> float:
    """Mean over the pairs; 0 where there is none."""
    if len(student) < 2:
        return 0.0
    pairs = zip(relative_distances(student), relative_distances(teacher), strict=True)
    losses = [huber(of_student - of_teacher) for of_student, of_teacher in pairs]
    return sum(losses) / len(losses)


def angle(features: Matrix, i: int, j: int, k: int) -> float:
    """The cosine of the angle at j, between the ways to i and to k; 0 where a way has no length."""
    to_i = [a - b for a, b in zip(features[i], features[j], strict=True)]
    to_k = [a - b for a, b in zip(features[k], features[j], strict=True)]
    lengths = math.sqrt(dot(to_i, to_i)) * math.sqrt(dot(to_k, to_k))
    return dot(to_i, to_k) / lengths if lengths else 0.0


def rkd_angle(student: Matrix, teacher: Matrix) -> float:
    """Mean over all B^3 triples."""
    images = range(len(student))
    total = 0.0
    for i in images:
        for j in images:
            for k in images:
                total += huber(angle(student, i, j, k) - angle(teacher, i, j, k))
    return total / len(student) ** 3


class Said(NamedTuple):
    """What one network says of a batch."""

    logits: Matrix
    features: Matrix
    projected: Matrix
    adapted: Matrix = ()
    adapted_logits: Matrix = ()


class Negatives(NamedTuple):
    of_student: Matrix
    of_teacher: Matrix
    allowed: Sequence[Sequence[bool]]
    means: tuple[float, float]


class Settings(NamedTuple):
    """The keys of the config that are no weights, with its defaults."""

    temperature: float = 4.0
    alignment_alpha: float = 2.0
    uniformity_t: float = 2.0
    contrastive_temperature: float = 0.07
    dkd_target_factor: float = 1.0
    dkd_other_factor: float = 8.0
    feature_distance: str = "mse"


DEFAULTS = Settings()


def term(
    name: str,
    student: Said,
    teacher: Said,
    labels: Sequence[int],
    negatives: Negatives | None = None,
    settings: Settings = DEFAULTS,
) -> float:
    logits, projected = (student.logits, teacher.logits), (student.projected, teacher.projected)
    tau = settings.contrastive_temperature
    formulas: dict[str, Callable[[], float]] = {
        "task": lambda: cross_entropy(student.logits, labels),
        "kd": lambda: soft_target_kl(*logits, settings.temperature),
        "alignment": lambda: alignment(*projected, settings.alignment_alpha),
        "uniformity": lambda: sum(uniformity(points, settings.uniformity_t) for points in projected) / 2,
        "info_nce": lambda: info_nce(*projected, tau),
        "crd": lambda: crd(*projected, negatives[:2], negatives.allowed, negatives.means, tau),
        "srrl": lambda: srrl(student.adapted, student.adapted_logits, teacher.features, teacher.logits),
        "dkd": lambda: dkd(
            *logits, labels, settings.temperature, settings.dkd_target_factor, settings.dkd_other_factor
        ),
        "dist": lambda: dist(*logits, settings.temperature),
        "standardised_kd": lambda: standardised_kl(*logits, settings.temperature),
        "feature": lambda: feature_distance(student.adapted, teacher.features, settings.feature_distance),
        "rkd_distance": lambda: rkd_distance(student.features, teacher.features),
        "rkd_angle": lambda: rkd_angle(student.features, teacher.features),
    }
    return formulas[name]()


def total(weights: Mapping[str, float], *batch: object, **more: object) -> float:
    """Of `term`, which is given what stands behind the weights."""
    return sum(weight * term(name, *batch, **more) for name, weight in weights.items() if weight)


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
