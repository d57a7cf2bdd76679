"""The student: its features and logits are the network's own, at any size, from any start, and again from the folder it
is written to; and what only its training sees."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import nn
from transformers import AutoModelForImageClassification

from raydistill.config import Student as StudentConfig
from raydistill.data.sample import SampleSet
from raydistill.errors import CheckpointError, ConfigError
from raydistill.models.projections import Adapter, ProjectionHead
from raydistill.models.student import (
    Student,
    build_student,
    has_batch_norm,
    read_student,
    split_logits,
)
from tests.models.conftest import SIDE, classifier
from tests.small_run import save_student, write_shard

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["mobilenetv3_small_050", "test_resnet", "test_vit", "test_convnext", "vit_tiny_patch16_224"]


def built(name: str, num_classes: int = 4, seed: int = 0, **options: object):
    torch.manual_seed(seed)
    return build_student(StudentConfig(model=f"timm:{name}", **options), num_classes)


def images(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def refusal(name: str, num_classes: int = 4, **options: object) -> str:
    with pytest.raises(ConfigError) as refused:
        built(name, num_classes, **options)
    (message,) = refused.value.args
    return message


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [32, 64])
def test_logits_and_features_are_the_timm_networks_own(name, size):
    """A network of fixed size, such as a ViT, is built for the size that is asked for."""
    student = built(name, size=size).eval()
    batch = images(3, size)
    with torch.no_grad():
        logits, features = student(batch)
        expected = student.network(batch)
        pooled = student.network.forward_head(student.network.forward_features(batch), pre_logits=True)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features, pooled, rtol=1e-5, atol=1e-5)
    assert logits.shape == (3, 4)
    assert features.shape == (3, student.num_features)
    assert student.preprocessing.size == size


@pytest.mark.parametrize("name", KINDS)
def test_what_ships_loads_into_plain_timm(name):
    """Keys are timm's, and the plain network gives the student's logits."""
    student = built(name, size=48).eval()
    fixed = {"img_size": 48} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    plain = timm.create_model(name, num_classes=4, **fixed).eval()
    plain.load_state_dict(student.network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(images(2, 48)), student(images(2, 48))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", ["tf_efficientnet_lite0", "mobilenetv3_small_050", "test_resnet", "test_vit"])
@pytest.mark.parametrize("num_classes", [2, 10])
def test_a_new_student_gives_every_class_a_like_chance(model, num_classes):
    """timm's own classifier of an EfficientNet is nearly certain of one of ten classes before it has seen a picture."""
    torch.manual_seed(0)
    student = build_student(StudentConfig(model=f"timm:{model}", size=32), num_classes).train()
    likely = student(torch.randn(32, 3, 32, 32))[0].softmax(dim=1)
    assert likely.max() < 1 / num_classes + 0.25


