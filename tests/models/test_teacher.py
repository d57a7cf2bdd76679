"""The teacher: frozen for life (case C06), fed as its own configuration says (case C08), and its head: native,
matched by name, or read from text. Networks are small and random, but saved and loaded as real ones are."""

import copy
import dataclasses
import fnmatch
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from torch.nn.functional import normalize

from raydistill.config import Student, Teacher
from raydistill.data.views import WHOLE_IMAGE, Preprocessing, render
from raydistill.errors import CheckpointError, ConfigError
from raydistill.models import student as students
from raydistill.models.heads import LinearHead, match_native_head
from raydistill.models.teacher import TeacherBackbone, load_teacher
from raydistill.models.weight_shards import check_tokenizer
from raydistill.models.weights import timm_preprocessing
from raydistill.models.zero_shot import prompts_of, zero_shot_head
from tests.models.conftest import VIT
from tests.small_run import save_student

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = {0: "tabby cat, tabby", 1: "dog", 2: "traffic_light"}


def refusal(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(ConfigError) as refused:
        call(*arguments)
    (message,) = refused.value.args
    assert "\n" not in message
    return message


def fingerprint(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def images(count: int, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def shaken(network: nn.Module) -> nn.Module:
    """Random numbers everywhere: freshly made networks hold zeros that would hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(0.5 * torch.rand(value.shape, generator=generator) + 0.02)
    return network.eval()


# Frozen


class Unsteady(nn.Module):
    """Batch norm and dropout: in train mode neither its state nor its output would stay."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)


class Wrapper(nn.Module):
    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self.student = nn.Linear(8, 2)


def unsteady() -> TeacherBackbone:
    return TeacherBackbone(shaken(Unsteady()).train(), Preprocessing(32, (0, 0, 0), (1, 1, 1)))


@pytest.mark.parametrize(
    "flip",
    [
        lambda teacher: teacher.train(),
        lambda teacher: Wrapper(teacher).train(),
        lambda teacher: Wrapper(Wrapper(teacher)).train(True),
        lambda teacher: nn.Sequential(teacher).train(),
        lambda teacher: copy.deepcopy(teacher).train(),
        lambda teacher: teacher.eval().train(),
    ],
)
def test_nothing_puts_the_teacher_in_train_mode(flip):
    teacher = unsteady()
    before, expected = fingerprint(teacher), teacher(images(4))
    flip(teacher)
    assert not any(module.training for module in teacher.modules())
    for _ in range(3):
        torch.testing.assert_close(teacher(images(4)), expected, rtol=0, atol=0)
    assert fingerprint(teacher) == before


def test_a_wrapper_still_trains_the_student():
    wrapper = Wrapper(unsteady()).eval().train()
    assert wrapper.student.training


def test_an_image_has_the_same_features_in_any_batch():
    teacher = unsteady()
    batch = images(6)
    together = teacher(batch)
    alone = torch.cat([teacher(image[None]) for image in batch])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    among_others = teacher(torch.cat([100 * images(3), batch[2:3]]))[-1]
    torch.testing.assert_close(among_others, together[2], rtol=0, atol=1e-5)


def test_no_gradient_and_no_optimizer_reaches_the_teacher():
    wrapper = Wrapper(unsteady())
    before = fingerprint(wrapper.teacher)
    trainable = [p for p in wrapper.parameters() if p.requires_grad]
    assert len(trainable) == 2
    optimizer = torch.optim.SGD(trainable, lr=1.0, weight_decay=0.5)
    wrapper.student(wrapper.teacher(images(4)).clone()).sum().backward()
    optimizer.step()
    assert all(p.grad is None for p in wrapper.teacher.parameters())
    assert fingerprint(wrapper.teacher) == before


# timm


@pytest.fixture(scope="module")
def timm_weights(tmp_path_factory) -> Callable[..., str]:
    """A .safetensors of a small timm model with random weights."""

    def write(name: str, num_classes: int = 5) -> str:
        path = tmp_path_factory.mktemp("weights") / f"{name}.safetensors"
        torch.manual_seed(0)
        save_file(shaken(timm.create_model(name, num_classes=num_classes)).state_dict(), path)
        return str(path)

    return write


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_a_timm_teachers_features_and_head_are_the_models_own(timm_weights, name):
    weights = timm_weights(name)
    backbone, head, _ = load_teacher(Teacher(model=f"timm:{name}", weights=weights, head="native"))
    own = timm.create_model(name, num_classes=5).eval()
    own.load_state_dict(load_file(weights))
    batch = images(3, backbone.preprocessing.size)
    before, features = fingerprint(backbone), backbone(batch)
    with torch.no_grad():
        expected = own.forward_head(own.forward_features(batch), pre_logits=True)
        logits = own(batch)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(head.logits(features.numpy()), logits, rtol=1e-4, atol=1e-4)
    backbone.train()
    backbone(images(7, backbone.preprocessing.size))
    torch.testing.assert_close(backbone(batch[:1]), features[:1], rtol=1e-5, atol=1e-5)
    assert fingerprint(backbone) == before


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "mobilenetv3_small_050"])
def test_timm_preprocessing_is_that_of_the_models_own_configuration(timm_weights, name):
    backbone, *_ = load_teacher(Teacher(model=f"timm:{name}", weights=timm_weights(name)))
    own = timm.get_pretrained_cfg(name)
    size = own.input_size[-1]
    assert backbone.preprocessing == Preprocessing(size, own.mean, own.std, own.interpolation)
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    transform = create_transform(size, mean=own.mean, std=own.std, interpolation=own.interpolation, crop_pct=1.0)
    seen = render(torch.from_numpy(picture)[None], torch.from_numpy(WHOLE_IMAGE)[None], backbone.preprocessing)
    torch.testing.assert_close(seen[0], transform(Image.fromarray(picture)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_vit", None),
        *((n, s) for n in ("test_resnet", "mobilenetv3_small_050", "convnext_atto") for s in (None, 160, 161)),
    ],
)
def test_with_its_margin_cut_off_the_network_gives_the_logits_of_timms_own_transform(timm_weights, name, size):
    config = Teacher(model=f"timm:{name}", weights=timm_weights(name), head="native", size=size, center_crop=True)
    backbone, *_ = load_teacher(config)
    own = timm.get_pretrained_cfg(name)
    size = size or own.input_size[-1]
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    picture = Image.fromarray(picture).resize((math.floor(size / own.crop_pct),) * 2, Image.Resampling.BICUBIC)
    transform = create_transform(
        size, mean=own.mean, std=own.std, interpolation=own.interpolation, crop_pct=own.crop_pct
    )
    whole = torch.from_numpy(WHOLE_IMAGE)[None]
    seen = render(torch.from_numpy(np.array(picture))[None], whole, backbone.preprocessing)
    torch.testing.assert_close(seen[0], transform(picture), rtol=0, atol=1e-5)
    with torch.inference_mode():
        expected = backbone.network.logits(transform(picture)[None])
        torch.testing.assert_close(backbone.network.logits(seen), expected, rtol=0, atol=1e-4)


def test_a_large_picture_is_resized_and_then_cut_as_timm_does(timm_weights):
    backbone, *_ = load_teacher(
        Teacher(model="timm:test_resnet", weights=timm_weights("test_resnet"), size=160, center_crop=True)
    )
    own, wanted = timm.get_pretrained_cfg("test_resnet"), backbone.preprocessing
    down, across = np.mgrid[0:400, 0:400] / 400
    smooth = np.stack([255 * down, 255 * across, 127 + 100 * np.sin(9 * down + 7 * across)], axis=-1).astype(np.uint8)
    transform = create_transform(
        160, mean=own.mean, std=own.std, interpolation=own.interpolation, crop_pct=own.crop_pct
    )
    whole = torch.from_numpy(WHOLE_IMAGE)[None]
    seen = render(torch.from_numpy(smooth)[None], whole, wanted)[0]
    # Theirs resizes in whole steps of 255.
    torch.testing.assert_close(seen, transform(Image.fromarray(smooth)), rtol=0, atol=1.0 / 255 / min(wanted.std))
    uncut = render(torch.from_numpy(smooth)[None], whole, dataclasses.replace(wanted, resized=None))[0]
    assert (seen - uncut).abs().max() > 10 / 255


def test_a_view_keeps_its_margin(timm_weights):
    name = "test_resnet"
    teachers = [
        load_teacher(Teacher(model=f"timm:{name}", weights=timm_weights(name), center_crop=cut))[0] for cut in (0, 1)
    ]
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8))
    view = torch.tensor([[0.1, 0.2, 0.5, 0.6, 0, 1, 1, 1]])
    one, other = (render(picture, view, teacher.preprocessing) for teacher in teachers)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_models_with_different_statistics_are_fed_differently(timm_weights):
    vit, resnet = (
        load_teacher(Teacher(model=f"timm:{name}", weights=timm_weights(name)))[0].preprocessing
        for name in ("test_vit", "mobilenetv3_small_050")
    )
    assert vit.mean != resnet.mean


