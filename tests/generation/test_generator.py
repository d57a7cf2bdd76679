"""Diffusion pipelines: an image is a function of its request alone; what will not do is said before it is loaded."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import shutil
import sys

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers.pipelines.deepfloyd_if import IFPipelineOutput
from PIL import Image
from safetensors.torch import load_file

from raydistill.config import Generate
from raydistill.errors import ConfigError
from raydistill.generation.generator import Generator, Request
from raydistill.generation.pipelines import check_steps, class_numbers, inspect_pipeline
from tests.pickles import Malicious

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def settings(pipeline, **changes: object) -> Generate:
    return Generate.model_validate({"pipeline": str(pipeline), "steps": 3, "dtype": "fp32", **changes})


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


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unconditional") / "pipeline"
    unet = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def changed(tmp_path):
    """Copies a pipeline with other settings in one of its JSON files."""

    def copy(pipeline, file: str, **changes: object):
        shutil.copytree(pipeline, tmp_path / "changed", dirs_exist_ok=True)
        place = tmp_path / "changed" / file
        place.write_text(json.dumps({**json.loads(place.read_text()), **changes}))
        return tmp_path / "changed"

    return copy


@pytest.fixture
def at_root(class_pipeline, tmp_path):
    """The class-conditional pipeline as old ones lie on the hub: without a folder for the network."""
    folder = tmp_path / "at_root"
    folder.mkdir()
    for file in [p for p in class_pipeline.rglob("*") if p.is_file()]:
        shutil.copy(file, folder / file.name)
    return folder


@pytest.mark.parametrize("scheduler", [None, "DDPMScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("kind", ["class", "dit", "text", "image"])
def test_an_image_depends_on_its_request_and_on_nothing_else(kind, scheduler, class_pipeline, dit, safe):
    """Not on its neighbours, their number, their order, or what was made before; a scheduler's noise included."""
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    changes = {"source": source} if kind == "image" else {}
    made = generator(
        {"class": class_pipeline, "dit": dit}.get(kind, safe),
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


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("kind", ["class", "dit", "text"])
def test_the_noise_of_a_scheduler_is_the_requests_own_in_a_batch_too(
    kind, scheduler, guidance, class_pipeline, dit, safe
):
    """As on a GPU: but for the last bits of sums, the images are those that are made one by one."""
    made = generator({"class": class_pipeline, "dit": dit}.get(kind, safe), scheduler=scheduler)
    requests = [ask(seed, guidance=guidance) for seed in range(3)]
    together, alone = arrays(made._batch(requests)), arrays(made.pictures(requests))
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_image_to_image_makes_the_pipelines_own_size_of_whatever_it_begins_from(safe):
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    for size, side in ((None, 16), (32, 32)):
        made = generator(safe, strength=0.7, size=size)
        assert made.pictures([ask(0, source=source)])[0].image.size == (side, side)


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


def test_a_network_without_classes_takes_no_class_numbers(unconditional, safe, tmp_path):
    assert inspect_pipeline(settings(unconditional)).kind == "none"
    for pipeline in (unconditional, safe):
        with pytest.raises(ConfigError, match=r"generate\.class_ids gives numbers to 'cat'.*takes no class"):
            inspect_pipeline(settings(pipeline, class_ids={"cat": 0}))
    shutil.copytree(unconditional, tmp_path / "pipeline")
    (tmp_path / "pipeline" / "classes.json").write_text('{"classes": ["cat"]}')
    with pytest.raises(ConfigError, match=r"classes\.json names classes \('cat'\), but its network takes no class"):
        inspect_pipeline(settings(tmp_path / "pipeline"))


def test_a_network_with_classes_that_are_not_named_is_told_their_numbers(class_pipeline, changed):
    folder = changed(class_pipeline, "classes.json")
    (folder / "classes.json").unlink()
    facts = inspect_pipeline(settings(folder))
    assert facts.kind == "class"
    with pytest.raises(ConfigError, match=r"classes 'red', 'blue'; it knows none by name; .* generate\.class_ids"):
        class_numbers(settings(folder), facts, ["red", "blue"])
    told = settings(folder, class_ids={"red": 3, "blue": 0})
    assert class_numbers(told, inspect_pipeline(told), ["red", "blue"]) == {"red": 3, "blue": 0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"blue": 4}, "'blue' would be class 4 of .* knows 0 to 3"),
        ({"blue": 3}, "'blue' would be class 3 of .* its number of no class"),
        ({"blue": 0}, "classes 'red' and 'blue' would both be class 0"),
    ],
)
def test_a_number_that_makes_nothing_of_its_own_is_refused(class_pipeline, given, message):
    told = settings(class_pipeline, class_ids=given)
    with pytest.raises(ConfigError, match=message) as error:
        class_numbers(told, inspect_pipeline(told), ["red", "blue"])
    assert "generate.class_ids" in str(error.value)


