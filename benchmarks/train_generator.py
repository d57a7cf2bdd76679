"""A small class-conditional diffusion pipeline, trained on what `example:fashion-mnist-10k` leaves of Fashion-MNIST.

    python benchmarks/train_generator.py --out ./fashion-generator

A step takes about 0.95 CPU-seconds, so that the 2,500 of the default take about 25 minutes on two idle cores; 6,000
take an hour or more. A guidance of about 2 suits it (`generate.guidance=2`).

It stands for a generator that was pre-trained on much data of the domain: it sees train images 10,000 to 60,000 with
their labels, so neither an image of the task nor of its test split. The folder is an ordinary one of diffusers
(DDIMPipeline) with `classes.json` beside it, for `generate.pipeline=./fashion-generator`. Killed, the same command goes
on from the last checkpoint, which lies beside the folder.

Shapes: B images, S pixels.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raydistill.examples import images_path
from raydistill.storage.filesystems import write_file

SEEN_BY_THE_TASK = 10_000
NO_CLASS_SHARE = 0.1  # of the images whose class is hidden, so that guidance has something to move away from
AVERAGED_SHARE = 0.4  # of the steps, the time constant of the weights' average: 0.999 a step for 2,500 steps


def new_unet(num_classes: int) -> UNet2DModel:
    """1,541,737 parameters on 28 x 28 grey pixels; the last class number stands for none."""
    return UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, block_out_channels=(24, 48, 96), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), attention_head_dim=8,
        num_class_embeds=num_classes + 1,
    )  # fmt: skip


def load_images() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """(N, 1, 28, 28) in [-1, 1], their class numbers, and the names."""
    table = pq.read_table(images_path("fashion-mnist"))
    table = table.filter(np.array(table["split"].to_pylist()) == "train").slice(SEEN_BY_THE_TASK)
    names = sorted(set(table["label"].to_pylist()))
    labels = torch.tensor([names.index(label) for label in table["label"].to_pylist()])
    images = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in table["image"].to_pylist()])
    return torch.from_numpy(images)[:, None].float() / 127.5 - 1, labels, names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps-between-checkpoints", type=int, default=250)
    options = parser.parse_args()

    images, labels, names = load_images()
    torch.manual_seed(0)
    unet = new_unet(len(names))
    average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / (AVERAGED_SHARE * options.steps)))
    optimizer = torch.optim.AdamW(unet.parameters(), options.learning_rate)
    noise_schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    checkpoint, first = options.out.with_name(f"{options.out.name}.checkpoint.pt"), 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        unet.load_state_dict(state["unet"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    print(f"{sum(p.numel() for p in unet.parameters()):,} parameters, {len(images):,} images, from step {first}")

    started, summed = time.perf_counter(), 0.0
    for step in range(first, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        drawn = torch.Generator().manual_seed(step)  # a resumed run draws what an unbroken one would
        rows = torch.randint(len(images), (options.batch_size,), generator=drawn)
        noise = torch.randn(options.batch_size, 1, 28, 28, generator=drawn)
        t = torch.randint(noise_schedule.config.num_train_timesteps, (options.batch_size,), generator=drawn)
        hidden = torch.rand(options.batch_size, generator=drawn) < NO_CLASS_SHARE
        classes = torch.where(hidden, len(names), labels[rows])
        predicted = unet(noise_schedule.add_noise(images[rows], noise, t), t, class_labels=classes).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(unet)
        summed += loss.item()
        if (step + 1) % options.steps_between_checkpoints == 0 or step + 1 == options.steps:
            state = {"unet": unet.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            state["step"] = step + 1
            write_file(str(checkpoint), lambda temporary, state=state: torch.save(state, temporary))
            done = step + 1 - first
            left = (time.perf_counter() - started) / done * (options.steps - step - 1)
            print(f"{step + 1}/{options.steps} steps, mean loss {summed / done:.4f}, {left:.0f} s left", flush=True)

    pipeline = DDIMPipeline(average.module, DDIMScheduler.from_config(noise_schedule.config))
    pipeline.save_pretrained(options.out)
    (options.out / "classes.json").write_text(json.dumps({"classes": names, "null": len(names)}))
    card = "---\nlicense: mit\n---\nTrained by raydistill's benchmarks/train_generator.py on Fashion-MNIST (MIT).\n"
    (options.out / "README.md").write_text(card)
    print(f"saved: {options.out}")


if __name__ == "__main__":
    main()
