"""The small real inputs and runs."""

from tests.small_run import *  # noqa: F403 - fixtures