def test_names_and_numbers_that_a_folder_has_wrong_are_refused(class_pipeline, changed):
    many = settings(changed(class_pipeline, "classes.json", classes=["a", "b", "c", "d", "e"]))
    with pytest.raises(ConfigError, match=r"'e' would be class 4 of .* knows 0 to 3"):
        class_numbers(many, inspect_pipeline(many), ["a", "e"])
    twice = settings(changed(class_pipeline, "classes.json", classes=["red", "blue", "red"]))
    with pytest.raises(ConfigError, match="several classes named 'red', the numbers 0, 2"):
        class_numbers(twice, inspect_pipeline(twice), ["red", "blue"])
    with pytest.raises(ConfigError, match=r"number of no class .* is 4, but its network knows 0 to 3"):
        inspect_pipeline(settings(changed(class_pipeline, "classes.json", null=4)))


def test_a_word_that_names_two_classes_of_a_dit_must_be_told_which(dit, changed):
    folder = changed(dit, "model_index.json", id2label={"134": "crane", "517": "crane, derrick", "1": "goldfish"})
    facts = inspect_pipeline(settings(folder))
    assert class_numbers(settings(folder), facts, ["derrick", "goldfish"]) == {"derrick": 517, "goldfish": 1}
    with pytest.raises(ConfigError, match=r"named 'crane', the numbers 134, 517; .* generate\.class_ids"):
        class_numbers(settings(folder), facts, ["crane", "goldfish"])
    told = settings(folder, class_ids={"crane": 134})
    assert class_numbers(told, inspect_pipeline(told), ["crane", "goldfish"]) == {"crane": 134, "goldfish": 1}


def test_a_dit_of_other_classes_than_imagenets_has_no_number_for_none(dit, changed):
    folder = changed(dit, "transformer/config.json", num_embeds_ada_norm=10)
    with pytest.raises(ConfigError, match=r"generate\.guidance=7\.5.*knows 10 classes; set generate\.guidance=1"):
        inspect_pipeline(settings(folder))
    told = settings(folder, guidance=1, class_ids={"cat": 10})
    with pytest.raises(ConfigError, match=r"'cat' would be class 10 of .* knows 0 to 9"):
        class_numbers(told, inspect_pipeline(told), ["cat"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("AudioLDM2Pipeline", {}, "is a AudioLDM2Pipeline, and diffusers knows no way to make images from text"),
        ("WanPipeline", {}, "no way to make images from text"),
        ("ScoreSdeVePipeline", {}, "no way to make images from text"),
        ("MyOwnPipeline", {}, "no way to make images from text"),
        ("HunyuanDiTPipeline", {"strength": 0.5}, "no way to make images from images and text"),
        ("FluxKontextPipeline", {"strength": 0.5}, "takes no strength"),
        ("StableCascadeCombinedPipeline", {}, "takes no guidance_scale"),
    ],
)
def test_a_pipeline_that_makes_no_images_of_what_we_have_is_refused(safe, changed, name, changes, message):
    with pytest.raises(ConfigError, match=message):
        inspect_pipeline(settings(changed(safe, "model_index.json", _class_name=name), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 1001}, r"generate\.steps=1001: the scheduler of .* has only 1000 steps"),
        ({"overrides": {"cat": {"steps": 2000}}}, r"generate\.overrides\.cat\.steps=2000: the scheduler"),
        ({"steps": 9, "strength": 0.1}, r"generate\.steps=9 with generate\.strength=0\.1 leaves no step"),
        ({"strength": 0.1, "steps": 10, "overrides": {"cat": {"steps": 5}}}, r"overrides\.cat\.steps=5 with"),
    ],
)
def test_steps_that_cannot_be_taken_are_refused(safe, changes, message):
    chosen = settings(safe, **changes)
    with pytest.raises(ConfigError, match=message):
        check_steps(chosen, inspect_pipeline(chosen), ["cat", "dog"])
    enough = settings(safe, steps=1000, strength=0.001)
    check_steps(enough, inspect_pipeline(enough), ["cat", "dog"])