def test_a_size_may_be_asked_for_where_the_network_takes_it(timm_weights):
    backbone, *_ = load_teacher(Teacher(model="timm:test_resnet", weights=timm_weights("test_resnet"), size=64))
    assert backbone.preprocessing.size == 64
    assert backbone(images(2, 64)).ndim == 2
    name = "vit_tiny_patch16_224"
    assert "64" in refusal(load_teacher, Teacher(model=f"timm:{name}", weights=timm_weights(name), size=64))


def test_a_folder_that_timm_saved_is_a_teacher(tmp_path):
    torch.manual_seed(0)
    own = shaken(timm.create_model("test_resnet", num_classes=3))
    save_file(own.state_dict(), tmp_path / "model.safetensors")
    settings = {"architecture": "test_resnet", "num_classes": 3, "label_names": ["a", "b", "c"]}
    settings["pretrained_cfg"] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 48, 48]}
    settings["pretrained_cfg"] |= {"interpolation": "bilinear", "num_classes": 3, "label_names": ["a", "b", "c"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    backbone, head, names = load_teacher(Teacher(model=str(tmp_path), head="native"))
    assert backbone.preprocessing == Preprocessing(48, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    assert names == [("a",), ("b",), ("c",)]
    with torch.no_grad():
        expected = own(images(2, 48))
    np.testing.assert_allclose(head.logits(backbone(images(2, 48)).numpy()), expected, rtol=1e-4, atol=1e-4)


def test_a_teacher_without_a_classifier_has_no_head(tmp_path):
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "w.safetensors")
    _, head, names = load_teacher(Teacher(model="timm:test_resnet", weights=str(tmp_path / "w.safetensors")))
    assert head is None
    assert names == []


# transformers


@pytest.fixture
def hf(tmp_path) -> Callable[..., tuple[str, nn.Module]]:
    """Saves a network with random weights and its preprocessing as transformers does; gives the folder and it."""

    def save(network: nn.Module, processor: object = None, dtype: torch.dtype = torch.float32) -> tuple[str, nn.Module]:
        folder = tmp_path / "teacher"
        shaken(network)
        copy.deepcopy(network).to(dtype).save_pretrained(folder)
        if processor is None:
            processor = transformers.ViTImageProcessor(
                size={"height": 32, "width": 32}, image_mean=[0.5, 0.4, 0.3], image_std=[0.25, 0.5, 0.2], resample=2
            )
        processor.save_pretrained(folder)
        return str(folder), network

    return save


def vit(**options: object) -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**VIT), **options)


