"""evaluate: what is measured."""

from __future__ import annotations

from raydistill.config.section import Count, Section


class Evaluate(Section):
    batch_size: Count = 64
    """Changes the speed of `evaluate`, never its numbers."""
    calibration_bins: Count = 15
    """Bins of the reliability diagram and of the expected calibration error."""
    time_teacher: bool = False
    """Also measure the teacher's images a second, here and in `export`."""
