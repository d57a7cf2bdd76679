"""The small real run of the stages' tests."""

from tests.stages.conftest import (
    image_folder,
    progress,
    ray_session,
    taught,
    taught_workspace,
    teacher_weights,
    tiny_set,
    words,
)

__all__ = [
    "image_folder",
    "progress",
    "ray_session",
    "taught",
    "taught_workspace",
    "teacher_weights",
    "tiny_set",
    "words",
]
