"""The job: all sections, and the rules between them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from raydistill.config.cluster import Cluster
from raydistill.config.distill import Distill
from raydistill.config.evaluate import Evaluate
from raydistill.config.export import Export
from raydistill.config.generate import Generate
from raydistill.config.images import Images
from raydistill.config.loss import Loss
from raydistill.config.models import Student, Teacher
from raydistill.config.search import Compare, Tune
from raydistill.config.section import Place, Section
from raydistill.config.tracking import Tracking
from raydistill.config.views import Views
from raydistill.secrets import has_secret


class RunConfig(Section):
    """One run: what it learns from, what it learns, and where things go."""

    name: str = "raydistill"
    """The MLflow experiment and the title of the report. Where it is not given, MLFLOW_EXPERIMENT_NAME names the
    experiment."""
    workspace: Place = "./workspace"
    """Where stage directories go: any fsspec path that all nodes see, without a password, since every stage records its
    place."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """What is drawn at random, from splits to views, follows from it."""
    images: Images
    teacher: Teacher | None = Teacher()
    """null: no teacher; a run without soft targets needs none."""
    student: Student = Student()
    views: Views = Views()
    generate: Generate | None = None
    """null: no generated images."""
    loss: Loss = Loss()
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    compare: Compare = Compare()
    tune: Tune = Tune()
    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if has_secret(self.workspace):
            raise ValueError(
                f"workspace={self.workspace} holds a password or a key, which every stage would record; leave it out "
                "and give it by the environment (AWS_…, or FSSPEC_PROTOCOL_KEYWORD as in FSSPEC_SFTP_PASSWORD)"
            )
        if self.teacher is None and self.loss.needs_teacher:
            with_teacher = ", ".join(f"loss.{term}_weight" for term in self.loss.terms if term != "task")
            raise ValueError(f"teacher is null, but {with_teacher} need one; name a teacher or set them to 0")
        if not self.loss.terms:
            raise ValueError("every weight under loss is 0, so there is nothing to learn; raise one of them")
        if self.distill.batch_size < self.distill.most_workers:
            raise ValueError(
                f"distill.batch_size is {self.distill.batch_size}, fewer than the {self.distill.most_workers} workers "
                "of distill.num_workers; raise the first or lower the second"
            )
        workers = self.distill.num_workers
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError(
                f"distill.num_workers is (fewest, most); {list(workers)} has them the wrong way round; write "
                f"{list(workers[::-1])}"
            )
        if self.student.weights and self.student.init == "random":
            raise ValueError(
                "student.weights is given but student.init is random; set student.init=pretrained or "
                "student.weights=null"
            )
        if self.distill.body_rate == 0 and self.student.init == "random":
            raise ValueError(
                "distill.body_rate is 0, which keeps a random body as it is; set student.init=pretrained or raise it"
            )
        if self.generate is not None and self.generate.filter.needs_teacher and not self.loss.needs_teacher:
            raise ValueError(
                "generate.filter asks the teacher (confidence, agreement or weigh), but no term of the loss needs one, "
                "so none is adapted; leave them out"
            )
        if self.generate is not None and self.generate.task_weight == 0 and not self.loss.needs_teacher:
            raise ValueError(
                "generate.task_weight is 0 and no term of the loss needs a teacher, so the student would learn nothing "
                "from generated images; raise it, or set generate=null"
            )
        if self.teacher is not None and self.teacher.head == "fine_tune" and self.teacher.center_crop:
            raise ValueError(
                "teacher.center_crop is for a model that is not trained; drop it or teacher.head=fine_tune"
            )
        if self.teacher is not None and self.teacher.stored is not None:
            self._answers_are_stored(self.teacher)
        if self.teacher is not None and self.teacher.head == "zero_shot":
            if plain := [prompt for prompt in self.teacher.prompts if "{class}" not in prompt]:
                raise ValueError(f"teacher.prompts: {plain[0]!r} does not say where the class name goes; use {{class}}")
        return self

    def _answers_are_stored(self, teacher: Teacher) -> None:
        odd = [f"teacher.{key}" for key in ("head", "weights", "revision", "size") if key in teacher.model_fields_set]
        odd += ["views.per_image=fresh"] * (self.views.per_image == "fresh")
        odd += ["views.store=compact"] * (self.views.store == "compact")
        if odd and self.loss.needs_teacher:
            raise ValueError(
                f"teacher.model={teacher.model} is a folder of stored answers, and {odd[0]} needs a network; drop one"
            )
        if self.generate is not None and self.loss.needs_teacher:
            raise ValueError(
                f"teacher.model={teacher.model} is a folder of stored answers, and there are none to generated images; "
                "set generate=null, or name a network"
            )

    @property
    def train_workers(self) -> int | tuple[int, int]:
        """`distill.num_workers`, and what `auto` stands for in this job."""
        workers = self.distill.num_workers
        return int(self.cluster.address is not None) if workers == "auto" else workers

    @property
    def resolved(self) -> RunConfig:
        """The same job, with the numbers that a preset stands for written out."""
        return self.model_copy(update={"views": self.views.resolved})

    @property
    def streams_generated(self) -> bool:
        """Whether the teacher processes the stored views of generated images while they are made. A cluster has room
        for both; on one machine they would slow each other down."""
        stored = self.loss.needs_teacher and self.views.per_image != "fresh"
        return self.generate is not None and stored and self.cluster.address is not None

    @property
    def shows_generated(self) -> bool:
        """Whether a teacher runs beside the generators."""
        return self.generate is not None and (self.generate.filter.needs_teacher or self.streams_generated)


def members(config: RunConfig) -> tuple[RunConfig, ...]:
    """The job with each model of a committee as its only teacher, whose soft targets are stored in full; the job itself
    with one teacher."""
    assert config.teacher is not None
    if len(each := config.teacher.members) == 1:
        return (config,)
    views = config.views.model_copy(update={"store": "full"})
    return tuple(config.model_copy(update={"teacher": teacher, "views": views}) for teacher in each)


def fine_tuning(config: RunConfig) -> RunConfig:
    """The config that fine-tunes the teacher of `config`: its model is a student that learns from labels only, from its
    own weights, with a head that learns ten times as fast as the body (the paper's recipe)."""
    teacher = config.teacher
    assert teacher is not None
    of_model = teacher.model_dump(include={"model", "weights", "revision", "size"})
    # The student's settings are left out, so a search over them does not train the teacher again.
    where = config.distill.model_dump(
        include={"num_workers", "precision", "channels_last", "cache", "checkpoint_seconds", "max_failures"}
    )
    distill = Distill(
        epochs=teacher.fine_tune_epochs, batch_size=teacher.fine_tune_batch_size,
        learning_rate=teacher.fine_tune_learning_rate, body_rate=0.1, decay_norms=True, **where,
    )  # fmt: skip
    return config.model_copy(
        update={
            "teacher": None,
            "generate": None,
            "student": Student(**of_model, init="pretrained"),
            "views": config.views.model_copy(update={"per_image": "fresh", "store": "full"}),
            "loss": Loss(kd_weight=0, alignment_weight=0, uniformity_weight=0),
            "distill": distill,
        }
    )
