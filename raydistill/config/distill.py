"""distill: how the student is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raydistill.config.section import Count, Positive, Precision, Section, Share, Weight


class Distill(Section):
    epochs: Count = 60
    """Passes over as many images as the train split holds, labelled and unlabelled, in whole steps: rounded up."""
    batch_size: Count = 64
    """Images in one optimizer step, over all workers together."""
    labelled_share: Share | None = None
    """Share of each batch drawn from labelled images; null: their share of the train split, at least a third."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Which optimizer takes the steps."""
    learning_rate: Positive = 1e-3
    """Highest learning rate, reached after the warm-up."""
    body_rate: Share = 1.0
    """Learning rate of all layers but the classifier, relative to the classifier's; 0 freezes them, with batch norm."""
    layer_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Learning rate of each layer, relative to that of the next one, for pre-trained timm networks (timm's
    `param_groups_layer_decay`; Bao et al. 2022 use 0.65 to 0.85). body_rate multiplies it. null: all layers have the
    same."""
    weight_decay: Weight = 1e-2
    """How much weights shrink in a step, times the learning rate (decoupled for `adamw`)."""
    decay_norms: bool = False
    """Whether norms, biases and what else a timm network excepts (position embeddings) shrink, too."""
    momentum: Share = 0.9
    """For `sgd`."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """The learning rate after the warm-up: it falls to zero along a cosine, or stays constant."""
    warmup_epochs: Weight = 0.0
    """Epochs (or a fraction) over which the learning rate rises from zero."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, which becomes the student; null: none. It begins lower,
    as (1 + n) / (10 + n) after n + 2 steps, so that a short run does not average its beginning. Val measures the
    averaged weights and the latest ones. The latest ship instead where they are better on val: with keep=auto if its
    test shows it, with keep=best always, with keep=last never."""
    precision: Precision = "auto"
    """Autocast of the student's forward pass; losses stay in fp32. `auto`: bf16 where a short measurement of this
    student's own step shows that it is at least 1.1 times as fast as fp32, else fp32; the workspace keeps the result.
    fp32 means TF32 on GPUs."""
    channels_last: bool = True
    """Lay images out pixel by pixel: convolutions are faster that way, other layers no slower."""
    clip_norm: Positive | None = None
    """Largest norm of the gradient; null: no clipping."""
    val_every: Count = 5
    """Epochs between measurements on the val split. The last epoch is always measured."""
    keep: Literal["auto", "best", "last"] = "auto"
    """Which epoch ships: the `last`, or the `best` of those measured on val (the latest of equals). `auto`: the best
    where the val images show that it is better than the last (McNemar's test at 5 %, divided by the number of looks at
    val, two an epoch with ema_decay), else the last, and a better epoch is named."""
    patience: Count | None = None
    """Stop when val has not risen for this many epochs; only measured epochs count (val_every). The learning rate is
    still planned for all epochs: `schedule: cosine` is then cut off while it is high, which `constant` is not. null:
    never."""
    num_workers: Literal["auto"] | Annotated[int, Field(ge=0)] | tuple[Count, Count] = "auto"
    """Ray Train workers; 0: in this process; (min, max): as many as the cluster has room for at the moment. `auto`: in
    this process, which starts sooner, or one worker where `cluster.address` names a cluster."""
    cache: Literal["auto", "device", "memory", "stream"] = "auto"
    """Where a worker keeps the train split: `device` loads it once into the memory of the device that trains, `memory`
    into the process's, `stream` reads shards when they are needed. `auto`: `device` on a GPU with room for it in a
    quarter of its free memory, else `memory` if it fits into a quarter of the machine's, else `stream`."""
    checkpoint_seconds: Weight = 5.0
    """Between checkpoints, also within epochs, and at least four times as long as it takes to write one. A lost process
    loses what came after the last. 0: at the end of every epoch, and only there."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Lost workers that Ray Train replaces before the run fails (preemptions do not count)."""

    @property
    def most_workers(self) -> int:
        if self.num_workers == "auto":
            return 1
        return self.num_workers[1] if isinstance(self.num_workers, tuple) else max(self.num_workers, 1)
