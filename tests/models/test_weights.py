"""Finding models and weights: names that are wrong, files that do not fit, and pickles that run code (case C24)."""

import argparse
import json
import pickle
import re
import socket
import time
from collections import OrderedDict
from itertools import product
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import raydistill
from raydistill.errors import ConfigError
from raydistill.models import weights
from raydistill.models.from_transformers import load_or_refuse
from raydistill.models.state_dicts import read_weights, sizes_of
from raydistill.models.weights import (
    check_timm_name,
    load_timm_weights,
    model_kind,
    resolve_hf_folder,
)
from tests.pickles import Malicious

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "test_resnet"


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


def loaded(path: Path, **options) -> dict[str, torch.Tensor]:
    return load_timm_weights(NAME, str(path), None, "teacher", **options).state_dict()


def assert_equal(found: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return OrderedDict((prefix + name, value) for name, value in state.items())


# How a file wraps the weights, from a plain state dict.
WRAPPED = {
    "nothing": lambda s: s,
    "DataParallel": lambda s: under("module.", s),
    "torch.compile": lambda s: under("_orig_mod.", s),
    "compile of DataParallel": lambda s: under("_orig_mod.module.", s),
    "DataParallel of compile": lambda s: under("module._orig_mod.", s),
    "compile of a part": lambda s: {re.sub(r"^layer1\.", "layer1._orig_mod.", k): v for k, v in s.items()},
    "DataParallel of a part": lambda s: {re.sub(r"^layer1\.", "net.layer1.module.", under("net.", {k: v}).popitem()[0])
                                         if k.startswith("layer1.") else "net." + k: v for k, v in s.items()},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s},
    "model_ema": lambda s: {"model_ema": under("module.", s)},
    "state_dict_ema": lambda s: {"state_dict_ema": s},
    "two containers": lambda s: {"checkpoint": {"weights": {"net": s}}},
    "Lightning": lambda s: {"state_dict": under("model.", s) | {"criterion.weight": torch.ones(3)}},
    "DINO": lambda s: {"student": under("module.backbone.", s), "args": argparse.Namespace(lr=0.1)},
    "mmpretrain": lambda s: {"meta": {"time": "now"}, "state_dict": under("backbone.", s)},
    "SWA": lambda s: under("module.", s) | {"n_averaged": torch.tensor(7)},
    "timm's train.py": lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1), "metric": np.float64(0.5),
                                  "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1}]}},
    "no counts": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}  # fmt: skip


HOLDS_MORE = {how for how, wrap in WRAPPED.items() if any(not isinstance(x, torch.Tensor) for x in wrap({}).values())}


@pytest.mark.parametrize(
    ("how", "file"),
    [*product(WRAPPED, ["w.pth", "old.pth.tar"]), *product(sorted(WRAPPED.keys() - HOLDS_MORE), ["w.safetensors"])],
)
def test_weights_load_however_tools_wrap_them(state, tmp_path, how, file):
    content = WRAPPED[how](dict(state))
    expected = {
        name: torch.zeros_like(x) if how == "no counts" and "num_batches" in name else x for name, x in state.items()
    }
    if file == "w.safetensors":
        save_file(content, tmp_path / file)
    else:
        torch.save(content, tmp_path / file, _use_new_zipfile_serialization=file == "w.pth")
    assert_equal(loaded(tmp_path / file), expected)
    found = loaded(tmp_path / file, num_classes=2)
    assert all(torch.equal(found[name], x) for name, x in expected.items() if not name.startswith("fc."))
    assert found["fc.weight"].shape[0] == 2


def test_safetensors_under_another_ending_load(state, tmp_path):
    save_file(state, tmp_path / "pytorch_model.bin")
    assert_equal(loaded(tmp_path / "pytorch_model.bin"), state)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("named", ["index", "a shard", "folder"])
def test_shards_are_read_together(state, tmp_path, form, named):
    stem = "model" if form == "safetensors" else "pytorch_model"
    halves = {f"{stem}-0000{k + 1}-of-00002.{form}": dict(list(state.items())[k::2]) for k in range(2)}
    for name, half in halves.items():
        (save_file if form == "safetensors" else torch.save)(half, tmp_path / name)
    index = tmp_path / f"{stem}.{form}.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, half in halves.items() for key in half}}))
    assert_equal(loaded({"index": index, "a shard": tmp_path / next(iter(halves)), "folder": tmp_path}[named]), state)
    index.write_text(json.dumps({"weight_map": {"a": f"../{tmp_path.name}/{next(iter(halves))}"}}))
    assert "outside its folder" in refusal(loaded, index)
    index.write_text(json.dumps({"weight_map": {"a": f"{stem}-00003-of-00003.{form}"}}))
    assert f"{stem}-00003-of-00003.{form}" in refusal(loaded, index)
    index.write_text("[]")
    assert "not an index" in refusal(loaded, index)


