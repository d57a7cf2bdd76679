"""The one configuration tree: every key a user can type, its default, its bounds, and what it is for.

Defaults live here alone and are the paper's where the paper has one. Neither torch nor ray is imported, so that
`raydistill --help` and `raydistill show` answer at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raydistill.documents import as_yaml, parse, read_mapping
from raydistill.errors import ConfigError
from raydistill.secrets import has_secret, redacted_tree, remember, texts

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


SHARD_BYTES = 64 * 1024**2


class Section(BaseModel):
    """A frozen part of the tree that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Images(Section):
    path: Annotated[str, Field(min_length=1)]
    """A folder of class folders, a .csv/.jsonl of path+label, a .parquet of image+label, or `example:NAME`."""
    size: Annotated[int, Field(ge=8, le=2048)] = 128
    """Side in pixels of the square working image that every later stage reads."""
    fit: Literal["crop", "pad"] = "crop"
    """How a picture becomes square: cut to its centre, or padded with white."""
    classes: str | None = None
    """A text file with one class name a line; without it the classes are those of the train split, sorted."""
    val_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of each class for validation, where the data names no validation split."""
    test_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of each class for the test, where the data names no test split."""
    max_per_class: Count | None = None
    """Use no more than this many images of a class in a split (and unlabelled ones), chosen by name; null: all."""
    num_labelled: Count | None = None
    """Keep the labels of this many train images (stratified, seeded); the others become unlabelled."""
    num_unlabelled: Annotated[int, Field(ge=0)] | None = None
    """Keep this many of the train images without a label (seeded); null: all."""
    allow_missing_val: bool = False
    """Accept a class that has no validation image; it is then never scored on val."""
    max_bad_share: Share = 0.05
    """Above this share of unreadable files the run stops."""
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 178_956_970
    """A picture with more pixels is refused before it is decoded (Pillow's own limit for decompression bombs)."""
    max_bytes: Count = 256 * 1024**2
    """A picture whose file, row or tar member has more bytes is refused before it is read."""
    shard_size: Count = 256
    """Images in a shard, of 64 MiB of pixels at most: the unit of teaching, of loss to a dead node, of streaming."""

    @property
    def rows_per_shard(self) -> int:
        """What `shard_size` comes to at this `size`. A shard goes through a worker's memory in one piece."""
        return max(1, min(self.shard_size, SHARD_BYTES // (3 * self.size**2)))


class Teacher(Section):
    model: str = "timm:vit_base_patch16_224"
    """`timm:NAME`, `hf:NAME`, or a local folder that timm, transformers or raydistill's `distill` saved."""
    weights: str | None = None
    """A .safetensors or .pth state dict, or `example:NAME`; null: what the model's name stands for."""
    revision: str | None = None
    """Revision (a commit hash for choice) of a hub model."""
    head: Literal["linear_probe", "native", "fine_tune", "zero_shot"] = "linear_probe"
    """`linear_probe`: fitted here on the labelled train images; `native`: the model's own, matched by class name;
    `fine_tune`: the whole model is trained on them first; `zero_shot`: from the class names, by a CLIP-like model."""
    fine_tune_epochs: Count = 10
    """Passes over as many images as the train split holds, for `fine_tune`."""
    fine_tune_learning_rate: Positive = 1e-3
    """Of the new head in `fine_tune`; the body's is a tenth of it."""
    fine_tune_batch_size: Count = 64
    """Images in one step of `fine_tune`, over all workers together."""
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = ("a photo of a {class}.",)
    """Sentences for `zero_shot`, averaged; `{class}` stands for the class name."""
    class_balanced: bool = False
    """Weigh classes equally when the linear probe is fitted."""
    size: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Side in pixels that the teacher sees; null: the size it was trained at."""
    center_crop: bool = False
    """Of whole images, cut off the margin that the model's own configuration cuts off (timm's `crop_pct`, a center
    crop of transformers; a folder of raydistill's has none). Of a view nothing is cut off, unless it is whole."""
    batch_size: Count = 64
    """Views in one forward pass of a teacher actor."""
    allow_near_chance: bool = False
    """Go on although the teacher's val accuracy is hardly above that of guessing."""


class Student(Section):
    model: str = "timm:mobilenetv3_small_100"
    """`timm:NAME` or `hf:NAME` (an image classifier of transformers; a folder serves as a name)."""
    init: Literal["random", "pretrained"] = "random"
    """`pretrained` starts from `weights`, or from what the hub has under the model's name."""
    weights: str | None = None
    """A state dict or `example:NAME` for `init: pretrained`."""
    revision: str | None = None
    """Revision (a commit hash for choice) of a hub model."""
    size: Annotated[int, Field(ge=8, le=2048)] | None = 64
    """Side in pixels that the student sees, in training and ever after; null: the size its model was made for."""


class Views(Section):
    per_image: Count | Literal["fresh"] = 8
    """K views an image, their soft targets stored once and replayed; or `fresh`: a new view in each epoch."""
    min_scale: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Smallest share of the image's area that a random crop keeps (RandomResizedCrop)."""
    max_ratio: Annotated[float, Field(ge=1)] = 4 / 3
    """Widest aspect ratio of a random crop; the narrowest is its inverse."""
    flip: Share = 0.5
    """Chance of a left-right flip."""
    brightness: Share = 0.0
    """Largest relative change of brightness."""
    contrast: Share = 0.0
    """Largest relative change of contrast."""
    saturation: Share = 0.0
    """Largest relative change of saturation."""


class ClassPrompt(Section):
    """What `generate` does differently for one class; null: as for the others."""

    templates: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    negative_prompt: str | None = None
    steps: Count | None = None
    guidance: Weight | None = None


class Filter(Section):
    """What of the generated images is kept. Each rejection is in the ledger with its reason."""

    contrast: Weight = 3.0
    """Smallest standard deviation of an image's brightness, of 255; below it the image is near-constant."""
    duplicate_distance: Annotated[int, Field(ge=0, le=256)] | None = 4
    """Images of one class, or an image and one of val or test, are duplicates when at most this many of the 256 bits of
    their difference hashes differ; null: only equal files are."""
    confidence: Share | None = None
    """Smallest probability that the adapted teacher must give the class; null: not asked."""
    class_confidence: dict[str, Share] = {}
    """The same for single classes, by name."""
    agreement: bool = False
    """Keep only images whose class the adapted teacher names first."""
    weigh: bool = False
    """Weigh the hard label of a kept image by the teacher's probability of its class."""

    @property
    def needs_teacher(self) -> bool:
        return self.confidence is not None or bool(self.class_confidence) or self.agreement or self.weigh


class Generate(Section):
    pipeline: Annotated[str, Field(min_length=1)]
    """A diffusion pipeline of diffusers: a name on the hub or a local folder. Text-to-image, image-to-image (with
    `strength`), class-conditional or unconditional."""
    revision: str | None = None
    """Revision (a commit hash for choice) of a hub pipeline."""
    ratio: Weight = 1.0
    """Generated images of a class for each of its labelled train images."""
    per_class: Count | None = None
    """Generated images of each class, instead of `ratio`."""
    balance: bool = False
    """Fill every class up to the largest, instead of `ratio`."""
    templates: Annotated[tuple[str, ...] | dict[str, Positive], Field(min_length=1)] = ("a picture of a {class}",)
    """Prompts with `{class}` (and `{description}`), drawn equally often or by the weights given."""
    names: str | None = None
    """A YAML or JSON file from class names to words, or to {words, synonyms, description}."""
    overrides: dict[str, ClassPrompt] = {}
    """Settings of single classes, by name."""
    negative_prompt: str | None = None
    class_ids: dict[str, Annotated[int, Field(ge=0)]] | None = None
    """The pipeline's number of each class, for a class-conditional one; null: by the names it brings."""
    scheduler: str | None = None
    """Class name of a scheduler of diffusers; null: the pipeline's own."""
    steps: Count = 50
    guidance: Weight = 7.5
    """Classifier-free guidance; 1 or less: none."""
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    """Start from train images of the class, with this much noise (image-to-image)."""
    size: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Side in pixels of what the pipeline makes; null: its own."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    batch_size: Count = 8
    """Images in one call on a GPU, and in one file; on CPUs they are made one by one, so that it changes no image."""
    safety_checker: bool = True
    """Reject what the pipeline's safety checker flags; a text-to-image pipeline without one is refused."""
    attempts: Count = 3
    """How often an image is tried, each time with another recorded seed, before it counts as missing."""
    filter: Filter = Filter()
    task_weight: Share = 1.0
    """Weight of generated images in the cross-entropy; 0: they are learnt from through soft targets alone."""
    share: Share | None = None
    """Share of generated images in each batch; null: their share of all train images."""

    @model_validator(mode="after")
    def _one_count(self) -> Generate:
        if self.per_class is not None and self.balance:
            raise ValueError("generate.per_class and generate.balance both say how many; set one of them")
        return self

    def prompt_settings(self, name: str) -> ClassPrompt:
        """The settings of a class: its own where they are given."""
        own = self.overrides.get(name, ClassPrompt())
        return ClassPrompt(
            templates=own.templates,
            negative_prompt=self.negative_prompt if own.negative_prompt is None else own.negative_prompt,
            steps=own.steps or self.steps,
            guidance=self.guidance if own.guidance is None else own.guidance,
        )


class Loss(Section):
    """A weighted sum. Each `*_weight` is a number, or [first, last] for one that changes linearly over training."""

    task_weight: Weight | tuple[Weight, Weight] = 1.0
    """Cross-entropy with the labels; unlabelled images do not take part in it."""
    kd_weight: Weight | tuple[Weight, Weight] = 1.0
    """Soft-target KL divergence (Hinton et al. 2015)."""
    temperature: Positive = 4.0
    """Softens both distributions of the terms on logits: kd, dkd, dist and standardised_kd."""
    alignment_weight: Weight | tuple[Weight, Weight] = 1.0
    """Distance of the two networks' projected features of one view (Wang & Isola 2020)."""
    uniformity_weight: Weight | tuple[Weight, Weight] = 1.0
    """Spread of the projected features over the unit sphere, averaged over both networks."""
    alignment_alpha: Positive = 2.0
    """Power of the distance in the alignment term."""
    uniformity_t: Positive = 2.0
    """Sharpness of the Gaussian potential in the uniformity term."""
    info_nce_weight: Weight | tuple[Weight, Weight] = 0.0
    """InfoNCE between student and teacher, the other images of a worker's batch as negatives (van den Oord 2018)."""
    crd_weight: Weight | tuple[Weight, Weight] = 0.0
    """Contrastive representation distillation with a memory of negatives (Tian et al. 2020)."""
    contrastive_temperature: Positive = 0.07
    """Divides the cosine similarities of info_nce and crd."""
    crd_negatives: Count = 4096
    """Negatives in a step of crd, at most."""
    crd_memory: Count = 16384
    """Embeddings that crd remembers of each network; the oldest make room."""
    srrl_weight: Weight | tuple[Weight, Weight] = 0.0
    """Features and what the teacher's head makes of them (SRRL, Yang et al. 2021)."""
    dkd_weight: Weight | tuple[Weight, Weight] = 0.0
    """Decoupled KD (Zhao et al. 2022)."""
    dkd_target_factor: Weight = 1.0
    """Of the part about the target class in dkd (the paper's alpha)."""
    dkd_other_factor: Weight = 8.0
    """Of the part about the other classes in dkd (the paper's beta)."""
    dist_weight: Weight | tuple[Weight, Weight] = 0.0
    """Correlations within images and within classes (DIST, Huang et al. 2022)."""
    standardised_kd_weight: Weight | tuple[Weight, Weight] = 0.0
    """Soft-target KL of standardised logits (Sun et al. 2024)."""
    feature_weight: Weight | tuple[Weight, Weight] = 0.0
    """Adapted student features against the teacher's (Romero et al. 2015)."""
    feature_distance: Literal["mse", "cosine"] = "mse"
    """How far apart features are in the feature term."""
    rkd_distance_weight: Weight | tuple[Weight, Weight] = 0.0
    """Relative distances of pairs of images (RKD, Park et al. 2019, who use 25)."""
    rkd_angle_weight: Weight | tuple[Weight, Weight] = 0.0
    """Angles of triples of images (RKD, who use 50)."""
    projection_head: Literal["linear", "two_layer", "simclr", "simclrv2"] = "two_layer"
    """The trained map to the unit sphere, on both sides, for alignment, uniformity, info_nce and crd. `simclr` has
    batch norm: where the uniformity term stays near 0 for long, all embeddings lie on one point, and it helps."""
    projection_dim: Annotated[int, Field(ge=2)] = 128
    """Dimension of the unit sphere that both projection heads map to."""
    adapter: Literal["linear", "two_layer"] = "two_layer"
    """The trained map from the student's features to the teacher's, for srrl and feature."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that weigh anything at any time, in the order in which they are declared."""
        weights = self.model_dump(include={key for key in Loss.model_fields if key.endswith("_weight")})
        heaviest = {key: max(w) if isinstance(w, list | tuple) else w for key, w in weights.items()}
        return tuple(key.removesuffix("_weight") for key, weight in heaviest.items() if weight > 0)

    def weight(self, term: str, progress: float) -> float:
        """The weight of a term when a share `progress` of all steps is done."""
        weight = getattr(self, f"{term}_weight")
        return float(weight[0] + (weight[1] - weight[0]) * progress if isinstance(weight, tuple) else weight)

    @property
    def needs_projection(self) -> bool:
        return not {"alignment", "uniformity", "info_nce", "crd"}.isdisjoint(self.terms)

    @property
    def projects_with_batch_norm(self) -> bool:
        return self.needs_projection and self.projection_head.startswith("simclr")

    @property
    def needs_adapter(self) -> bool:
        return not {"srrl", "feature"}.isdisjoint(self.terms)

    @property
    def needs_teacher(self) -> bool:
        return not {"task"}.issuperset(self.terms)


class Distill(Section):
    epochs: Count = 60
    """Passes over as many images as the train split holds, labelled and unlabelled, in whole steps: rounded up."""
    batch_size: Count = 64
    """Images in one optimizer step, over all workers together."""
    labelled_share: Share | None = None
    """Share of each batch drawn from labelled images; null: their share of the train split, a third at least."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive = 1e-3
    """Highest learning rate, reached after the warm-up."""
    body_rate: Share = 1.0
    """Learning rate of all but the classifier, relative to the classifier's; 0 freezes it, batch norm included."""
    weight_decay: Weight = 1e-2
    momentum: Share = 0.9
    """For `sgd`."""
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: Weight = 0.0
    """Epochs (or a fraction) over which the learning rate rises from zero."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, which then is the student; null: none."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of the student's forward pass; losses stay in fp32."""
    channels_last: bool = True
    """Lay images out pixel by pixel: convolutions are faster so, others no slower."""
    clip_norm: Positive | None = None
    """Largest norm of the gradient; null: not clipped."""
    val_every: Count = 5
    """Epochs between measurements on the val split; the last epoch is always measured."""
    keep: Literal["auto", "best", "last"] = "auto"
    """Which epoch ships: the `last`, or, of those measured, the `best` on val (of equals the latest). `auto`: the best
    where the val images tell that it is better than the last (McNemar's test at 5 %, divided by the epochs that it is
    the best of), else the last, and a better epoch is named."""
    num_workers: Annotated[int, Field(ge=0)] | tuple[Count, Count] = 1
    """Ray Train workers; 0: in this process; (min, max): as many as the cluster has at the moment."""
    cache: Literal["auto", "memory", "stream"] = "auto"
    """Where a worker keeps the train split: `memory` loads it once, `stream` reads shards as they are needed."""
    checkpoint_seconds: Weight = 5.0
    """Between checkpoints, within epochs too, and at least four times as long as one takes to be written; a lost
    process costs what came after. 0: at the end of every epoch, and nowhere else."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Lost workers that Ray Train replaces before the run fails (preemptions do not count)."""

    @property
    def most_workers(self) -> int:
        return self.num_workers[1] if isinstance(self.num_workers, tuple) else max(self.num_workers, 1)


class Evaluate(Section):
    batch_size: Count = 64
    """Changes the speed of `evaluate`, never its numbers."""
    calibration_bins: Count = 15
    """Bins of the reliability diagram and of the expected calibration error."""
    time_teacher: bool = False
    """Measure the teacher's images a second too, here and in `export`."""


class Export(Section):
    """The forms in which `export` writes the student."""

    formats: tuple[Literal["onnx", "torch_export"], ...] = ("onnx", "torch_export")
    """Beside the folder that timm or transformers loads, which is always written."""
    preprocessing: bool = False
    """Put resizing and normalising inside the graphs: they take square uint8 images (N, H, H, 3) of images.size then,
    and otherwise normalised ones (N, 3, S, S) of student.size."""
    int8: Literal["dynamic", "static"] | None = None
    """Also an ONNX file with INT8 weights; `static`: and INT8 activations, calibrated on train images."""
    int8_max_drop: Share = 0.05
    """The accuracy on val that INT8 may lose, 0.05 being five points; without labels, the share of answers that it may
    change. A file that loses more is left out. 1: any."""
    allow_useless: bool = False
    """Export a student that is no better than always naming the commonest class, too."""
    hub: str | None = None
    """A repository on the Hugging Face hub to push the folder to; private, if it is new."""
    register_as: str | None = None
    """A name in MLflow's model registry for the student; null: it is logged and not registered."""

    @model_validator(mode="after")
    def _has_onnx(self) -> Export:
        if self.int8 is not None and "onnx" not in self.formats:
            raise ValueError(f"export.int8={self.int8} is made from the ONNX file; put onnx into export.formats")
        return self


Arm = Literal[
    "scratch", "linear_probe", "fine_tune", "kd", "align_uniform", "crd", "distill_pretrained", "job"
]  # fmt: skip


class Compare(Section):
    """What `compare` trains; the other stages do not read it."""

    arms: Annotated[tuple[Arm, ...], Field(min_length=1)] = (
        "scratch", "linear_probe", "fine_tune", "kd", "align_uniform", "crd", "distill_pretrained",
    )  # fmt: skip
    """Ways to train the student. `linear_probe`, `fine_tune` and `distill_pretrained` start from a pre-trained one."""
    seeds: Count = 3
    """Runs of each arm, with the seeds that follow the job's."""
    student_weights: str | None = None
    """Pre-trained weights of the student, for the arms that need them: a state dict or `example:NAME`; null: the
    hub's."""
    label_shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.125, 0.25, 0.5, 1.0)
    """Shares of the labels at which `--learning-curve` trains."""


Objective = Literal[
    "val_accuracy", "val_balanced_accuracy", "val_top5", "val_ece", "loss", "parameters", "milliseconds_per_image"
]  # fmt: skip


class Tune(Section):
    """How `tune` searches; the other stages do not read it."""

    space: str | None = None
    """A YAML file of distributions by config key; `tune_spaces/` has some."""
    trials: Count = 30
    """Trials in all, the first of which has the job's own values; raise it and the search goes on."""
    sampler: Literal["tpe", "gp", "cmaes", "qmc", "random", "grid"] = "tpe"
    """Optuna's sampler, seeded by the job's seed."""
    pruner: Literal["asha", "median", "none"] = "asha"
    """Ends trials that fall behind: asynchronous successive halving, or below the median of those before."""
    grace_epochs: Count | None = None
    """Epochs that every trial gets; null: a fifth of distill.epochs."""
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = ("val_accuracy",)
    """What is optimised; several give a Pareto front, of which `best` is the one that is first in the first."""
    concurrent: Count | None = None
    """Trials at once; null: one on each GPU or, without any, one on every 4 CPUs."""
    confirm_seeds: Annotated[int, Field(ge=0)] = 3
    """New seeds with which the best and the job's own values are trained again, and measured on test; 0: none."""
    storage: str | None = None
    """URL of a database for Optuna's study; null: SQLite in the stage directory."""

    @model_validator(mode="after")
    def _prunable(self) -> Tune:
        if self.pruner != "none" and self.objectives not in (("val_accuracy",), ("loss",)):
            raise ValueError(
                f"tune.pruner={self.pruner} compares what is measured during training, and tune.objectives="
                f"{list(self.objectives)} is known at the end; set tune.pruner=none"
            )
        return self


class Cluster(Section):
    address: str | None = None
    """Ray cluster to join; null: one of its own on this machine, for as long as the command runs."""
    teacher_actors: tuple[Count, Count] = (1, 4)
    """Fewest and most teacher actors; the plan lowers the second to what fits."""
    generator_actors: tuple[Annotated[int, Field(ge=0)], Count] = (1, 8)
    """Fewest and most generator actors at once, while `generate` runs; before and after it there are none."""
    generator_labels: dict[str, str] | None = None
    """Node labels that generator actors ask for, as {pool: spot}; null: any node will do."""
    generator_fallback: dict[str, str] | None = None
    """Labels that will do where no node has the first, {} for any node; null: wait for one."""
    spill_directory: str | None = None
    """Where this machine's own Ray writes what its memory does not hold; null: in Ray's folder, under /tmp."""
    grows_to: dict[Literal["CPU", "GPU"], Annotated[float, Field(ge=0)]] | None = None
    """The most CPUs and GPUs that the cluster's autoscaler may start, as {CPU: 48, GPU: 6}; null: what is there."""

    price_per_hour: Weight | None = None
    """What the machines cost an hour, in any currency, for the forecast and the bill of `tune`; null: seconds alone."""
    prices: dict[str, Weight] = {}
    """What a node of each type costs an hour, as {train: 0.98, spot: 0.35, head: 0.4}, by the node's label `pool`."""

    @model_validator(mode="after")
    def _ordered(self) -> Cluster:
        for key in ("teacher_actors", "generator_actors"):
            fewest, most = getattr(self, key)
            if fewest > most:
                raise ValueError(f"cluster.{key} is (fewest, most); {(fewest, most)} has them the wrong way round")
        return self


class Tracking(Section):
    enabled: bool = True
    """false: no MLflow run."""
    uri: str | None = None
    """MLflow tracking URI; null: MLFLOW_TRACKING_URI, or SQLite in the workspace."""

    @model_validator(mode="after")
    def _store(self) -> Tracking:
        uri = self.uri or "://"
        if uri.startswith("file:") or not (uri.startswith("databricks") or "://" in uri):
            raise ValueError(
                f"tracking.uri={self.uri} is a folder, in which MLflow keeps no runs any more; use "
                "sqlite:////PATH/mlflow.db or a server's http://HOST:PORT"
            )
        return self


class RunConfig(Section):
    """One run: what it learns from, what it learns, and where things go."""

    name: str = "raydistill"
    """The MLflow experiment and the title of the report; without it MLFLOW_EXPERIMENT_NAME names the first."""
    workspace: str = "./workspace"
    """Where stage directories go: any fsspec path that all nodes can see. It holds no password: every stage writes down
    where it lies."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    images: Images
    teacher: Teacher | None = Teacher()
    """null: no teacher, which a run without soft targets needs none of."""
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
                f"workspace={self.workspace} holds a password or a key, which every stage would write down; leave it "
                "out and give it by the environment (AWS_…, or FSSPEC_PROTOCOL_KEYWORD as in FSSPEC_SFTP_PASSWORD)"
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
            raise ValueError(f"distill.num_workers is (fewest, most); {workers} has them the wrong way round")
        if self.student.weights and self.student.init == "random":
            raise ValueError("student.weights is given but student.init is random; set student.init=pretrained")
        if self.distill.body_rate == 0 and self.student.init == "random":
            raise ValueError(
                "distill.body_rate is 0, which keeps a random body as it is; set student.init=pretrained or raise it"
            )
        if self.generate is not None and self.generate.filter.needs_teacher and not self.loss.needs_teacher:
            raise ValueError(
                "generate.filter asks the teacher (confidence, agreement or weigh), but no term of the loss needs one "
                "and none is adapted; leave those out"
            )
        if self.generate is not None and self.generate.task_weight == 0 and not self.loss.needs_teacher:
            raise ValueError(
                "generate.task_weight is 0 and no term of the loss needs a teacher, so nothing would be learnt from "
                "the generated images; raise it, or set generate=null"
            )
        if self.teacher is not None and self.teacher.head == "fine_tune" and self.teacher.center_crop:
            raise ValueError(
                "teacher.center_crop is of a model as it comes, and teacher.head=fine_tune trains it; drop one"
            )
        if self.teacher is not None and self.teacher.head == "zero_shot":
            if plain := [prompt for prompt in self.teacher.prompts if "{class}" not in prompt]:
                raise ValueError(f"teacher.prompts: {plain[0]!r} does not say where the class name goes; use {{class}}")
        return self

    @property
    def streams_generated(self) -> bool:
        """The teacher sees the stored views of generated images as they are made: on a cluster, which has room for
        both; on one machine the two would only slow each other down."""
        stored = self.loss.needs_teacher and self.views.per_image != "fresh"
        return self.generate is not None and stored and self.cluster.address is not None

    @property
    def shows_generated(self) -> bool:
        """A teacher runs beside the generators."""
        return self.generate is not None and (self.generate.filter.needs_teacher or self.streams_generated)


def fine_tuning(config: RunConfig) -> RunConfig:
    """The run that fine-tunes the teacher of `config`: its model is the student of the task alone, from its own
    weights, the new head ten times as fast as the body (the paper's recipe)."""
    teacher = config.teacher
    assert teacher is not None
    student = Student(
        model=teacher.model, init="pretrained", weights=teacher.weights, revision=teacher.revision, size=teacher.size
    )
    # How the student is trained has no say in it: searching the student's settings trains no teacher again.
    where = config.distill.model_dump(
        include={"num_workers", "precision", "channels_last", "cache", "checkpoint_seconds", "max_failures"}
    )
    distill = Distill(
        epochs=teacher.fine_tune_epochs,
        batch_size=teacher.fine_tune_batch_size,
        learning_rate=teacher.fine_tune_learning_rate,
        body_rate=0.1,
        **where,
    )
    return config.model_copy(
        update={
            "teacher": None,
            "generate": None,
            "student": student,
            "views": config.views.model_copy(update={"per_image": "fresh"}),
            "loss": Loss(kd_weight=0, alignment_weight=0, uniformity_weight=0),
            "distill": distill,
        }
    )


def overlay(config: RunConfig, tree: Mapping[str, Any]) -> RunConfig:
    """The config with `tree` laid over it. Raises ConfigError where the result is none."""
    remember(texts(tree))
    try:
        return RunConfig.model_validate(merged(config.model_dump(mode="json"), dict(tree)))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error))) from None