def vit_classifier() -> nn.Module:
    config = transformers.ViTConfig(**VIT, id2label=NAMES, label2id={name: k for k, name in NAMES.items()})
    return transformers.ViTForImageClassification(config)


def dinov2(kind: str = "Model", **options: object) -> nn.Module:
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, num_labels=3
    )
    return getattr(transformers, f"Dinov2{kind}")(config, **options)


def resnet(kind: str = "Model") -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    return getattr(transformers, f"ResNet{kind}")(config)


def pooled(output: object) -> torch.Tensor:
    return output.pooler_output.flatten(1)


def class_token(output: object) -> torch.Tensor:
    return output.last_hidden_state[:, 0]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (vit, pooled),
        (lambda: vit(add_pooling_layer=False), class_token),
        (dinov2, pooled),
        (resnet, pooled),
        (
            lambda: transformers.SwinModel(
                transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
            ),
            pooled,
        ),
        (lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT)), pooled),
        (
            lambda: transformers.PvtV2Model(
                transformers.PvtV2Config(
                    image_size=32, hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4
                )
            ),
            lambda output: output.last_hidden_state.mean(dim=(2, 3)),
        ),
    ],
    ids=["ViT", "ViT without a pooler", "DINOv2", "ResNet", "Swin", "CLIP's image half", "PVTv2"],
)
@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_transformers_features_are_the_models_own(hf, make, expected, prefix):
    folder, own = hf(make())
    backbone, head, names = load_teacher(Teacher(model=prefix + folder))
    before = fingerprint(backbone)
    features = backbone.train()(images(3))
    with torch.no_grad():
        torch.testing.assert_close(features, expected(own(pixel_values=images(3))), rtol=1e-5, atol=1e-5)
    assert head is None
    assert names == []
    assert fingerprint(backbone) == before


def test_a_classifiers_backbone_has_no_trained_pooler_and_gives_the_class_token(hf):
    folder, own = hf(vit_classifier())
    features = load_teacher(Teacher(model=folder))[0](images(3))
    again = load_teacher(Teacher(model=folder))[0](images(3))
    with torch.no_grad():
        expected = own.vit(pixel_values=images(3)).last_hidden_state[:, 0]
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(features, again)  # no part of it is random


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [vit_classifier, lambda: dinov2("ForImageClassification"), lambda: resnet("ForImageClassification")],
    ids=["ViT", "DINOv2", "ResNet"],
)
def test_the_native_head_gives_the_classifiers_own_logits(hf, make, dtype):
    folder, own = hf(make(), dtype=dtype)
    own.load_state_dict({name: value.to(dtype).to(value.dtype) for name, value in own.state_dict().items()})
    backbone, head, names = load_teacher(Teacher(model=folder, head="native"))
    features = backbone(images(3))
    assert features.dtype == torch.float32
    with torch.no_grad():
        logits = own(pixel_values=images(3)).logits
    np.testing.assert_allclose(features.numpy() @ head.weight_CD.T + head.bias_C, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(head.logits(features.numpy()), logits, rtol=1e-4, atol=1e-4)
    assert len(names) == 3


def test_names_of_a_transformers_head_are_its_labels(hf):
    folder, _ = hf(vit_classifier())
    _, head, names = load_teacher(Teacher(model=folder, head="native"))
    assert names == [("tabby cat", "tabby"), ("dog",), ("traffic_light",)]
    matched = match_native_head(head, names, ["Traffic Light", "tabby"])
    np.testing.assert_array_equal(matched.weight_CD, head.weight_CD[[2, 0]])
    np.testing.assert_array_equal(matched.bias_C, head.bias_C[[2, 0]])


def test_a_model_whose_logits_come_from_two_heads_has_no_native_head(hf):
    folder, _ = hf(transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**VIT, num_labels=3)))
    assert "linear_probe" in refusal(load_teacher, Teacher(model=folder, head="native"))
    assert load_teacher(Teacher(model=folder))[0](images(2)).shape == (2, 32)


def test_a_backbone_has_no_native_head(hf):
    folder, _ = hf(vit())
    _, head, names = load_teacher(Teacher(model=folder, head="native"))
    assert "linear_probe" in refusal(match_native_head, head, names, ["a", "b"])