def test_a_random_start_is_decided_by_the_seed():
    first, again, other = built("test_resnet", seed=1), built("test_resnet", seed=1), built("test_resnet", seed=2)
    weights = [student.network.state_dict()["fc.weight"] for student in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_building_leaves_the_network_as_timm_made_it_but_for_a_classifier_that_is_sure_of_nothing():
    """Looking for the number of features moves no running mean and leaves the network in train mode."""
    student = built("test_resnet", seed=3)
    torch.manual_seed(3)
    fresh = timm.create_model("test_resnet", num_classes=4)
    own = student.network.state_dict()
    assert {k for k, value in fresh.state_dict().items() if not torch.equal(value, own[k])} == {"fc.weight", "fc.bias"}
    assert student.training
    assert all(module.training for module in student.network.modules())


def test_preprocessing_is_the_models_own():
    for name in ("test_vit", "mobilenetv3_small_050"):
        own = timm.get_pretrained_cfg(name)
        found = built(name, size=48).preprocessing
        assert (found.size, found.mean, found.std, found.interpolation) == (48, own.mean, own.std, own.interpolation)


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_a_pretrained_start_keeps_all_but_the_classifier(name, tmp_path):
    size = 32
    fixed = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    torch.manual_seed(7)
    source = timm.create_model(name, num_classes=11, **fixed)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    student = built(name, 4, init="pretrained", weights=str(tmp_path / "w.safetensors"), size=size).eval()
    classifier = source.default_cfg["classifier"]
    found, expected = student.network.state_dict(), source.state_dict()
    for key in expected:
        if key.startswith(f"{classifier}."):
            assert found[key].shape[0] == 4
        else:
            assert torch.equal(found[key], expected[key]), key
    with torch.no_grad():
        features = source.eval().forward_head(source.forward_features(images(2, size)), pre_logits=True)
        torch.testing.assert_close(student(images(2, size))[1], features, rtol=1e-5, atol=1e-5)


def test_weights_for_another_size_of_a_fixed_network_are_refused(tmp_path):
    name = "vit_tiny_patch16_224"
    save_file(timm.create_model(name, num_classes=4, img_size=64).state_dict(), tmp_path / "w.safetensors")
    message = refusal(name, init="pretrained", weights=str(tmp_path / "w.safetensors"), size=32)
    assert "pos_embed" in message


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224", "mixer_s32_224"])
def test_a_size_that_the_network_cannot_take_is_refused(name):
    assert "student.size" in refusal(name, size=8)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "volo_d1_224", "dla34", "levit_128s"])
def test_networks_that_are_no_single_classifier_on_pooled_features_are_refused(name):
    """Two heads, an auxiliary head, a convolution: training would fail, or learn what the network that ships lacks."""
    assert name in refusal(name)


@pytest.mark.parametrize(("name", "expected"), [("test_resnet", True), ("test_vit", False), ("test_convnext", False)])
def test_batch_norm_is_found(name, expected):
    assert has_batch_norm(built(name)) is expected


def test_an_eval_student_sees_an_image_alike_in_any_batch():
    student = built("mobilenetv3_small_050").eval()
    batch = images(5, 64)
    with torch.no_grad():
        together = student(batch)[0]
        alone = torch.cat([student(image[None])[0] for image in batch])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


# The projection


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 1e3]), dimensions=st.sampled_from([2, 16, 128]))
def test_projections_lie_on_the_unit_sphere(seed, scale, dimensions):
    torch.manual_seed(seed)
    head = ProjectionHead("two_layer", 24, dimensions)
    projected = head(scale * torch.randn(7, 24))
    assert projected.shape == (7, dimensions)
    torch.testing.assert_close(projected.norm(dim=1), torch.ones(7), rtol=1e-5, atol=0)


def test_the_projection_leaves_its_input_as_it_was():
    features = torch.randn(5, 6)
    before = features.clone()
    ProjectionHead("two_layer", 6, 3)(features)
    assert torch.equal(features, before)


def test_a_projection_of_nothing_is_finite():
    head = ProjectionHead("two_layer", 4, 3)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    features = torch.randn(2, 4, requires_grad=True)
    projected = head(features)
    projected.sum().backward()
    assert torch.isfinite(projected).all()
    assert torch.isfinite(features.grad).all()


def test_a_projection_under_autocast_is_normalised_in_fp32():
    head = ProjectionHead("two_layer", 24, 16)
    with torch.autocast("cpu", torch.bfloat16):
        projected = head(torch.randn(7, 24))
    assert projected.dtype == torch.float32
    torch.testing.assert_close(projected.norm(dim=1), torch.ones(7), rtol=1e-5, atol=0)


LAYERS = {
    "linear": ["6 to 3 and a bias"],
    "two_layer": ["6 to 6 and a bias", "ReLU", "6 to 3 and a bias"],
    "simclr": ["6 to 6", "scaled norm of 6", "ReLU", "6 to 3", "norm of 3"],
    "simclrv2": ["6 to 6", "scaled norm of 6", "ReLU"] * 2 + ["6 to 3", "norm of 3"],
}