def test_an_old_pipeline_without_folders_makes_the_same_images(class_pipeline, at_root):
    facts = inspect_pipeline(settings(at_root))
    assert (facts.kind, facts.side, facts.num_classes, facts.train_steps) == ("class", 16, 4, 1000)
    ours, theirs = (arrays(generator(folder).pictures([ask(1)])) for folder in (at_root, class_pipeline))
    np.testing.assert_array_equal(ours[0], theirs[0])
    (at_root / "scheduler_config.json").unlink()
    with pytest.raises(ConfigError, match="lacks scheduler"):
        inspect_pipeline(settings(at_root))


@pytest.mark.parametrize("old", [True, False])
def test_what_is_fetched_to_look_at_a_pipeline_of_the_hub_is_enough(
    class_pipeline, at_root, tmp_path, monkeypatch, old
):
    """The hub is a folder here, of which only files of the patterns arrive."""
    hub = at_root if old else class_pipeline

    def fetch(name: str, revision: str, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("owner/name", "c0ffee")
        for file in (p.relative_to(hub) for p in hub.rglob("*") if p.is_file()):
            if any(fnmatch.fnmatch(str(file), pattern) for pattern in allow_patterns):
                (tmp_path / "cache" / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(hub / file, tmp_path / "cache" / file)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(
        huggingface_hub, "model_info", lambda name, revision: huggingface_hub.ModelInfo(id=name, sha="c0ffee")
    )
    facts, local = inspect_pipeline(settings("owner/name")), inspect_pipeline(settings(class_pipeline))
    assert facts == dataclasses.replace(local, pipeline="owner/name", commit="c0ffee")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


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


def test_deepfloyds_word_for_what_is_flagged_counts_too(safe):
    class DeepFloyd:
        scheduler = diffusers.DDPMScheduler()

        def __call__(self, **asked: object) -> IFPipelineOutput:
            return IFPipelineOutput(np.zeros((2, 4, 4, 3)), nsfw_detected=[True, False], watermark_detected=None)

    made = generator(safe)
    made._pipeline = DeepFloyd()
    assert [picture.reason for picture in made._batch([ask(0), ask(1)])] == ["safety checker", ""]


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


@pytest.mark.parametrize(
    ("part", "pickled"),
    [
        ("unet", "diffusion_pytorch_model.bin"), ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"), ("safety_checker", "pytorch_model.bin"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("beside", [False, True])
def test_pickled_weights_are_not_opened(safe, tmp_path, part, pickled, beside):
    """Where there are others beside them, those are read; else the pipeline is refused."""
    folder, marker = tmp_path / "pipeline", tmp_path / "marker"
    shutil.copytree(safe, folder)
    (weights,) = (folder / part).glob("*.safetensors")
    torch.save({**load_file(weights), "more": Malicious(marker)}, folder / part / pickled)
    if beside:
        generator(folder)
    else:
        weights.unlink()
        with pytest.raises(ConfigError, match=f"generate.pipeline={folder}: cannot be loaded"):
            generator(folder)
    assert not marker.exists()
    torch.load(folder / part / pickled, weights_only=False)
    assert marker.exists()  # so it would have run


def test_what_is_no_pipeline_is_refused(tmp_path, class_pipeline):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no model_index\.json"):
        inspect_pipeline(settings(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"generate\.strength is for text-to-image"):
        inspect_pipeline(settings(class_pipeline, strength=0.5))
    with pytest.raises(ConfigError, match="no such scheduler"):
        generator(class_pipeline, scheduler="NoScheduler")
    with pytest.raises(ConfigError, match="no usable step method"):
        generator(class_pipeline, scheduler="ScoreSdeVeScheduler")
    for content in ("{", "[" * 200_000, '{"a": ' * 50_000, "[]", "9" * 5_000):
        (tmp_path / "empty" / "model_index.json").write_text(content)
        with pytest.raises(ConfigError, match="cannot be read"):
            inspect_pipeline(settings(tmp_path / "empty"))


def test_a_scheduler_with_noise_of_its_own_is_refused(class_pipeline, monkeypatch):
    """As those of torchsde, which is not installed here."""
    monkeypatch.setattr(diffusers.DDIMScheduler, "noise_sampler", None, raising=False)
    with pytest.raises(ConfigError, match="DDIMScheduler takes no random seed"):
        generator(class_pipeline)


def test_the_side_of_the_images_is_known_before_they_are_made(class_pipeline, safe, dit):
    assert [inspect_pipeline(settings(p)).side for p in (class_pipeline, safe, dit)] == [16, 16, 4]
    assert inspect_pipeline(settings(safe, size=32)).side == 32
    assert generator(class_pipeline).pictures([ask(0)])[0].image.size == (16, 16)


@pytest.mark.parametrize("content", ["{", "[]", '{"names": []}', "[" * 200_000])
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


def test_the_generator_of_the_benchmarks_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    """To the weights of an unbroken run, on small random pictures instead of Fashion-MNIST."""
    from benchmarks import train_generator

    drawn = torch.Generator().manual_seed(0)
    data = (torch.rand(8, 1, 28, 28, generator=drawn), torch.arange(8) % 2, ["boot", "coat"])
    monkeypatch.setattr(train_generator, "load_images", lambda: data)
    words = ["train_generator.py", "--steps", "4", "--batch-size", "2", "--steps-between-checkpoints", "2", "--out"]
    checkpoint, write = tmp_path / "unbroken.checkpoint.pt", train_generator.write_file

    def write_and_keep(path: str, *rest: object) -> None:
        write(path, *rest)
        if not (tmp_path / "broken.checkpoint.pt").exists():
            shutil.copy(checkpoint, tmp_path / "broken.checkpoint.pt")  # after step 2

    monkeypatch.setattr(train_generator, "write_file", write_and_keep)
    weights = []
    for name in ("unbroken", "broken"):
        monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / name)])
        train_generator.main()
        weights.append(load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors"))
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=0, atol=0)
    assert inspect_pipeline(settings(tmp_path / "broken", guidance=2)).classes == {"boot": 0, "coat": 1}


@pytest.mark.parametrize(
    ("file", "odd", "said"),
    [
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "x"}, "has another form"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**10}, "has another form"),
        (
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": 2 * 10**9},
            "names 2,000,000,000 steps of training",
        ),
        ("unet/config.json", {"num_class_embeds": "x"}, "has another form"),
        ("unet/config.json", {"sample_size": 30_000}, "names pictures of 30,000 pixels, and 8,192 are the most"),
        ("model_index.json", {"_class_name": "DiTPipeline", "id2label": "x"}, "has another form"),
        ("model_index.json", {"unet": ["os", "system"]}, "its unet is of the library os, whose code is not run"),
        ("model_index.json", {"unet": [["os"], "x"]}, "whose code is not run"),
        ("model_index.json", {"_class_name": "DiTPipeline", "id2label": {"a": 5}}, "has another form"),
        ("classes.json", {"null": 1e300}, "has another form|number of no class"),
    ],
)
def test_a_pipeline_whose_files_hold_anything_is_refused_in_a_sentence(class_pipeline, changed, file, odd, said):
    with pytest.raises(ConfigError, match=said):
        inspect_pipeline(settings(changed(class_pipeline, file, **odd)))