def change(folder: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = Path(folder) / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize("head", ["linear_probe", "native"])
def test_weights_that_are_missing_or_misshapen_are_refused_by_name(hf, head):
    folder, _ = hf(vit_classifier())
    whole = Path(folder).with_name("whole")
    shutil.copytree(folder, whole)
    key = next(name for name in load_file(whole / "model.safetensors") if name.endswith("cls_token"))
    for edit in (lambda state: state.pop(key), lambda state: state.update({key: torch.zeros(1, 1, 7)})):
        shutil.copy(whole / "model.safetensors", folder)
        change(folder, edit)
        assert "cls_token" in refusal(load_teacher, Teacher(model=folder, head=head))


def test_a_classifier_that_is_missing_is_refused_where_it_is_needed(hf):
    folder, _ = hf(vit_classifier())
    change(folder, lambda state: state.pop("classifier.bias"))
    assert "classifier.bias" in refusal(load_teacher, Teacher(model=folder, head="native"))
    load_teacher(Teacher(model=folder))


def write(name: str, content: str | None) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink() if content is None else (folder / name).write_text(content)


def odd_input(**settings: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


DAMAGE: dict[str, Callable[[Path], object]] = {
    "pictures of gigabytes": odd_input(size={"height": 20_000, "width": 20_000}),
    "a negative size": odd_input(size={"height": -5, "width": -5}),
    "an infinite size": odd_input(size={"height": float("inf"), "width": 32}),
    "a mean of text": odd_input(image_mean="abc"),
    "a short mean": odd_input(image_mean=[0.5]),
    "a std of 0": odd_input(image_std=[0, 0, 0]),
    "no std": odd_input(image_std=None),
    "white of 0": odd_input(rescale_factor=0),
    "unknown resampling": odd_input(resample=99),
    "a processor that is a number": odd_input(image_processor_type=5),
    "no weights": write("model.safetensors", None),
    "weights cut off": lambda folder: os.truncate(folder / "model.safetensors", 500),
    "empty weights": write("model.safetensors", ""),
    "pickled weights": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "config no JSON": write("config.json", "{broken"),
    "empty config": write("config.json", "{}"),
    "unknown kind": write("config.json", '{"model_type": "nonsense"}'),
    "no config": write("config.json", None),
    "no preprocessing": write("preprocessor_config.json", None),
    "preprocessing no JSON": write("preprocessor_config.json", "{broken"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_damaged_folder_is_refused(hf, damage, prefix):
    folder, _ = hf(vit())
    damage(Path(folder))
    assert folder in refusal(load_teacher, Teacher(model=prefix + folder))


@pytest.mark.parametrize("settings", [{"input_size": [3, 20_000, 20_000]}, {"mean": "abc"}, {"crop_pct": 1e-9}])
def test_an_input_that_no_network_takes_is_refused_for_timm_too(settings):
    network = timm.create_model("test_resnet", num_classes=2)
    network.pretrained_cfg.update(settings)
    assert "no network takes" in refusal(timm_preprocessing, network, None, "teacher.model=x", True)


def test_names_of_outputs_without_end_are_cut_and_odd_architectures_passed_over(hf):
    folder, _ = hf(vit_classifier())
    file = Path(folder) / "config.json"
    settings = json.loads(file.read_text())
    settings["id2label"]["0"] = ", ".join(map(str, range(10**6)))
    file.write_text(json.dumps(settings))
    assert len(load_teacher(Teacher(model=folder, head="native")).names[0]) < 10_000
    file.write_text(json.dumps(settings | {"architectures": [5]}))
    load_teacher(Teacher(model=folder, head="native"))


def test_code_that_comes_with_a_model_is_not_run(hf, tmp_path):
    folder, _ = hf(vit())
    settings = json.loads((Path(folder) / "config.json").read_text())
    settings |= {"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}, "model_type": "evil"}
    (Path(folder) / "config.json").write_text(json.dumps(settings))
    (Path(folder) / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    refusal(load_teacher, Teacher(model=folder))
    assert not (tmp_path / "marker").exists()


def test_models_that_do_not_see_images_alone_are_refused(tmp_path):
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, vocab_size=9
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert str(tmp_path) in refusal(load_teacher, Teacher(model=str(tmp_path)))


def test_a_size_it_cannot_see_is_refused(hf):
    folder, _ = hf(vit())
    assert "64" in refusal(load_teacher, Teacher(model=folder, size=64))


def test_weights_beside_a_transformers_model_are_refused(hf):
    folder, _ = hf(vit())
    assert "teacher.weights" in refusal(load_teacher, Teacher(model=folder, weights="w.safetensors"))


PROCESSORS = {
    "ViT": transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.5, 0.4, 0.3], image_std=[0.25, 0.5, 0.2], resample=2
    ),
    "CLIP": transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "Bit": transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "not normalised": transformers.ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False),
    "from -1 to 1": transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, rescale_factor=1 / 127.5, image_mean=[1, 1, 1], image_std=[1, 1, 1]
    ),
    "not rescaled": transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, do_rescale=False, image_mean=[127, 128, 129], image_std=[64, 63, 62]
    ),
}


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("side", [32, 64])
def test_the_network_sees_what_its_own_processor_would_give(hf, kind, side):
    processor = PROCESSORS[kind]
    backbone = load_teacher(Teacher(model=hf(vit(), processor)[0]))[0]
    down, across = np.mgrid[0:side, 0:side] / side
    picture = np.stack([255 * down, 255 * across, 127 + 100 * np.sin(5 * down + 7 * across)], axis=-1).astype(np.uint8)
    expected = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
    whole = torch.from_numpy(WHOLE_IMAGE)[None]
    found = render(torch.from_numpy(picture)[None], whole, backbone.preprocessing)[0]
    # Theirs resizes in whole steps of 255, of which the smallest std makes the largest difference.
    step = 1.0 / 255 / min(backbone.preprocessing.std)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-4 if side == 32 else step)


