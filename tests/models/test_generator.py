"""Diffusion pipelines: an image is a function of its request alone; what will not do is said before it is loaded."""

from __future__ import annotations

import dataclasses
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from raydistill.config import Generate
from raydistill.errors import ConfigError
from raydistill.models.generator import Generator, Request, class_numbers, inspect_pipeline

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def settings(pipeline, **changes: object) -> Generate:
    return Generate.model_validate({"pipeline": str(pipeline), "steps": 3, **changes})


def generator(pipeline, **changes: object) -> Generator:
    chosen = settings(pipeline, **changes)
    return Generator(chosen, inspect_pipeline(chosen), CPU)


def ask(seed: int, **changes: object) -> Request:
    plain = Request(seed=seed, prompt="a cat", class_id=0, negative_prompt=None, steps=3, guidance=2.0)
    return dataclasses.replace(plain, **changes)


def arrays(pictures) -> list[np.ndarray]:
    assert [picture.reason for picture in pictures] == [""] * len(pictures)
    return [np.asarray(picture.image) for picture in pictures]


@pytest.fixture(scope="module")
def safe(text_pipeline):
    return text_pipeline(True)


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """A DiTPipeline, which brings the names of its classes in its index."""
    folder = tmp_path_factory.mktemp("dit") / "pipeline"
    torch.manual_seed(0)
    diffusers.DiTPipeline(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
            patch_size=2, num_embeds_ada_norm=1000,
        ),
        diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=4),
        diffusers.DDIMScheduler(),
    ).save_pretrained(folder)  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    # Where the published ones have their names; saving one again leaves them out.
    index["id2label"] = {"0": "tench, Tinca tinca", "1": "goldfish"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("scheduler", [None, "DDPMScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("kind", ["class", "text", "image"])
def test_an_image_depends_on_its_request_and_on_nothing_else(kind, scheduler, class_pipeline, safe):
    """Not on its neighbours, their number, their order, or what was made before; a scheduler's noise included."""
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    changes = {"source": source} if kind == "image" else {}
    made = generator(
        class_pipeline if kind == "class" else safe,
        scheduler=scheduler,
        strength=0.7 if kind == "image" else None,
    )
    requests = [ask(seed, **changes) for seed in range(4)]
    together = arrays(made.pictures(requests))
    for seed in (2, 0):
        np.testing.assert_array_equal(arrays(made.pictures([requests[seed]]))[0], together[seed])
    backwards = arrays(made.pictures(requests[::-1]))[::-1]
    for one, other in zip(together, backwards, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len({image.tobytes() for image in together}) == 4


def test_the_loop_of_a_plain_unet_is_that_of_diffusers(class_pipeline, tmp_path):
    """Against DDIMPipeline's own, where there is no class."""
    unet = diffusers.UNet2DModel.from_pretrained(class_pipeline, subfolder="unet")
    unet.register_to_config(num_class_embeds=None)
    unet.class_embedding = None
    folder = tmp_path / "pipeline"
    diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()).save_pretrained(folder)
    theirs = diffusers.DDIMPipeline.from_pretrained(folder)
    expected = theirs(generator=[torch.Generator().manual_seed(7)], num_inference_steps=3).images[0]
    chosen = settings(folder)
    assert inspect_pipeline(chosen).kind == "none"
    ours = arrays(generator(folder).pictures([ask(7, class_id=None)]))[0]
    assert np.abs(ours.astype(int) - np.asarray(expected)).max() <= 1  # they round down


def test_guidance_moves_away_from_no_class_and_the_class_matters(class_pipeline):
    made = generator(class_pipeline)

    def picture(**changes):
        return arrays(made.pictures([ask(1, **changes)]))[0].astype(float)

    plain, none = picture(guidance=1.0), picture(guidance=1.0, class_id=3)
    assert (plain != none).any()
    assert (picture(guidance=1.0, class_id=1) != plain).any()
    np.testing.assert_array_equal(picture(guidance=3.0, class_id=3), none)  # no class, guided away from no class


def test_classes_are_matched_by_name(class_pipeline, dit):
    ours, theirs = settings(class_pipeline), settings(dit)
    assert class_numbers(ours, inspect_pipeline(ours), ["blue", "red"]) == {"blue": 2, "red": 0}
    assert class_numbers(theirs, inspect_pipeline(theirs), ["Tinca tinca", "goldfish"]) == {
        "Tinca tinca": 0,
        "goldfish": 1,
    }
    told = settings(class_pipeline, class_ids={"cyan": 2})
    assert class_numbers(told, inspect_pipeline(told), ["cyan"]) == {"cyan": 2}
    with pytest.raises(ConfigError, match=r"does not know the classes 'cyan'.*'red'.*class_ids"):
        class_numbers(ours, inspect_pipeline(ours), ["red", "cyan"])


def test_a_dit_makes_images_of_its_classes(dit):
    made = generator(dit)
    together = arrays(made.pictures([ask(1, class_id=0), ask(1, class_id=1)]))
    assert (together[0] != together[1]).any()
    np.testing.assert_array_equal(arrays(made.pictures([ask(1, class_id=1)]))[0], together[1])


def test_what_the_safety_checker_flags_is_no_image(safe):
    """With a bias that flags everything (case C18): the pipeline gives black pictures, which must go nowhere."""
    made = generator(safe)
    made._pipeline.safety_checker.concept_embeds_weights.data.fill_(-10.0)
    made._pipeline.safety_checker.special_care_embeds_weights.data.fill_(-10.0)
    flagged = made.pictures([ask(0), ask(1)])
    assert [(picture.image, picture.reason) for picture in flagged] == [(None, "safety checker")] * 2


@pytest.mark.parametrize("kind", ["class", "text"])
def test_what_is_not_finite_is_no_image(kind, class_pipeline, text_pipeline):
    made = generator(class_pipeline if kind == "class" else text_pipeline(False), safety_checker=False)
    made._pipeline.unet.conv_out.bias.data[0] = torch.nan
    assert [(picture.image, picture.reason) for picture in made.pictures([ask(0)])] == [(None, "not finite")]


def test_a_safety_checker_that_is_asked_for_and_absent_is_refused(text_pipeline):
    unsafe = text_pipeline(False)
    with pytest.raises(ConfigError, match=r"has no safety checker.*safety_checker=false"):
        inspect_pipeline(settings(unsafe))
    assert inspect_pipeline(settings(unsafe, safety_checker=False)).kind == "text"


@pytest.mark.parametrize("part", ["unet", "vae", "tokenizer"])
def test_a_folder_with_missing_parts_is_refused(safe, tmp_path, part):
    shutil.copytree(safe, tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline" / part)
    with pytest.raises(ConfigError, match=f"lacks {part}"):
        inspect_pipeline(settings(tmp_path / "pipeline"))


def test_weights_that_are_missing_are_refused_when_it_is_loaded(class_pipeline, tmp_path):
    shutil.copytree(class_pipeline, tmp_path / "pipeline")
    (tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        generator(tmp_path / "pipeline")


def test_what_is_no_pipeline_is_refused(tmp_path, class_pipeline):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no model_index\.json"):
        inspect_pipeline(settings(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"generate\.strength is for text-to-image"):
        inspect_pipeline(settings(class_pipeline, strength=0.5))
    with pytest.raises(ConfigError, match="no scheduler of this name"):
        generator(class_pipeline, scheduler="NoScheduler")
    (tmp_path / "empty" / "model_index.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        inspect_pipeline(settings(tmp_path / "empty"))


def test_a_scheduler_with_noise_of_its_own_is_refused(class_pipeline, monkeypatch):
    """As those of torchsde, which is not installed here."""
    monkeypatch.setattr(diffusers.DDIMScheduler, "noise_sampler", None, raising=False)
    with pytest.raises(ConfigError, match="DDIMScheduler draws noise from no seed of ours"):
        generator(class_pipeline)


def test_the_side_of_the_images_is_known_before_they_are_made(class_pipeline, safe, dit):
    assert [inspect_pipeline(settings(p)).side for p in (class_pipeline, safe, dit)] == [16, 16, 4]
    assert inspect_pipeline(settings(safe, size=32)).side == 32
    assert generator(class_pipeline).pictures([ask(0)])[0].image.size == (16, 16)


@pytest.mark.parametrize("content", ["{", "[]", '{"names": []}'])
def test_a_list_of_classes_that_is_none_is_refused(class_pipeline, tmp_path, content):
    shutil.copytree(class_pipeline, tmp_path / "pipeline")
    (tmp_path / "pipeline" / "classes.json").write_text(content)
    with pytest.raises(ConfigError, match=r"classes\.json cannot be read"):
        inspect_pipeline(settings(tmp_path / "pipeline"))


def test_the_licence_of_a_folder_is_on_its_card(class_pipeline, tmp_path):
    shutil.copytree(class_pipeline, tmp_path / "pipeline")
    assert inspect_pipeline(settings(tmp_path / "pipeline")).licence == "not stated"
    (tmp_path / "pipeline" / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    assert inspect_pipeline(settings(tmp_path / "pipeline")).licence == "mit"
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "DDIMPipeline"