def test_a_licence_is_read_from_the_beginning_of_a_file_alone(class_pipeline, changed):
    folder = changed(class_pipeline, "classes.json")
    (folder / "README.md").write_text("license: mit\n" + "\n" * 10**6 + "license: other\n")
    assert inspect_pipeline(settings(folder)).licence == "mit"
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/dev/zero")
    assert inspect_pipeline(settings(folder)).licence == "not stated"


def test_texts_that_were_encoded_before_give_the_same_images(text_pipeline):
    folder = text_pipeline(False)
    requests = [
        ask(seed, class_id=None, prompt=prompt, guidance=guidance, negative_prompt=negative)
        for seed, (prompt, guidance, negative) in enumerate(
            [("a cat", 2.0, None), ("a dog", 2.0, None), ("a cat", 2.0, None), ("a cat", 1.0, None),
             ("a cat", 2.0, "blue"), ("a cat", 2.0, None), *((f"cat {n}", 2.0, None) for n in range(40)),
             ("a cat", 2.0, "blue"), ("a dog", 1.0, None)]
        )
    ]  # fmt: skip
    maker = generator(folder, safety_checker=False)
    found = [arrays(maker.pictures([request]))[0] for request in requests]
    for number in (1, 2, 3, 4, 5, 46, 47):
        (alone,) = arrays(generator(folder, safety_checker=False).pictures([requests[number]]))
        np.testing.assert_array_equal(found[number], alone)
    assert not np.array_equal(found[0], found[1])