def load_config(words: Sequence[str]) -> RunConfig:
    """Merge job file, overlays and `key=value` words from left to right and validate the result. The value of a word is
    YAML, but for keys whose value is text: there it is taken as it was typed, without quotes or comments of YAML's.

    Raises ConfigError: a file is missing or is not YAML, a key is unknown, a value is out of bounds.
    """
    tree: Any = {}
    remember(word.partition("=")[2] for word in words)
    for word in words:
        try:
            tree = merged(tree, _read_word(word))
        except TypeError as error:
            raise ConfigError(f"{word}: does not fit what it is laid over: {error}") from None
    remember(texts(tree))
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error))) from None


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to the same tree."""
    return as_yaml(config.model_dump(mode="json"))


def shown_yaml(config: RunConfig) -> str:
    """The resolved config for who reads it, without its passwords."""
    return as_yaml(redacted_tree(config.model_dump(mode="json")))


def merged(under: Any, over: Any) -> Any:
    """The second tree laid over the first. Raises TypeError where a section is laid over what is none."""
    if not isinstance(over, dict):
        return over
    if not isinstance(under, dict | None):
        raise TypeError(f"{under!r} has no keys")
    below = under or {}
    return {**below, **{key: merged(below.get(key), value) for key, value in over.items()}}


def _read_word(word: str) -> Any:
    key, equals, value = word.partition("=")
    if not equals or "/" in key:
        return read_mapping(word, "give a job file, an overlay, or key=value")
    tree: Any
    if _takes_text(key):  # as it was typed: to YAML `set #2`, `day: one`, `2024` and `no` are other things than words
        tree = None if not value or (value == "null" and _takes_text(key, or_null=True)) else value
    else:
        tree = next(iter(parse(value, word)), None)
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree


def _takes_text(dotted: str, or_null: bool = False) -> bool:
    """Whether a key's value is text and nothing else or, with `or_null`, may be null as well."""
    model: type[BaseModel] | None = RunConfig
    *sections, leaf = dotted.split(".")
    for name in sections:
        model = _section_of(model, name) if model is not None and name in model.model_fields else None
    if model is None or leaf not in model.model_fields:
        return False
    annotation = model.model_fields[leaf].annotation
    kinds = [annotation] if get_origin(annotation) not in (Union, UnionType) else list(get_args(annotation))
    is_text = [
        kind is str or (get_origin(kind) is Literal and all(isinstance(word, str) for word in get_args(kind)))
        for kind in kinds
        if kind is not NoneType
    ]
    return all(is_text) and (NoneType in kinds or not or_null)


