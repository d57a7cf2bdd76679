"""A student that was exported, without a run before it."""

from __future__ import annotations

from tests.stages.conftest import exported, progress, ray_session, tiny_set  # noqa: F401