def layers(network: nn.Module) -> list[str]:
    """What a stack of layers is made of, in words."""
    words = []
    for module in network.modules():
        if isinstance(module, nn.Linear):
            bias = " and a bias" if module.bias is not None else ""
            words.append(f"{module.in_features} to {module.out_features}{bias}")
        elif isinstance(module, nn.BatchNorm1d):
            words.append(f"{'scaled ' if module.affine else ''}norm of {module.num_features}")
        elif isinstance(module, nn.ReLU):
            words.append("ReLU")
    return words


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_projection_heads_are_those_of_the_papers_code(kind, training):
    torch.manual_seed(0)
    head = ProjectionHead(kind, 6, 3).train(training)
    assert layers(head) == LAYERS[kind]
    features = torch.randn(9, 6, requires_grad=True)
    projected = head(features)
    assert projected.shape == (9, 3)
    torch.testing.assert_close(projected.norm(dim=1), torch.ones(9), rtol=1e-5, atol=0)
    projected[:, 0].sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters() if parameter.ndim == 2)
    assert features.grad.abs().sum() > 0


def normed(features: torch.Tensor) -> torch.Tensor:
    return (features - features.mean(dim=0)) / (features.var(dim=0, correction=0) + 1e-5).sqrt()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_head_is_what_its_layers_say(kind):
    head = ProjectionHead(kind, 6, 3).train()
    expected = features = torch.randn(9, 6)
    linears = [module for module in head.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for linear in linears:
            expected = expected @ linear.weight.T + (0 if linear.bias is None else linear.bias)
            expected = normed(expected) if kind.startswith("simclr") else expected
            expected = expected if linear is linears[-1] else expected.clamp(min=0)
        expected = expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-5)


# The adapter


@pytest.mark.parametrize(
    ("kind", "widths", "expected"),
    [
        ("linear", (6, 20), ["6 to 20 and a bias"]),
        ("two_layer", (6, 20), ["6 to 13 and a bias", "ReLU", "13 to 20 and a bias"]),
        ("two_layer", (20, 7), ["20 to 13 and a bias", "ReLU", "13 to 7 and a bias"]),
    ],
)
def test_an_adapter_leads_from_the_students_width_to_the_teachers(kind, widths, expected):
    torch.manual_seed(0)
    adapter = Adapter(kind, *widths)
    adapted = adapter(torch.randn(50, widths[0]))
    assert layers(adapter) == expected
    assert adapted.shape == (50, widths[1])
    assert adapted.min() < 0 < adapted.max()


# A frozen body


def start(model: str, hf_folder: Callable[..., str], **options: object) -> Student:
    """A student of a timm name, or of the name of a kind of transformers model."""
    name = f"timm:{model}" if model[0].islower() else hf_folder(model)
    torch.manual_seed(0)
    return build_student(StudentConfig(model=name, **{"size": 32, **options}), 4)