def _explain(error: ValidationError) -> Iterator[str]:
    # A field that takes one of several types reports each of them: one line then says them all.
    heads: dict[str, str] = {}
    tails: dict[str, list[str]] = {}
    for item in error.errors():
        dotted = ".".join(_user_keys(item["loc"]))
        if item["type"] == "extra_forbidden":
            head, tail = f"{dotted}: ", f"unknown key{suggest_key(dotted)}"
        elif dotted in ("images", "images.path") and (item["type"] == "missing" or item["input"] in (None, "")):
            head, tail = "images.path: ", "required; for instance: raydistill run images.path=./my_images"
        elif item["type"] == "value_error":  # a check of ours, whose sentence names its keys
            head, tail = "", str(item["ctx"]["error"])
        elif item["type"] == "string_unicode":
            head, tail = f"{dotted}={item['input']!r}: ", "not UTF-8; give it another name, or a link that has one"
        else:
            head, tail = f"{dotted}={item['input']!r}: ", item["msg"][:1].lower() + item["msg"][1:]
            if item["type"] == "string_type" and isinstance(item["input"], int | float):
                tail += "; put it in quotes"
        field = dotted if head else tail
        heads.setdefault(field, head)
        if tail not in tails.setdefault(field, []):
            tails[field].append(tail)
    for field, head in heads.items():
        yield head + " or ".join(tails[field])