def test_of_several_that_fit_the_average_is_taken_and_said(state, tmp_path, caplog):
    later = {name: value + 1 for name, value in state.items()}
    wider = {**state, "layer9.weight": torch.ones(2)}  # of another model, whose names hold all of this one's
    for content, name in (
        ({"state_dict": state, "state_dict_ema": later}, "state_dict_ema"),
        ({"model_ema": later, "model": state}, "model_ema"),
        ({"state_dict": under("online_model.", state) | under("ema_model.", later)}, "ema_model"),
        ({"teacher": wider, "student": later}, None),
        ({"cinema": later, "other": state}, "cinema"),  # which has no ema in it: the first
    ):
        caplog.clear()
        torch.save(content, tmp_path / "w.pth")
        assert_equal(loaded(tmp_path / "w.pth"), later)
        lines = [r.getMessage() for r in caplog.records if str(tmp_path) in r.getMessage()]
        assert len(lines) == (name is not None)
        if lines:
            assert name in lines[0]
            assert ("average" in lines[0]) == ("ema" in re.split("[_./']", lines[0].partition(" fits")[0]))


def test_what_stands_beside_the_weights_is_said(state, tmp_path, caplog):
    save_file(under("model.", state) | {"criterion.weight": torch.ones(3)}, tmp_path / "w.safetensors")
    loaded(tmp_path / "w.safetensors")
    assert any("criterion.weight" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("end", ["conv1.weight", "running_var"])
def test_weights_that_are_not_finite_are_refused_by_name(state, tmp_path, value, end):
    key = next(name for name in state if name.endswith(end))
    bent = {**state, key: state[key].clone()}
    bent[key].view(-1)[0] = value
    save_file(bent, tmp_path / "w.safetensors")
    message = refusal(loaded, tmp_path / "w.safetensors")
    assert "NaN or infinite" in message
    assert key in message


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
    message = refusal(read_weights, str(path), "teacher.weights")
    assert str(path) in message
    assert "could run code" in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.exists()  # so it would have run


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(2)], 5, {}, {"a": 1.0}, {"state_dict": {}}, {"model": {"a": {"b": 1}}}, torch.zeros(3)],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    assert "teacher.weights" in refusal(read_weights, str(tmp_path / "weights.pth"), "teacher.weights")


def test_a_missing_file_is_named(tmp_path):
    for name in ("weights.safetensors", "weights.pth"):
        assert name in refusal(read_weights, str(tmp_path / name), "student.weights")
    assert "student.weights" in refusal(read_weights, str(tmp_path), "student.weights")


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
        found = read_weights(str(path), "teacher.weights")
    except ConfigError:
        return
    assert any(isinstance(value, torch.Tensor) for value in found.values())


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x80\x04.", b"\x00" * 100, b"PK\x03\x04" + b"x" * 50])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_what_is_no_weights_file_is_refused(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    assert f"teacher.weights={tmp_path / name}" in refusal(read_weights, str(tmp_path / name), "teacher.weights")


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


@pytest.mark.parametrize("behaves", ["refuses", "is silent"])
def test_a_hub_that_does_not_answer_is_not_waited_for(behaves, monkeypatch, caplog, tmp_path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if behaves == "is silent":
            server.listen()  # and never answers
        place = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", place)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(weights, "_HUB_SECONDS", 0.5)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        weights.ask_hub.cache_clear()
        began = time.monotonic()
        for load in (
            lambda: weights.resolve_hf_folder("somebody/something", None, "teacher"),
            lambda: weights.load_timm_weights("test_resnet.r160_in1k", None, None, "student"),
            lambda: raydistill.load("somebody/something"),
        ):
            with pytest.raises(ConfigError) as said:
                load()
            assert len(str(said.value).splitlines()) == 1
            assert "onnection" not in str(said.value)  # as the hub's library says
        assert "no readable repository" in str(said.value)  # and not that it holds something else
        assert time.monotonic() - began < 20  # its library tries again for a minute
    weights.ask_hub.cache_clear()
    (warning,) = [record.getMessage() for record in caplog.records if "does not answer" in record.getMessage()]
    assert warning.startswith(f"{place} does not answer (")
    assert "a local folder needs no hub" in warning


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TypeError("ResNet.__init__() got an unexpected keyword argument 'x'"), "config.json has the key 'x', which"),
        (TypeError("'<' not supported between instances of 'str' and 'int'"), "a value that its model does not take"),
        (KeyError("resnet"), "a value that its model does not take"),
    ],
)
def test_what_a_library_s_code_says_of_a_config_is_said_in_plain_words(tmp_path, error, said):
    def load(folder, **_):
        raise error

    with pytest.raises(ConfigError, match=said) as refused:
        load_or_refuse("the student", load, str(tmp_path))
    assert "__init__" not in str(refused.value)


def test_a_header_of_very_many_tensors_is_refused_before_it_is_read(tmp_path):
    header = json.dumps({f"t{k}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(90_000)})
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(ConfigError, match=r"a header of .* bytes"):
        sizes_of(tmp_path)