def test_a_crop_says_the_size_that_the_network_sees(hf):
    processor = transformers.BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 32, "width": 32})
    assert load_teacher(Teacher(model=hf(vit(), processor)[0]))[0].preprocessing.size == 32


def test_with_its_margin_cut_off_the_network_sees_what_its_own_processor_would_give(hf):
    processor = transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    folder = hf(vit(), processor)[0]
    assert load_teacher(Teacher(model=folder))[0].preprocessing.resized is None
    backbone = load_teacher(Teacher(model=folder, center_crop=True))[0]
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    expected = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
    found = render(torch.from_numpy(picture)[None], torch.from_numpy(WHOLE_IMAGE)[None], backbone.preprocessing)[0]
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-4)


def test_preprocessing_that_cannot_be_followed_is_refused(hf):
    processor = transformers.MobileViTImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    assert "do_flip_channel_order" in refusal(load_teacher, Teacher(model=hf(vit(), processor)[0]))


def test_an_interpolation_that_is_not_ours_is_said_once(hf, caplog):
    sizes = {"size": {"height": 32, "width": 32}}
    folder, _ = hf(vit(), transformers.ViTImageProcessor(**sizes, resample=1))
    for _ in range(2):
        backbone, _, _ = load_teacher(Teacher(model=folder))
        assert backbone.preprocessing.interpolation == "bicubic"
    (said,) = (r.getMessage() for r in caplog.records if r.name == "raydistill.models.weights")
    assert said.endswith(f"{folder} was trained on pictures resized by lanczos; raydistill resizes them by bicubic")


# The native head by name


def head_of(names: list[tuple[str, ...]]) -> LinearHead:
    """Row k is all k, so that a row tells where it came from."""
    numbers = np.arange(len(names), dtype=np.float32)
    return LinearHead(np.tile(numbers[:, None], (1, 4)), numbers)


def matched(names: list[tuple[str, ...]], classes: list[str]) -> list[int]:
    head = match_native_head(head_of(names), names, classes)
    assert head.weight_CD.shape == (len(classes), 4)
    np.testing.assert_array_equal(head.weight_CD, np.tile(head.bias_C[:, None], (1, 4)))
    return head.bias_C.astype(int).tolist()


ANIMALS = [
    ("n01", "great white shark", "white shark"),
    ("n02", "crane"),
    ("n03", "Tree Frog", "tree-frog"),
    ("n04", "crane"),
]


@pytest.mark.parametrize(
    ("classes", "rows"),
    [
        (["great white shark", "tree frog"], [0, 2]),
        (["Tree_Frog", "WHITE-SHARK"], [2, 0]),
        (["n04", "n02"], [3, 1]),
        (["  tree   frog ", "n01"], [2, 0]),
    ],
)
def test_names_match_without_regard_to_case_and_separators(classes, rows):
    assert matched(ANIMALS, classes) == rows


@pytest.mark.parametrize(
    ("classes", "said", "unsaid"),
    [
        (["crane", "tree frog"], ["'crane'", "[1, 3]"], "frog"),
        (["white shark", "great white shark"],
         ["'great white shark' (the same output as 'white shark')"], "n01"),
        (["tree frgo", "tree frog", "zzz"], ["of 3 classes, ", "among the teacher's 4", "'tree frgo'",
                                             "nearest: tree frog", "'zzz'"], "n03"),
    ],
)  # fmt: skip
def test_classes_without_an_output_of_their_own_are_refused_by_name(classes, said, unsaid):
    message = refusal(match_native_head, head_of(ANIMALS), ANIMALS, classes)
    assert all(words in message for words in said)
    assert unsaid not in message


def test_of_thousands_of_unknown_names_some_are_named_and_the_rest_counted():
    """To look for the nearest of each would take an hour."""
    outputs = [(f"output number {k:04d}",) for k in range(3000)]
    message = refusal(match_native_head, head_of(outputs), outputs, [f"kind number {k:05d}" for k in range(3000)])
    assert "'kind number 00000' (nearest: output number" in message
    assert "'kind number 00009'" in message
    assert " and 2,990 more. Rename" in message
    assert len(message) < 1500


def test_a_model_without_a_head_or_names_is_refused():
    for head in (None, head_of(ANIMALS)):
        assert "no head with class names" in refusal(match_native_head, head, [], ["a"])


def test_imagenet_classes_are_known_by_synonym_and_synset(timm_weights):
    weights = timm_weights("test_resnet", 1000)
    _, head, names = load_teacher(Teacher(model="timm:test_resnet", weights=weights, head="native"))
    found = match_native_head(head, names, ["tench", "n01443537", "bow_tie", "tree frog", "Egyptian cat", "trash can"])
    np.testing.assert_array_equal(found.bias_C, head.bias_C[[0, 1, 457, 31, 285, 412]])
    assert "'crane'" in refusal(match_native_head, head, names, ["crane", "tench"])
    assert "tench" in refusal(match_native_head, head, names, ["tenchh", "goldfish"])


def test_a_head_multiplies_and_adds():
    head = LinearHead(np.float32([[1, 2], [3, 4], [5, 6]]), np.float32([10, 20, 30]))
    features = np.float16([[1, 0], [0.5, 2]])
    expected = [[11, 23, 35], [14.5, 29.5, 44.5]]
    np.testing.assert_allclose(head.logits(features), expected, rtol=1e-6)
    assert head.logits(features).dtype == np.float32