def _user_keys(location: tuple[int | str, ...]) -> list[str]:
    """The part of a pydantic location that names fields: the rest are the names of union members."""
    keys: list[str] = []
    model: type[BaseModel] | None = RunConfig
    for part in map(str, location):
        keys.append(part)
        if model is None or part not in model.model_fields:
            break
        model = _section_of(model, part)
        if model is None:
            break
    return keys


def _section_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    annotation = model.model_fields[name].annotation
    if get_origin(annotation) is dict:  # its keys are the user's own
        return None
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree."""
    for name in model.model_fields:
        yield prefix + name
        if section := _section_of(model, name):
            yield from known_keys(section, f"{prefix}{name}.")


def suggest_key(dotted: str) -> str:
    """The end of a sentence on an unknown key: the known one that it looks like."""
    section, _, leaf = dotted.rpartition(".")
    keys = [key.rpartition(".") for key in known_keys()]
    beside = {name: (place, name) for place, _, name in keys if place == section}
    anywhere = {name: (place, name) for place, _, name in reversed(keys)}  # the right word in the wrong section
    for names in (beside, anywhere):
        if near := difflib.get_close_matches(leaf, names, n=1, cutoff=0.75):
            return f"; did you mean {'.'.join(names[near[0]]).lstrip('.')}?"
    return "; `raydistill show` lists the keys there are"
