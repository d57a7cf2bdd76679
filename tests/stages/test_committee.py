"""A committee: several models whose features, side by side, one head reads."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import timm
from rich.console import Console
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_weights
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from raydistill.config import load_config
from raydistill.data.compact import read_projection
from raydistill.data.targets import read_all_targets, read_joined, split_features
from raydistill.errors import CheckpointError, ConfigError
from raydistill.graph import find_work
from raydistill.models.heads import load_head
from raydistill.preflight import refuse_early
from raydistill.run import run_stages
from raydistill.runtime.progress import Progress

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def second_weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("second") / "second.safetensors"
    save_weights(timm.create_model("test_efficientnet", num_classes=0).state_dict(), path)
    return path


@pytest.fixture
def committee(words, second_weights) -> list[str]:
    alone = load_config(words).teacher
    return [
        *words,
        f"teacher.model=[{alone.model}, timm:test_efficientnet]",
        f"teacher.weights=[{alone.weights}, {second_weights}]",
        f"teacher.size=[{alone.size}, 48]",
    ]


def run(words: list[str], until: str | None = "teach"):
    said = io.StringIO()
    return run_stages(load_config(words), Progress(Console(file=said, width=400)), until), said.getvalue()


def shards(folder: str) -> dict[str, np.ndarray]:
    return {path.name: read_all_targets(str(path))[1] for path in sorted(Path(folder).glob("train-*.safetensors"))}


@pytest.mark.usefixtures("taught")
def test_a_member_taught_before_is_not_taught_again_and_its_features_come_first(
    words, committee, second_weights
) -> None:
    """Its stored features are changed by hand, so that copies of them are known from new ones. A later job of the other
    member alone pays for nothing."""
    alone, _ = run(words)
    for file in Path(alone.directories["teach"]).glob("*.safetensors"):
        stored = load_file(file)
        save_file({**stored, "features": stored["features"] + np.float16(1)}, file)
    first = shards(alone.directories["teach"])
    both, said = run(committee)
    assert re.search(r"teach_1 +done before", said), said
    assert not re.search(r"teach_2 +done before", said)
    other = [*words, "teacher.model=timm:test_efficientnet", f"teacher.weights={second_weights}", "teacher.size=48"]
    second, later = run(other)
    assert re.search(r"teach +done before", later)
    assert second.directories["teach"] == both.directories["teach_2"]
    second_features, together = shards(second.directories["teach"]), shards(both.directories["teach"])
    assert together.keys() == first.keys() == second_features.keys()
    for name, features_KRD in together.items():
        np.testing.assert_array_equal(features_KRD, np.concatenate([first[name], second_features[name]], axis=2))
    again, said = run(committee)
    assert re.search(r"teach +done before", said)
    assert again.directories["teach"] == both.directories["teach"]


@pytest.mark.usefixtures("taught")
def test_its_head_is_that_of_all_features_and_each_gain_is_told_before_it_is_paid(committee) -> None:
    outcome, said = run(committee, "adapt")
    adapted = outcome.adapted
    (train_ND, labels_N), (val_MD, _) = (
        split_features(outcome.samples, adapted.features, split) for split in ("train", "val")
    )
    scaler = StandardScaler().fit(train_ND)
    expected = LogisticRegression(C=1 / adapted.l2, max_iter=2000).fit(scaler.transform(train_ND), labels_N)
    head = load_head(adapted.path)
    likely = np.exp(head.logits(val_MD))
    np.testing.assert_allclose(
        likely / likely.sum(1, keepdims=True), expected.predict_proba(scaler.transform(val_MD)), atol=2e-3
    )
    one, two = adapted.members
    assert one.num_features + two.num_features == train_ND.shape[1]
    assert (two.together, one.together) == (adapted.val_accuracy, one.alone)
    assert f"with {two.model} {two.together:.3f} (alone {two.alone:.3f})" in said
    assert ("leave it out" in said) == (two.together <= one.alone)
    assert re.search(r"test_efficientnet.*, \d+ s of an actor for all views", said)
    assert "teach" in find_work(load_config(committee)).undone


@pytest.mark.usefixtures("taught")
def test_it_trains_every_kind_of_loss_and_is_measured(committee) -> None:
    outcome, _ = run(
        [*committee, "loss.crd_weight=1", "loss.feature_weight=1", "loss.srrl_weight=1", "evaluate.time_teacher=true"],
        "export",
    )
    report = outcome.report
    networks = timm.create_model("test_resnet", num_classes=5), timm.create_model("test_efficientnet", num_classes=0)
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert report.teacher_parameters == sum(sizes)
    assert report.teacher_images_per_second > 0
    assert report.teacher["val"]["accuracy"] == outcome.adapted.val_accuracy
    card = Path(outcome.exported.path, "README.md").read_text()
    assert "timm:test\\_resnet" in card or "timm:test_resnet" in card
    assert "test_efficientnet" in card


@pytest.mark.usefixtures("taught")
def test_compact_targets_of_a_committee_are_its_full_ones_on_fewer_numbers(committee) -> None:
    full, _ = run(committee)
    small, said = run([*committee, "views.store=compact"])
    assert re.search(r"teach_1 +done before", said), "members are stored in full"
    assert re.search(r"teach_2 +done before", said)
    projection = read_projection(small.directories["teach"])
    before, after = shards(full.directories["teach"]), shards(small.directories["teach"])
    for name, features_KRD in before.items():
        expected = projection.project(features_KRD).astype(np.float32)
        np.testing.assert_allclose(after[name].astype(np.float32), expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.usefixtures("taught")
def test_fresh_views_go_through_each_member(committee) -> None:
    outcome, _ = run([*committee, "views.per_image=fresh", "distill.epochs=1"], "distill")
    assert outcome.student.steps > 0


def test_members_of_other_samples_are_refused(tmp_path) -> None:
    for name, number in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        ids = np.full((1, 16), number, np.uint8)
        save_file(
            {"features": np.zeros((1, 1, 2), np.float16), "sample_ids": ids},
            tmp_path / name / "train-00000.safetensors",
        )
    with pytest.raises(CheckpointError, match="its soft targets are of other samples than those of"):
        read_joined([str(tmp_path / name / "train-00000.safetensors") for name in ("a", "b")])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["teacher.head=native"], "teacher.head=native is of one model, and teacher.model names 2"),
        (["teacher.weights=[a, b, c]"], "teacher.weights lists 3 values, and teacher.model names 2"),
        (["teacher.model=[timm:test_efficientnet, timm:test_efficientnet]"], "names timm:test_efficientnet twice"),
        (["teacher.model=[timm:test_efficientnet, 'targets:x']"], "targets:x is a folder of stored answers"),
        (["teacher.model=[]"], "teacher.model"),
    ],
)
def test_what_is_no_committee_is_refused_in_words(words, given, meant) -> None:
    with pytest.raises(ConfigError, match=re.escape(meant)):
        load_config(
            [*words, "teacher.model=[timm:test_efficientnet, timm:test_resnet]", "teacher.weights=null", *given]
        )


def test_a_list_of_one_is_that_teacher(words) -> None:
    alone = load_config(words)
    assert load_config([*words, f"teacher.model=[{alone.teacher.model}]"]) == alone


def test_a_wrong_member_is_named_before_anything_runs(words) -> None:
    with pytest.raises(ConfigError, match="no_such_net"):
        refuse_early(
            load_config([*words, "teacher.model=[timm:test_efficientnet, timm:no_such_net]", "teacher.weights=null"])
        )