def test_a_name_to_the_letter_goes_before_one_that_is_like_it():
    names = [("Cat",), ("cat",), ("hot_dog",), ("hot-dog", "Frankfurter"), ("frankfurter",)]
    classes = ["hot-dog", "cat", "frankfurter", "hot_dog", "Cat"]
    assert matched(names, classes) == [3, 1, 4, 2, 0]
    assert "'CAT'" in refusal(match_native_head, head_of(names), names, ["CAT", "hot_dog"])


# A student of an earlier run


def student_folder(folder: Path, model: str, size: int | None, classes: tuple[str, ...]) -> students.Student:
    """What `distill` leaves; the student that it is."""
    config = Student(model=model, size=size)
    torch.manual_seed(0)
    student = students.build_student(config, len(classes))
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2)
    save_student(folder, config, classes, student)
    return student.eval()


COLOURS = ("red", "Light Green", "日本", "blue")


@pytest.mark.parametrize("kind", ["transformers", "raydistill"])
def test_no_folder_with_values_that_are_not_finite_loads(hf, tmp_path, kind):
    folder, file = (hf(vit_classifier())[0], "model.safetensors") if kind == "transformers" else ("", "")
    if kind == "raydistill":
        student_folder(tmp_path / "student", "timm:test_resnet", 32, COLOURS)
        folder, file = str(tmp_path / "student"), "student.safetensors"
    state = load_file(Path(folder) / file)
    key = max(state, key=lambda name: state[name].numel())
    state[key].view(-1)[-1] = float("nan")
    save_file(state, Path(folder) / file, {"format": "pt"})
    message = refusal(load_teacher, Teacher(model=folder))
    assert "NaN or infinite" in message
    assert key.rpartition(".")[0].split(".")[-1] in message


@pytest.mark.parametrize("model", ["timm:test_resnet", "timm:test_vit", "ViT", "ConvNext"])
@pytest.mark.parametrize("head", ["native", "linear_probe"])
def test_a_student_of_an_earlier_run_is_a_teacher(hf_folder, tmp_path, model, head):
    model = model if ":" in model else hf_folder(model)
    own = student_folder(tmp_path / "distill-123", model, 32, COLOURS)
    backbone, found, names = load_teacher(Teacher(model=str(tmp_path / "distill-123"), head=head))
    before = fingerprint(backbone)
    features = backbone.train()(images(3))
    with torch.no_grad():
        expected, pooled_features = own(images(3))
    assert torch.equal(features, pooled_features)
    np.testing.assert_allclose(found.logits(features.numpy()), expected, rtol=1e-4, atol=1e-4)
    assert backbone.preprocessing == own.preprocessing
    assert names == [(name,) for name in COLOURS]
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert fingerprint(backbone) == before


def test_the_classes_of_a_student_are_matched_by_name(tmp_path):
    student_folder(tmp_path / "s", "timm:test_resnet", 32, COLOURS)
    _, head, names = load_teacher(Teacher(model=str(tmp_path / "s"), head="native"))
    found = match_native_head(head, names, ["日本", "light_green", "RED"])
    np.testing.assert_array_equal(found.weight_CD, head.weight_CD[[2, 1, 0]])
    np.testing.assert_array_equal(found.bias_C, head.bias_C[[2, 1, 0]])
    message = refusal(match_native_head, head, names, ["red", "blau", "light green", "zzz"])
    assert all(name in message for name in ("'blau'", "nearest: blue", "'zzz'", "'blue'", "'日本'"))
    assert "'red'" not in message
    assert "'Light Green'" not in message


def test_a_student_may_see_another_size_where_its_network_takes_it(tmp_path):
    own = student_folder(tmp_path / "cnn", "timm:test_resnet", 32, COLOURS)
    backbone, *_ = load_teacher(Teacher(model=str(tmp_path / "cnn"), head="native", size=48))
    assert backbone.preprocessing == dataclasses.replace(own.preprocessing, size=48)
    with torch.no_grad():
        assert torch.equal(backbone(images(2, 48)), own(images(2, 48))[1])
    student_folder(tmp_path / "vit", "timm:vit_tiny_patch16_224", 32, COLOURS)
    assert "48" in refusal(load_teacher, Teacher(model=str(tmp_path / "vit"), head="native", size=48))


def test_weights_beside_a_student_are_refused(tmp_path):
    student_folder(tmp_path / "s", "timm:test_resnet", 32, COLOURS)
    assert "teacher.weights" in refusal(load_teacher, Teacher(model=str(tmp_path / "s"), weights="w.safetensors"))


def test_a_students_folder_may_lie_in_any_workspace(tmp_path):
    own = student_folder(tmp_path / "s", "timm:test_resnet", 32, COLOURS)
    backbone, *_ = load_teacher(Teacher(model=f"file://{tmp_path / 's'}", head="native"))
    with torch.no_grad():
        assert torch.equal(backbone(images(2)), own(images(2))[1])
    for nowhere in (f"file://{tmp_path / 'nowhere'}", "nosuchplace://bucket/s"):
        assert nowhere in refusal(load_teacher, Teacher(model=nowhere, head="native"))


def test_a_damaged_student_is_no_teacher(tmp_path):
    student_folder(tmp_path / "s", "timm:test_resnet", 32, COLOURS)
    weights = tmp_path / "s" / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_teacher(Teacher(model=str(tmp_path / "s"), head="native"))


# Heads from text

TEXT_LENGTH = 64


