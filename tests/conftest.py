"""Shared by all tiers: nothing here starts Ray."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from tests.buckets import bucket, s3_line, s3_server  # noqa: F401 - fixtures
from tests.servers import head  # noqa: F401 - a fixture

# The machine decides how long an example takes; a slow one is no fault.
settings.register_profile("raydistill", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("raydistill")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small take ten times as long where torch's threads wait for each other on a busy machine."""
    import torch  # not every module of tests needs it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_class_pipeline(folder: Path) -> None:
    """A diffusion pipeline of random weights for the classes red, green and blue, and no class, at 16 pixels."""
    import diffusers
    import torch

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=4,
    )  # fmt: skip
    diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()).save_pretrained(folder)
    (folder / "classes.json").write_text(json.dumps({"classes": ["red", "green", "blue"], "null": 3}))


@pytest.fixture(scope="session")
def class_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("class") / "pipeline"
    save_class_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def text_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """Saves a StableDiffusionPipeline of random weights at 16 pixels, with or without a safety checker."""

    def save(with_checker: bool) -> Path:
        import diffusers
        import torch
        import transformers
        from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
        from tokenizers.pre_tokenizers import ByteLevel

        folder = tmp_path_factory.mktemp("text")
        letters = sorted(ByteLevel.alphabet())
        tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        torch.manual_seed(0)
        tower = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
        ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
        text = transformers.CLIPTextConfig(**tower, **ends, vocab_size=len(tokens), max_position_embeddings=24)
        vision = {**tower, "image_size": 16, "patch_size": 8}
        checker = StableDiffusionSafetyChecker(
            transformers.CLIPConfig(text_config=tower, vision_config=vision, projection_dim=8)
        )
        diffusers.StableDiffusionPipeline(
            vae=diffusers.AutoencoderKL(
                block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16,
                down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            ),
            text_encoder=transformers.CLIPTextModel(text),
            tokenizer=transformers.CLIPTokenizer(
                str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24
            ),
            unet=diffusers.UNet2DConditionModel(
                sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                cross_attention_dim=16, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            ),
            scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=checker if with_checker else None,
            feature_extractor=transformers.CLIPImageProcessor(
                size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
            ),
            requires_safety_checker=with_checker,
        ).save_pretrained(folder / "pipeline")  # fmt: skip
        return folder / "pipeline"

    return save


@pytest.fixture
def class_folders(tmp_path: Path) -> Callable[[Mapping[str, int]], Path]:
    """Writes a tree of small, distinct pictures: `{"train/cat": 3}` makes three in that folder. Gives the root."""

    def write(counts: Mapping[str, int], name: str = "images") -> Path:
        root = tmp_path / name
        generator = np.random.default_rng(0)
        for folder, count in counts.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                picture = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(picture).save(root / folder / f"{index}.png")
        return root

    return write


@pytest.fixture
def photo() -> np.ndarray:
    """128 x 128 x 3 pixels with what photographs have: soft shades, a sharp edge, fine texture, sensor noise."""
    rows, columns = np.mgrid[0:128, 0:128] / 128
    shades = np.stack(
        [0.5 + 0.4 * np.sin(9 * columns + 3 * rows), 0.5 + 0.4 * np.cos(21 * rows * columns), columns * rows], axis=-1
    )
    shades[40:80, 30:90] = [0.9, 0.1, 0.2]
    shades[90:120, 10:60] *= 0.6 + 0.4 * (np.arange(50) % 4 < 2)[None, :, None]
    shades += np.random.default_rng(0).normal(0, 0.02, shades.shape)
    return (shades.clip(0, 1) * 255).round().astype(np.uint8)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class folders of 24 pictures each, an unlabelled folder, and files that are not pictures."""
    from tests.small_run import CLASSES, painted

    root, rng = tmp_path_factory.mktemp("images") / "set", np.random.default_rng(1)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(24):
            painted(label, rng, 40).save(root / name / f"{i}.png")
    (root / "unlabelled").mkdir()
    for i in range(12):
        painted(i % 3, rng, 40).save(root / "unlabelled" / f"{i}.png")
    whole = (root / "red" / "0.png").read_bytes()
    (root / "red" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "red" / "copy.png").write_bytes(whole)
    (root / "red" / ".DS_Store").write_bytes(b"junk")
    return root


@pytest.fixture(scope="session")
def teacher_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network's weights: random, but always the same."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    network = timm.create_model("test_resnet", num_classes=5)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    return path


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for all tests that need it; the code under test joins the one there is."""
    import ray

    from raydistill.cluster.session import configure_ray_data

    ray.init(
        address="local", num_cpus=2, object_store_memory=300 * 1024**2, include_dashboard=False, log_to_driver=False
    )
    configure_ray_data()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def taught_workspace(ray_session, image_folder: Path, teacher_weights: Path, tmp_path_factory) -> Path:
    """That of a small real run whose stages up to `teach` are done: twenty seconds that many tests need not spend."""
    from rich.console import Console

    from raydistill.config import load_config
    from raydistill.run import run_stages
    from raydistill.runtime.progress import Progress
    from tests.small_run import small_job

    folder = tmp_path_factory.mktemp("taught")
    job = load_config(small_job(folder, image_folder, teacher_weights))
    run_stages(job, Progress(Console(quiet=True)), "teach")
    return folder / "workspace"
