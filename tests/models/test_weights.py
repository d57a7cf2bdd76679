"""Finding models and weights: names that are wrong, files that do not fit, and pickles that run code (case C24)."""

import json
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from raydistill.errors import ConfigError
from raydistill.models.weights import (
    check_timm_name,
    load_timm_weights,
    model_kind,
    read_state_dict,
    resolve_hf_folder,
)

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "test_resnet"


class Malicious:
    """Its pickle makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(ConfigError) as refused:
        call(*arguments, **options)
    (message,) = refused.value.args
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=4).state_dict()


@pytest.mark.parametrize("how", ["safetensors", "torch", "old torch", "under state_dict", "of DataParallel"])
def test_state_dicts_are_read_in_every_usual_form(state, tmp_path, how):
    path = tmp_path / ("weights.safetensors" if how == "safetensors" else "weights.pth")
    if how == "safetensors":
        save_file(state, path)
    else:
        content = {"module." + name: value for name, value in state.items()} if how == "of DataParallel" else state
        content = {"state_dict": OrderedDict(content), "epoch": 3} if how == "under state_dict" else content
        torch.save(content, path, _use_new_zipfile_serialization=how != "old torch")
    found = read_state_dict(str(path), "teacher.weights")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("where", ["alone", "among tensors"])
@pytest.mark.parametrize("written_by", ["torch", "old torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused_unopened(state, tmp_path, suffix, where, written_by):
    path, marker = tmp_path / f"weights{suffix}", tmp_path / "marker"
    content = Malicious(marker) if where == "alone" else {**state, "more": Malicious(marker)}
    if written_by == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=written_by == "torch")
    assert str(path) in refusal(read_state_dict, str(path), "teacher.weights")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.exists()  # so it would have run


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(2)], 5, {}, {"a": 1.0}, {"model": {"a": torch.zeros(2)}}, {"state_dict": {}}, torch.zeros(3)],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    assert "teacher.weights" in refusal(read_state_dict, str(tmp_path / "weights.pth"), "teacher.weights")


def test_a_missing_file_is_named(tmp_path):
    for name in ("weights.safetensors", "weights.pth"):
        assert name in refusal(read_state_dict, str(tmp_path / name), "student.weights")
    assert "student.weights" in refusal(read_state_dict, str(tmp_path), "student.weights")


@given(data=st.data(), kind=st.sampled_from(["safetensors", "torch", "old torch"]))
def test_a_damaged_file_is_a_config_error_or_a_state_dict(state, tmp_path_factory, data, kind):
    path = tmp_path_factory.mktemp("damaged") / ("w.safetensors" if kind == "safetensors" else "w.pth")
    small = {"a.weight": state["conv1.weight" if "conv1.weight" in state else next(iter(state))], "b": torch.arange(9)}
    if kind == "safetensors":
        save_file(small, path)
    else:
        torch.save(small, path, _use_new_zipfile_serialization=kind == "torch")
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for _ in range(data.draw(st.integers(0, 4))):
        if whole:
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(whole))
    try:
        found = read_state_dict(str(path), "teacher.weights")
    except ConfigError:
        return
    assert all(isinstance(value, torch.Tensor) for value in found.values())


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x80\x04.", b"\x00" * 100, b"PK\x03\x04" + b"x" * 50])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_what_is_no_weights_file_is_refused(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    assert f"teacher.weights={tmp_path / name}" in refusal(read_state_dict, str(tmp_path / name), "teacher.weights")


def test_the_classifier_has_as_many_outputs_as_the_file(state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    network = load_timm_weights(NAME, str(tmp_path / "w.safetensors"), None, "teacher")
    found = network.state_dict()
    assert network.num_classes == 4
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_file_without_a_classifier_gives_a_network_without_one(tmp_path):
    bare = timm.create_model(NAME, num_classes=0).state_dict()
    save_file(bare, tmp_path / "w.safetensors")
    network = load_timm_weights(NAME, str(tmp_path / "w.safetensors"), None, "teacher")
    assert not isinstance(network.get_classifier(), torch.nn.Linear)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in bare.items())


@pytest.mark.parametrize("num_classes", [1, 4, 7])
def test_a_new_classifier_takes_the_place_of_the_files(state, tmp_path, num_classes):
    save_file(state, tmp_path / "w.safetensors")
    network = load_timm_weights(NAME, str(tmp_path / "w.safetensors"), None, "student", num_classes=num_classes)
    found = network.state_dict()
    assert found["fc.weight"].shape[0] == found["fc.bias"].shape[0] == num_classes
    assert num_classes != 4 or not torch.equal(found["fc.weight"], state["fc.weight"])
    backbone = [name for name in found if not name.startswith("fc.")]
    assert len(backbone) == len(state) - 2
    assert all(torch.equal(found[name], state[name]) for name in backbone)


def test_a_model_with_two_classifiers_is_loaded_whole(tmp_path):
    name = "deit_tiny_distilled_patch16_224"
    saved = timm.create_model(name, num_classes=3, img_size=32).state_dict()
    save_file(saved, tmp_path / "w.safetensors")
    found = load_timm_weights(name, str(tmp_path / "w.safetensors"), None, "teacher", img_size=32).state_dict()
    assert found["head_dist.weight"].shape[0] == 3
    assert all(torch.equal(found[key], value) for key, value in saved.items())


def test_keys_that_do_not_fit_are_listed(state, tmp_path):
    path = str(tmp_path / "w.safetensors")
    changed = dict(state)
    lost = next(name for name in changed if name.endswith("running_mean"))
    del changed[lost]
    changed["surplus.weight"] = torch.zeros(3)
    bent = next(name for name in changed if changed[name].ndim == 4)
    changed[bent] = torch.zeros(1, 2, 3, 4)
    save_file(changed, path)
    for options in ({}, {"num_classes": 2}):
        message = refusal(load_timm_weights, NAME, path, None, "teacher", **options)
        for key in (lost, "surplus.weight", bent):
            assert key in message
        assert len(re.findall(r"\b1 (missing|unexpected|of another shape)", message)) == 3


def test_weights_of_another_model_are_refused(state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    assert "test_vit" in refusal(load_timm_weights, "test_vit", str(tmp_path / "w.safetensors"), None, "teacher")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("timm:resnet_18", "timm:resnet18"),
        ("timm:vit_base_patch16_22", "timm:vit_base_patch16_224"),
        ("timm:mobilenetv3_smal_100", "timm:mobilenetv3_small_100"),
    ],
)
def test_an_unknown_name_comes_with_near_ones(name, near):
    message = refusal(check_timm_name, name, "student.model")
    assert near in message
    assert "student.model" in message


@pytest.mark.parametrize("name", ["timm:zzzzzz", "timm:", "resnet18", "hf:resnet18", "timm:resnet18.no_such_tag"])
def test_names_that_timm_does_not_have_are_refused(name):
    assert "student.model" in refusal(check_timm_name, name, "student.model")


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "mobilenetv3_small_100"])
def test_names_that_timm_has_are_taken(name):
    assert check_timm_name(f"timm:{name}", "student.model") == name


def test_kinds_of_teachers(tmp_path):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "distill").mkdir()
    for name in ("student.json", "config.json"):  # the second is there for students from transformers
        (tmp_path / "distill" / name).write_text("{}")
        for folder in (str(tmp_path / "distill"), f"file://{tmp_path / 'distill'}"):
            assert model_kind(folder, "teacher.model") == ("raydistill", folder)
    assert model_kind("timm:resnet18", "teacher.model") == ("timm", "resnet18")
    assert model_kind("hf:owner/name", "teacher.model") == ("transformers", "owner/name")
    assert model_kind(str(tmp_path / "timm"), "teacher.model") == ("timm", f"local-dir:{tmp_path / 'timm'}")
    assert model_kind(str(tmp_path / "hf"), "teacher.model") == ("transformers", str(tmp_path / "hf"))


@pytest.mark.parametrize("model", ["nowhere", "nowhere/at/all", "zoo:resnet18", "timm:resnet19", "example:nothing", ""])
def test_teachers_that_do_not_exist_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model in refusal(model_kind, model, "teacher.model")


def test_folders_that_hold_no_model_are_refused(tmp_path):
    assert "config.json" in refusal(model_kind, str(tmp_path), "teacher.model")
    assert "config.json" in refusal(resolve_hf_folder, str(tmp_path), None, "teacher")
    (tmp_path / "config.json").write_text("{broken")
    assert "config.json" in refusal(model_kind, str(tmp_path), "teacher.model")