@pytest.fixture(scope="module")
def two_towers(tmp_path_factory) -> Callable[..., tuple[str, nn.Module, object]]:
    """Saves a small model with an image and a text tower; gives the folder, the network and its tokenizer."""

    def save(kind: str = "CLIP") -> tuple[str, nn.Module, object]:
        folder = tmp_path_factory.mktemp(kind)
        letters = sorted(ByteLevel.alphabet())
        tokens = [
            *letters,
            *(f"{letter}</w>" for letter in letters),
            "ca",
            "cat</w>",
            "<|startoftext|>",
            "<|endoftext|>",
        ]
        (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
        last = len(tokens) - 1
        special = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
        text = {**small, **special, "vocab_size": len(tokens), "max_position_embeddings": TEXT_LENGTH}
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(
            text_config={**text, "projection_size": 32} if kind == "Siglip" else text,
            vision_config={**small, "image_size": 32, "patch_size": 8},
            **({"projection_dim": 16} if kind == "CLIP" else {}),
        )
        network = getattr(transformers, f"{kind}Model")(config).eval()
        nn.init.constant_(network.logit_scale, 1.7)
        network.save_pretrained(folder)
        transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ).save_pretrained(folder)
        return str(folder), network, transformers.AutoTokenizer.from_pretrained(folder)

    return save


@pytest.fixture(scope="module")
def clip(two_towers):
    return two_towers("CLIP")


THINGS = ["cat", "Hot_dog", "日本の猫", "50% {off}", "b-a c"]
READ = ["cat", "Hot dog", "日本の猫", "50% {off}", "b a c"]


@pytest.mark.parametrize("templates", [("a photo of a {class}.",), ("{class}", "this is {class}, 100%", "{} {class}")])
def test_a_head_from_text_is_the_scaled_mean_of_the_prompts_embeddings(clip, templates):
    folder, network, tokenizer = clip
    head = zero_shot_head(Teacher(model=folder, head="zero_shot", prompts=templates), THINGS)
    rows = []
    with torch.no_grad():
        for name in READ:
            embedded = []
            for template in templates:  # alone and as long as it is, so padding must not matter
                tokens = tokenizer(template.replace("{class}", name), return_tensors="pt")
                vector = network.text_projection(network.text_model(**tokens).pooler_output)[0].double()
                embedded.append(vector / vector.norm())
            mean = torch.stack(embedded).mean(dim=0)
            rows.append(mean / mean.norm() * np.exp(1.7))
    np.testing.assert_allclose(head.weight_CD, torch.stack(rows).numpy(), rtol=1e-4, atol=1e-5)
    assert head.weight_CD.dtype == head.bias_C.dtype == np.float32
    assert not head.bias_C.any()
    np.testing.assert_allclose(np.linalg.norm(head.weight_CD, axis=1), np.exp(1.7), rtol=1e-5)


def test_logits_from_one_prompt_are_the_models_own(clip):
    folder, network, tokenizer = clip
    config = Teacher(model=folder, head="zero_shot")
    backbone, native, names = load_teacher(config)
    head = zero_shot_head(config, THINGS)
    tokens = tokenizer([f"a photo of a {name}." for name in READ], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = network(pixel_values=images(4), **tokens).logits_per_image
    features = backbone(images(4))
    np.testing.assert_allclose(head.logits(features.numpy()), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4), rtol=1e-5, atol=0)
    assert native is None
    assert names == []
    assert backbone.preprocessing.size == 32


def test_a_text_tower_that_wants_full_length_gets_it(two_towers):
    """SigLIP adds a bias, the same for every class."""
    folder, network, tokenizer = two_towers("Siglip")
    config = Teacher(model=folder, head="zero_shot", prompts=("{class}",))
    head, backbone = zero_shot_head(config, THINGS), load_teacher(config)[0]
    tokens = tokenizer(READ, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    with torch.no_grad():
        expected = network(pixel_values=images(4), **tokens).logits_per_image - network.logit_bias
    np.testing.assert_allclose(head.logits(backbone(images(4)).numpy()), expected, rtol=1e-4, atol=1e-4)


def test_the_image_tower_takes_a_linear_probe_too(clip):
    folder, network, _ = clip
    backbone, head, _ = load_teacher(Teacher(model=folder))
    with torch.no_grad():
        expected = normalize(network.visual_projection(network.vision_model(images(3)).pooler_output), dim=1)
    torch.testing.assert_close(backbone(images(3)), expected, rtol=1e-5, atol=1e-6)
    assert head is None


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10}] * 12}}, "64 times as long"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": "e" * 100}}, "64 times as long"),
        ({"normalizer": {"type": "Prepend", "prepend": "e" * 100}}, "64 times as long"),
        ({"normalizer": {"type": "Prepend", "prepend": "e" * 5}}, ""),
        ({"deep": eval("[" * 90 + "]" * 90)}, ""),
    ],
)  # fmt: skip
def test_a_tokenizer_that_makes_a_text_very_long_is_refused(tmp_path, odd, said):
    (tmp_path / "tokenizer.json").write_text(json.dumps(odd))
    if said:
        assert said in refusal(check_tokenizer, tmp_path, "teacher.model=x")
    else:
        check_tokenizer(tmp_path, "teacher.model=x")
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    assert "tokenizer.json cannot be read" in refusal(check_tokenizer, tmp_path, "teacher.model=x")


