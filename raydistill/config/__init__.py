"""The config: every key a user can set, its default, its bounds, and what it is for.

Only this package has defaults, and they are the paper's if it has one. Nothing here imports torch or ray, so
`raydistill --help` and `raydistill show` answer at once.
"""

from raydistill.config.cluster import Cluster
from raydistill.config.distill import Distill
from raydistill.config.evaluate import Evaluate
from raydistill.config.export import Export
from raydistill.config.generate import ClassPrompt, Filter, Generate
from raydistill.config.images import SHARD_BYTES, Images
from raydistill.config.job import RunConfig, fine_tuning, members
from raydistill.config.keys import known_keys, suggest_key
from raydistill.config.loss import Loss
from raydistill.config.merge import load_config, merged, overlay, shown_yaml, to_yaml
from raydistill.config.models import SingleTeacher, Student, Teacher
from raydistill.config.search import Compare, Tune
from raydistill.config.section import Section
from raydistill.config.tracking import Tracking
from raydistill.config.views import BEYOND_COLOUR, Changes, Views

__all__ = [
    "BEYOND_COLOUR", "SHARD_BYTES", "Changes", "ClassPrompt", "Cluster", "Compare", "Distill", "Evaluate", "Export",
    "Filter", "Generate", "Images", "Loss", "RunConfig", "Section", "SingleTeacher", "Student", "Teacher", "Tracking",
    "Tune", "Views", "fine_tuning", "known_keys", "load_config", "members", "merged", "overlay", "shown_yaml",
    "suggest_key", "to_yaml",
]  # fmt: skip