@torch.enable_grad()
def train(student: Student, num_steps: int = 3) -> None:
    """Steps that move whatever can be moved: weight decay, and other images each time."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
    for step in range(num_steps):
        batch = 1 + 2 * torch.randn(6, 3, student.preprocessing.size, student.preprocessing.size)
        logits, features = student(batch)
        loss = nn.functional.cross_entropy(logits, torch.arange(6) % 4) + 1e-3 * features.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss), step


def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


FREEZABLE = ["test_resnet", "mobilenetv3_small_050", "test_vit", "test_efficientnet", "ViT", "ResNet"]


@pytest.mark.parametrize("model", FREEZABLE)
@pytest.mark.parametrize("frozen", [True, False])
def test_of_a_frozen_body_only_the_classifier_moves(hf_folder, model, frozen):
    """Whatever wraps the student and puts it in train mode; without freezing, weights and batch norm do move."""
    student = start(model, hf_folder)
    if frozen:
        student.freeze_body()
    before = state(student.network)
    nn.Sequential(student).eval().train()
    train(student)
    student.eval().train()
    train(student)
    prefix = next(name for name, module in student.network.named_modules() if module is student.classifier)
    moved = changed(before, state(student.network))
    of_classifier = {name for name in before if name.startswith(f"{prefix}.")}
    assert len(of_classifier) == 2
    assert moved == of_classifier if frozen else moved > of_classifier
    assert {id(p) for p in student.body_parameters()}.isdisjoint(map(id, student.classifier.parameters()))
    assert len(student.body_parameters()) == len(list(student.network.parameters())) - 2


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_body_has_no_dropout(hf_folder, frozen):
    settings = Path(hf_folder("ViT"), "config.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"hidden_dropout_prob": 0.5}))
    student = build_student(StudentConfig(model=str(settings.parent), size=32), 4)
    if frozen:
        student.freeze_body()
    batch = images(4, 32)
    with torch.no_grad():
        trained, evaluated = student.train()(batch)[1], student.eval()(batch)[1]
    assert torch.equal(trained, evaluated) is frozen


def test_a_copy_of_a_frozen_student_is_frozen_too(hf_folder):
    student = start("test_resnet", hf_folder)
    student.freeze_body()
    copied = ModelEmaV3(student, decay=0.5).module
    before = state(copied.network)
    train(copied.train())
    assert {name.partition(".")[0] for name in changed(before, state(copied.network))} == {"fc"}


# Students from transformers


HF_KINDS = ["ViT", "ResNet", "ConvNext", "Swin", "Dinov2"]


@pytest.mark.parametrize("kind", HF_KINDS)
@pytest.mark.parametrize("init", ["random", "pretrained"])
def test_a_student_from_transformers_gives_the_networks_logits_and_what_enters_its_classifier(hf_folder, kind, init):
    student = start(kind, hf_folder, init=init).eval()
    with torch.no_grad():
        logits, features = student(images(3, 32))
        expected = student.network(pixel_values=images(3, 32)).logits
        again = student.classifier(features)
    assert torch.equal(logits, expected)
    torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-6)
    assert logits.shape == (3, 4)
    assert features.shape == (3, student.num_features)
    assert student.preprocessing.mean == (0.5, 0.4, 0.3)


@pytest.mark.parametrize("kind", ["ViT", "ResNet"])
def test_an_average_of_a_transformers_student_is_a_network_of_its_own(hf_folder, kind):
    student = start(kind, hf_folder)
    batch, other = images(3, 32), -images(3, 32)
    with torch.no_grad():
        student.eval()(other)  # what the original saw last is not what its copy gives
        average = ModelEmaV3(student, decay=0.5)
        expected = student(batch)
        train(student.train())
        of_student = student.eval()(other)
        logits, features = average.module(batch)
        assert torch.equal(logits, expected[0])
        assert torch.equal(features, expected[1])
        assert not torch.equal(of_student[0], average.module(other)[0])
        before = state(average.module)
        average.update(student)
        for name, value in state(average.module).items():
            now = student.state_dict()[name]
            if value.is_floating_point():
                torch.testing.assert_close(value, (before[name] + now) / 2, rtol=1e-5, atol=1e-6)
        logits, features = average.module(batch)
        torch.testing.assert_close(average.module.classifier(features), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", HF_KINDS)
@pytest.mark.parametrize("num_classes", [4, 5])
def test_pretrained_takes_the_folders_weights_but_for_the_classifier(hf_folder, kind, num_classes):
    """A new one even where the number of classes is the same."""
    student = build_student(StudentConfig(model=hf_folder(kind), init="pretrained", size=32), num_classes)
    found, saved = student.network.state_dict(), classifier(kind).state_dict()
    assert found.keys() == saved.keys()
    differ = {k for k in found if found[k].shape != saved[k].shape or not torch.equal(found[k], saved[k])}
    own = next(name for name, module in student.network.named_modules() if module is student.classifier)
    assert differ - {f"{own}.bias"} == {f"{own}.weight"}
    assert student.classifier.out_features == num_classes
    assert 0 < student.classifier.weight.abs().max() < 0.1
    assert student.classifier.bias.abs().max() == 0


@pytest.mark.parametrize("kind", HF_KINDS)
def test_random_takes_none_of_the_folders_weights(hf_folder, kind):
    folder = hf_folder(kind)
    students = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        students.append(build_student(StudentConfig(model=folder, size=SIDE[kind]), 5))
    first, again, other = (student.network.state_dict() for student in students)
    saved = classifier(kind).state_dict()
    drawn = {name for name, value in saved.items() if value.is_floating_point() and value.std() > 1e-3}
    assert len(drawn) > 5
    assert drawn <= changed(saved, first)
    own = next(name for name, module in students[0].network.named_modules() if module is students[0].classifier)
    assert drawn - {f"{own}.bias"} <= changed(other, first)  # which begins at zero
    assert changed(first, again) == set()
    assert students[0].training
    assert all(module.training for module in students[0].modules())


@pytest.mark.parametrize("init", ["random", "pretrained"])
def test_a_student_trains_in_fp32_whatever_its_checkpoint_is_stored_in(hf_folder, init):
    folder = hf_folder("ViT", dtype=torch.bfloat16)
    student = build_student(StudentConfig(model=folder, init=init, size=32), 4)
    assert {value.dtype for value in student.network.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("size", [32, 64])
def test_a_random_student_has_positions_for_the_size_that_is_asked_for(hf_folder, size):
    student = start("ViT", hf_folder, size=size)
    assert student.preprocessing.size == size
    assert student(images(2, size))[0].shape == (2, 4)


def test_a_folder_with_a_config_alone_is_an_architecture(hf_folder):
    folder = hf_folder("ViT")
    for name in ("model.safetensors", "preprocessor_config.json"):
        Path(folder, name).unlink()
    assert build_student(StudentConfig(model=folder, size=None), 4).preprocessing.size == 32
    with pytest.raises(ConfigError, match=r"student\.model"):
        build_student(StudentConfig(model=folder, size=None, init="pretrained"), 4)


def weights_of(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def of_another_model(state: dict[str, torch.Tensor], hf_folder: Callable[..., str]) -> dict[str, torch.Tensor]:
    return weights_of(hf_folder("ResNet", "other"))


def of_another_width(state: dict[str, torch.Tensor], hf_folder: Callable[..., str]) -> dict[str, torch.Tensor]:
    return {k: value.repeat_interleave(2, -1) if value.ndim else value for k, value in state.items()}


def without_a_layer(state: dict[str, torch.Tensor], hf_folder: Callable[..., str]) -> dict[str, torch.Tensor]:
    return {k: value for k, value in state.items() if "cls_token" not in k}


@pytest.mark.parametrize("damage", [of_another_model, of_another_width, without_a_layer])
def test_a_folder_whose_weights_are_another_models_is_refused(hf_folder, damage):
    folder = hf_folder("ViT")
    save_file(damage(weights_of(folder), hf_folder), Path(folder) / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"student\.model=.*weights are missing or of another model.*embeddings"):
        build_student(StudentConfig(model=folder, init="pretrained", size=32), 4)


def test_a_size_without_positions_is_refused(hf_folder):
    with pytest.raises(ConfigError, match=r"64 pixels.*student\.size"):
        start("ViT", hf_folder, init="pretrained", size=64)


def test_weights_beside_a_transformers_student_are_refused(hf_folder):
    with pytest.raises(ConfigError, match=r"student\.weights"):
        start("ViT", hf_folder, init="pretrained", weights="w.safetensors")


@pytest.mark.parametrize("known", [True, False])
def test_code_that_comes_with_a_student_is_not_run(hf_folder, tmp_path, known):
    """Neither that of an unknown kind of model nor that of a known kind that classifies no images."""
    folder = hf_folder("ViT")
    settings = json.loads(Path(folder, "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForImageClassification": "evil.M"}
    settings["model_type"] = "bert" if known else "evil"
    Path(folder, "config.json").write_text(json.dumps(settings))
    Path(folder, "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    with pytest.raises(ConfigError, match=r"student\.model"):
        build_student(StudentConfig(model=folder, size=32), 4)
    assert not (tmp_path / "marker").exists()


# The folder of a student


CLASSES = ("a", "Ä b", "日本", "{x}")


def assert_reads_back(student: Student, config: StudentConfig, folder: Path) -> None:
    train(student.train())  # away from its start, and batch norm from its own
    torch.manual_seed(99)  # reading is no draw of the same numbers
    found, classes = read_student(str(save_student(folder, config, CLASSES, student)))
    student.eval()
    batch = images(3, student.preprocessing.size)
    with torch.no_grad():
        for ours, theirs in zip(found(batch), student(batch), strict=True):
            assert torch.equal(ours, theirs)
    assert classes == CLASSES
    assert found.preprocessing == student.preprocessing
    assert not any(module.training for module in found.modules())


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", KINDS)
def test_a_timm_student_is_read_back_to_the_bit(tmp_path, name, size):
    config = StudentConfig(model=f"timm:{name}", size=size)
    assert_reads_back(built(name, size=size), config, tmp_path / "student")


@pytest.mark.parametrize(
    ("kind", "init", "size"),
    [
        *((kind, init, 32) for kind in HF_KINDS for init in ("random", "pretrained")),
        ("ViT", "random", 64),
        ("ViT", "random", None),
        ("ConvNext", "pretrained", 64),
        ("Swin", "pretrained", 64),
        ("Dinov2", "pretrained", 64),
        ("Dinov2", "pretrained", None),
        ("Dinov2", "random", None),
    ],
)
def test_a_transformers_student_is_read_back_to_the_bit(hf_folder, tmp_path, kind, init, size):
    """Without the folder that it came from, and whatever size its positions were made for."""
    folder = hf_folder(kind)
    config = StudentConfig(model=folder, init=init, size=size)
    student = build_student(config, 4)
    shutil.rmtree(folder)
    assert_reads_back(student, config, tmp_path / "student")


@pytest.mark.parametrize("kind", HF_KINDS)
def test_what_ships_loads_into_plain_transformers(hf_folder, tmp_path, kind):
    config = StudentConfig(model=hf_folder(kind), init="pretrained", size=32)
    student = build_student(config, 4).eval()
    folder = save_student(tmp_path / "student", config, CLASSES, student)
    (folder / "student.safetensors").rename(folder / "model.safetensors")
    plain, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(plain.eval()(images(2, 32)).logits, student(images(2, 32))[0])


def test_a_student_of_a_folder_that_timm_saved_is_read_back_to_the_bit(tmp_path):
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(timm.create_model("test_resnet", num_classes=4).state_dict(), folder / "model.safetensors")
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 48, 48], "interpolation": "bilinear"}
    settings = {"architecture": "test_resnet", "num_classes": 4, "pretrained_cfg": own}
    (folder / "config.json").write_text(json.dumps(settings))
    config = StudentConfig(model=str(folder), init="pretrained", size=None)
    student = build_student(config, 4)
    assert (student.preprocessing.size, student.preprocessing.mean) == (48, (0.1, 0.2, 0.3))
    assert_reads_back(student, config, tmp_path / "student")


def test_a_students_folder_may_lie_where_fsspec_finds_it(hf_folder, tmp_path):
    config = StudentConfig(model=hf_folder("ViT"), size=32)
    folder = save_student(tmp_path / "student", config, CLASSES)
    found, classes = read_student(f"file://{folder}")
    again, _ = read_student(str(folder))
    assert classes == CLASSES
    with torch.no_grad():
        assert torch.equal(found(images(2, 32))[0], again(images(2, 32))[0])


def drop(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-10])


def forget(key: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        about = json.loads((folder / "student.json").read_text())
        del about[key]
        (folder / "student.json").write_text(json.dumps(about))

    return edit


def settings(**odd: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | odd))

    return edit


def swap_weights(folder: Path) -> None:
    save_file(timm.create_model("test_resnet", num_classes=4).state_dict(), folder / "student.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        drop("student.json"), drop("student.safetensors"), drop("config.json"), cut("student.json"),
        cut("student.safetensors"), cut("config.json"), forget("library"), forget("classes"), forget("preprocessing"),
        swap_weights, settings(hidden_size=0), settings(num_attention_heads=0), settings(hidden_act="none"),
        settings(patch_size=[]), settings(image_size="large"),
        lambda folder: (folder / "student.json").write_text("[1]"),
    ],
)  # fmt: skip
def test_a_damaged_folder_of_a_student_is_refused_by_name(hf_folder, tmp_path, damage):
    config = StudentConfig(model=hf_folder("ViT"), size=32)
    folder = save_student(tmp_path / "student", config, CLASSES)
    read_student(str(folder))
    damage(folder)
    with pytest.raises((CheckpointError, ConfigError), match=str(folder)):
        read_student(str(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [("size", 2048), ("model", "timm:hf-hub:evil/evil"), ("model", "timm:resnet152"), ("model", "hf:evil/evil")],
)
def test_a_student_that_is_not_the_jobs_is_refused_before_it_is_built(tmp_path, monkeypatch, key, value):
    config = StudentConfig(model="timm:test_resnet", size=32)
    folder = save_student(tmp_path / "student", config, CLASSES)
    assert read_student(str(folder), config)[1] == CLASSES
    about = json.loads((folder / "student.json").read_text())
    (about["preprocessing"] if key == "size" else about)[key] = value
    (folder / "student.json").write_text(json.dumps(about))
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(CheckpointError, match=rf"{folder} holds no complete student .*the job's is timm:test_resnet"):
        read_student(str(folder), config)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_without_a_size_in_the_job_the_models_own_counts(hf_folder, tmp_path, library):
    config = StudentConfig(model="timm:test_resnet" if library == "timm" else hf_folder("ViT"), size=None)
    folder = save_student(tmp_path / "student", config, CLASSES)
    about = json.loads((folder / "student.json").read_text())
    assert read_student(str(folder), config)[0].preprocessing.size == about["preprocessing"]["size"]
    for size in (*([about["preprocessing"]["size"] * 2] if library == "timm" else []), 2048):
        about["preprocessing"]["size"] = size
        (folder / "student.json").write_text(json.dumps(about))
        with pytest.raises(CheckpointError, match=rf"{folder} holds no complete student \(.*{size}.*pixels"):
            read_student(str(folder), config)


def test_a_students_folder_is_no_name_of_a_student(hf_folder, tmp_path):
    """The way to go on from one is said."""
    config = StudentConfig(model="timm:test_resnet", size=32)
    folder = save_student(tmp_path / "student", config, CLASSES)
    with pytest.raises(ConfigError, match=r"student\.weights"):
        build_student(StudentConfig(model=str(folder), size=32), 4)
    student = built("test_resnet", init="pretrained", weights=f"{folder}/student.safetensors", size=32)
    saved = load_file(folder / "student.safetensors")
    assert {k.partition(".")[0] for k in changed(saved, state(student.network))} == {"fc"}


# Logits of a split


@pytest.fixture
def samples(tmp_path: Path) -> tuple[SampleSet, np.ndarray]:
    """Two shards of a val split, and their pictures."""
    pictures = np.random.default_rng(0).integers(0, 256, (7, 48, 48, 3), dtype=np.uint8)
    for shard, numbers in enumerate((range(5), range(5, 7))):
        images = [pictures[n].tobytes() for n in numbers]
        write_shard(tmp_path, f"val-{shard:05d}", images, [None if n == 2 else n % 4 for n in numbers])
    return SampleSet(str(tmp_path), ("a", "b", "c", "d"), 48, {"val": (5, 2)}, {"val": 6}, 0, {"val": ""}, ""), pictures


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_logits_of_a_split_come_in_order_whatever_the_batch_size(samples, batch_size):
    student = built("mobilenetv3_small_050", size=48).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    logits, labels = split_logits(student, samples[0], "val", torch.device("cpu"), batch_size)
    mean, std = (torch.tensor(v)[:, None, None] for v in (student.preprocessing.mean, student.preprocessing.std))
    seen = (torch.from_numpy(samples[1]).permute(0, 3, 1, 2) / 255 - mean) / std
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    with torch.no_grad():
        expected = student.eval().network(seen)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [0, 1, -1, 3, 0, 1, 2]
    assert logits.dtype == np.float32
