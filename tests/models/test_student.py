"""The student: its features and logits are the timm network's own, at any size, from any start; and its projection."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from raydistill.config import Student as StudentConfig
from raydistill.data.decode import encode
from raydistill.data.sample import SCHEMA, SampleSet, encode_shard, sample_id
from raydistill.errors import ConfigError
from raydistill.models.student import ProjectionHead, build_student, has_batch_norm, split_logits

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


def test_a_random_start_is_decided_by_the_seed():
    first, again, other = built("test_resnet", seed=1), built("test_resnet", seed=1), built("test_resnet", seed=2)
    weights = [student.network.state_dict()["fc.weight"] for student in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_building_leaves_the_network_as_timm_made_it():
    """Looking for the number of features moves no running mean and leaves the network in train mode."""
    student = built("test_resnet", seed=3)
    torch.manual_seed(3)
    fresh = timm.create_model("test_resnet", num_classes=4)
    assert all(torch.equal(value, student.network.state_dict()[name]) for name, value in fresh.state_dict().items())
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


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
    assert "student.weights" in refusal("test_vit", init="pretrained", weights=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224", "mixer_s32_224"])
def test_a_size_that_the_network_cannot_take_is_refused(name):
    assert "student.size" in refusal(name, size=8)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "volo_d1_224", "dla34", "levit_128s"])
def test_networks_that_are_no_single_classifier_on_pooled_features_are_refused(name):
    """Two heads, an auxiliary head, a convolution: training would fail, or learn what the network that ships lacks."""
    assert name in refusal(name)


@pytest.mark.parametrize("model", ["hf:google/vit", "resnet18", "timm:resnet19", "timm:resnet18.no_such_tag", "timm:"])
def test_names_that_are_no_timm_model_are_refused(model):
    with pytest.raises(ConfigError, match=r"student\.model"):
        build_student(StudentConfig(model=model), 3)


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


def test_the_projection_is_two_layers_with_a_relu_between():
    head = ProjectionHead("two_layer", 6, 3)
    first, second = (module for module in head.modules() if isinstance(module, nn.Linear))
    features = torch.randn(5, 6)
    with torch.no_grad():
        hidden = (features @ first.weight.T + first.bias).clamp(min=0)
        raw = hidden @ second.weight.T + second.bias
        torch.testing.assert_close(head(features), raw / raw.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert (first.out_features, second.out_features) == (6, 3)


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


# Logits of a split


@pytest.fixture
def samples(tmp_path: Path) -> tuple[SampleSet, np.ndarray]:
    """Two shards of a val split, and their pictures."""
    pictures = np.random.default_rng(0).integers(0, 256, (7, 48, 48, 3), dtype=np.uint8)
    for shard, numbers in enumerate((range(5), range(5, 7))):
        rows = pa.table(
            {
                "sample_id": [sample_id(bytes([n])) for n in numbers],
                "image": [encode(Image.fromarray(pictures[n])) for n in numbers],
                "label": [None if n == 2 else n % 4 for n in numbers],
                "source": ["real"] * len(numbers),
                "split": ["val"] * len(numbers),
            },
            schema=SCHEMA,
        )
        (tmp_path / f"val-{shard:05d}.parquet").write_bytes(encode_shard(rows))
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