def test_a_tokenizer_whose_library_panics_is_refused(clip, tmp_path):
    folder, _, tokenizer = shutil.copytree(clip[0], tmp_path / "odd"), *clip[1:]
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    tree["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert "cannot be loaded" in refusal(zero_shot_head, Teacher(model=str(folder), head="zero_shot"), THINGS)


def test_tokens_that_the_tower_does_not_know_are_refused(clip, tmp_path):
    folder = shutil.copytree(clip[0], tmp_path / "odd")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({token: number + 10**6 for token, number in vocabulary.items()}))
    config = Teacher(model=str(folder), head="zero_shot")
    assert "does not fit its text tower" in refusal(zero_shot_head, config, THINGS)


@pytest.mark.parametrize("settings", [{}, {"model_max_length": 10**30}])
def test_a_tokenizer_that_states_no_length_takes_the_towers(clip, tmp_path, settings):
    folder, *_ = clip
    silent = shutil.copytree(folder, tmp_path / "silent")
    (silent / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **settings}))
    prompts = ("{class}", "a photo of a {class}")  # of two lengths
    expected, found = (
        zero_shot_head(Teacher(model=str(place), head="zero_shot", prompts=prompts), THINGS)
        for place in (folder, silent)
    )
    np.testing.assert_allclose(found.weight_CD, expected.weight_CD, rtol=1e-5, atol=1e-6)


def test_a_name_longer_than_the_tower_reads_is_cut(clip):
    folder, *_ = clip
    head = zero_shot_head(Teacher(model=folder, head="zero_shot"), ["cat", "very " * TEXT_LENGTH + "long"])
    assert np.isfinite(head.weight_CD).all()


@pytest.mark.parametrize(
    ("classes", "same"),
    [
        (["cat", "hot_dog", "hot-dog"], ("'hot_dog'", "'hot-dog'")),
        (["Cat", "dog", "cat"], ("'Cat'", "'cat'")),
        (["dog", " tree frog", "Tree_Frog "], ("' tree frog'", "'Tree_Frog '")),
        (["ÄPFEL", "äpfel"], ("'ÄPFEL'", "'äpfel'")),
        (["a b", "a_b", "a-b", "c"], ("'a b'", "'a_b'", "'a-b'")),
    ],
)
def test_classes_that_make_one_prompt_are_refused_by_name(clip, classes, same):
    config = Teacher(model=clip[0], head="zero_shot")
    for message in (refusal(zero_shot_head, config, classes), refusal(prompts_of, config.prompts, classes)):
        assert all(name in message for name in same)
        assert "'dog'" not in message
        assert "linear_probe" in message


def test_prompts_are_taken_to_the_letter():
    templates = ("{class}", "{} {0} {class} %s 100% {{class}}", "\\1 $x {class}{class}\n")
    names = ["{x}", "50%s", "日本", "{class}", r"\1", "naïve café"]
    expected = [[name, f"{{}} {{0}} {name} %s 100% {{{name}}}", f"\\1 $x {name}{name}\n"] for name in names]
    assert prompts_of(templates, names) == expected
    assert prompts_of(("a {class}.",), ["  tree_frog--x "]) == [["a tree frog x."]]


def test_a_model_without_a_text_tower_has_no_head_from_text(hf, timm_weights, tmp_path):
    folder, _ = hf(vit())
    student_folder(tmp_path / "student", "timm:test_resnet", 32, COLOURS)
    models = {"hf:" + folder: None, "timm:test_resnet": timm_weights("test_resnet"), str(tmp_path / "student"): None}
    for model, weights in models.items():
        message = refusal(zero_shot_head, Teacher(model=model, weights=weights, head="zero_shot"), ["a", "b"])
        assert "text tower" in message
        assert model in message
    assert "text tower" in refusal(load_teacher, Teacher(model=folder, head="zero_shot"))


@pytest.mark.parametrize("lost", ["text_projection.weight", "text_model.final_layer_norm.weight", "logit_scale"])
def test_a_text_tower_that_is_not_whole_is_refused(clip, tmp_path, lost):
    folder = str(shutil.copytree(clip[0], tmp_path / "cut"))
    change(folder, lambda state: state.pop(lost))
    assert lost in refusal(zero_shot_head, Teacher(model=folder, head="zero_shot"), ["a", "b"])


@pytest.mark.parametrize("lost", [("vocab.json",), ("merges.txt",), ("vocab.json", "merges.txt")])
def test_a_tokenizer_without_its_vocabulary_is_refused(clip, tmp_path, lost):
    """Loaded as it is, it would take every word for the same unknown one."""
    folder = shutil.copytree(clip[0], tmp_path / "cut")
    for name in lost:
        (folder / name).unlink()
    assert str(folder) in refusal(zero_shot_head, Teacher(model=str(folder), head="zero_shot"), ["cat", "dog"])


def test_a_class_in_letters_that_the_tokenizer_does_not_know_is_refused(clip, tmp_path):
    folder = shutil.copytree(clip[0], tmp_path / "latin")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", ".", "cat", "dog"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    config = Teacher(model=str(folder), head="zero_shot")
    assert "'日本'" in refusal(zero_shot_head, config, ["cat", "日本"])
    assert zero_shot_head(config, ["cat", "dog"]).weight_CD.shape == (2, 16)


def test_what_is_fetched_of_a_hub_model_is_all_that_it_needs(clip, tmp_path, monkeypatch):
    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        cache = tmp_path / "cache"
        cache.mkdir(exist_ok=True)
        for file in Path(clip[0]).iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found, expected = (
        zero_shot_head(Teacher(model=model, head="zero_shot"), THINGS) for model in ("hf:owner/clip", clip[0])
    )
    np.testing.assert_array_equal(found.weight_CD, expected.weight_CD)
