"""Which generated images are kept: each fault is seen and counted, and asking for more only adds."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from raydistill.cluster.plan import plan_resources
from raydistill.config import Generate, Images, RunConfig, load_config
from raydistill.data.decode import decode, encode
from raydistill.data.near_duplicates import contrast, difference_hash
from raydistill.data.sample import SampleSet, sample_id
from raydistill.data.views import WHOLE_IMAGE, render
from raydistill.generation import features, selection, shards
from raydistill.generation import made as made_module
from raydistill.generation.made import MADE, Key, Made, look_at, working_image
from raydistill.generation.recipes import image_seed
from raydistill.generation.selection import HeldOut, Judge, Opinion, choose
from raydistill.models.heads import LinearHead, encode_head
from raydistill.models.teacher import load_teacher
from tests.small_run import write_shard

CLASSES = ("cat", "dog")
NOTHING: set[str] = set()
PLAN = plan_resources(RunConfig.model_validate({"images": {"path": "x"}}), 2.0, 0.0, 2)


def settings(**changes: object) -> Generate:
    return Generate.model_validate({"pipeline": "owner/name", **changes})


def one(name: str, **changes: object) -> Made:
    """An image that nothing is wrong with, of a random hash."""
    digest = hashlib.sha256(name.encode()).digest()
    plain = {
        "file": "f", "row": 0, "id": digest.hex()[:32], "seed": 1, "prompt": "", "source": "", "reason": "",
        "contrast": 50.0, "hash": digest, "seconds": 1.0,
    }  # fmt: skip
    return Made(**{**plain, **changes})


def made_file(path: Path, images: list[bytes | None]) -> str:
    """A file of images as an actor writes it; a failure where there is no image."""
    rows = [
        {"index": k, "attempt": 0, "seed": k, "prompt": "", "source": "", "image": image, "seconds": 1.0,
         "id": sample_id(image) if image else "", "reason": "" if image else "not finite",
         "contrast": 50.0, "hash": hashlib.sha256(image or b"").digest()}
        for k, image in enumerate(images)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=MADE), path)
    return str(path)


def all_made(count: int, attempts: int = 3, **faults: Made) -> dict[Key, Made]:
    """Everything that could be asked for; `cat_2_0` replaces attempt 0 at image 2 of the cats."""
    return {
        (c, i, a): faults.get(f"{c}_{i}_{a}") or one(f"{c}/{i}/{a}")
        for c, i, a in itertools.product(CLASSES, range(count), range(attempts))
    }


def test_good_images_are_kept_at_the_first_attempt():
    chosen = choose(settings(), {"cat": 3, "dog": 2}, all_made(3), NOTHING, None)
    assert list(chosen.kept) == [("cat", 0, 0), ("dog", 0, 0), ("cat", 1, 0), ("dog", 1, 0), ("cat", 2, 0)]
    assert set(chosen.kept.values()) == {1.0}
    assert (chosen.needed, chosen.missing, sum(chosen.rejected.values())) == ([], {}, 0)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"reason": "safety checker", "id": "", "hash": b"", "contrast": 0.0}, "safety checker"),
        ({"reason": "not finite", "id": "", "hash": b"", "contrast": 0.0}, "not finite"),
        ({"contrast": 2.9}, "near-constant"),
        ({"id": one("dog/0/0").id}, "duplicate"),  # of another class's image, which came first
        ({"hash": one("cat/0/0").hash}, "near duplicate"),
        ({"id": "0" * 32}, "duplicate of a val or test image"),
    ],
)
def test_a_fault_is_named_and_the_next_attempt_is_taken(fault, reason):
    made = all_made(2, cat_1_0=one("cat/1/0", **fault))
    chosen = choose(settings(), {"cat": 2, "dog": 1}, made, {"0" * 32}, None)
    assert chosen.verdicts["cat", 1, 0] == reason
    assert dict(chosen.rejected) == {reason: 1}
    assert ("cat", 1, 1) in chosen.kept
    assert not chosen.missing


def test_after_the_last_attempt_the_image_is_missing():
    bad = {f"cat_1_{a}": one(f"cat/1/{a}", contrast=0.0) for a in range(3)}
    chosen = choose(settings(attempts=3), {"cat": 3, "dog": 0}, all_made(3, **bad), NOTHING, None)
    assert chosen.missing == {"cat": 1}
    assert dict(chosen.rejected) == {"near-constant": 3}
    assert [key[1] for key in chosen.kept] == [0, 2]


def test_what_is_not_made_yet_is_asked_for_one_attempt_at_a_time():
    made = {("cat", 0, 0): one("x", contrast=0.0)}
    chosen = choose(settings(), {"cat": 2, "dog": 1}, made, NOTHING, None)
    assert chosen.needed == [("cat", 0, 1), ("dog", 0, 0), ("cat", 1, 0)]


@pytest.mark.parametrize(("bits", "kept"), [(4, False), (5, True)])
def test_near_duplicates_are_told_by_their_bits(bits, kept):
    near = np.unpackbits(np.frombuffer(one("cat/0/0").hash, np.uint8))
    near[:bits] ^= 1
    made = all_made(2, cat_1_0=one("cat/1/0", hash=np.packbits(near).tobytes()))
    chosen = choose(settings(), {"cat": 2, "dog": 0}, made, NOTHING, None)
    assert (("cat", 1, 0) in chosen.kept) is kept
    switched_off = choose(settings(filter={"duplicate_distance": None}), {"cat": 2, "dog": 0}, made, NOTHING, None)
    assert ("cat", 1, 0) in switched_off.kept


@given(
    few=st.integers(1, 8), more=st.integers(0, 6), bad=st.sets(st.tuples(st.integers(0, 13), st.integers(0, 2))),
    twins=st.lists(st.tuples(st.integers(0, 13), st.integers(0, 13)), max_size=4),
)  # fmt: skip
def test_asking_for_more_only_adds(few, more, bad, twins):
    faults = {f"cat_{i}_{a}": one(f"cat/{i}/{a}", contrast=0.0) for i, a in bad}
    faults |= {f"cat_{i}_0": one(f"cat/{j}/0") for i, j in twins}
    made = all_made(14, **faults)
    first = choose(settings(), {"cat": few, "dog": few}, made, NOTHING, None)
    second = choose(settings(), {"cat": few + more, "dog": few + more}, made, NOTHING, None)
    assert list(second.kept)[: len(first.kept)] == list(first.kept)
    for key, verdict in first.verdicts.items():
        assert second.verdicts[key] == verdict
    ids = [made[key].id for key in second.kept]
    assert len(set(ids)) == len(ids)
    for name in CLASSES:
        count = sum(key[0] == name for key in second.kept)
        assert count + second.missing.get(name, 0) == few + more


def test_the_teacher_has_its_say():
    made = all_made(1)
    of_class = {"cat": Opinion(0, 0.6), "dog": Opinion(0, 0.3)}
    likely = {(key[0], m.id): of_class[key[0]] for key, m in made.items()}
    wanted = {"cat": 1, "dog": 1}

    def ask(**filters: object):
        return choose(settings(filter=filters, attempts=1), wanted, made, NOTHING, likely)

    assert ask(agreement=True).missing == {"dog": 1}
    assert dict(ask(agreement=True).rejected) == {"the teacher names another class": 1}
    assert ask(confidence=0.35).missing == {"dog": 1}
    assert ask(confidence=0.65).missing == {"cat": 1, "dog": 1}
    assert ask(confidence=0.65, class_confidence={"cat": 0.5, "dog": 0.2}).missing == {}
    assert ask(weigh=True).kept == pytest.approx({("cat", 0, 0): 0.6, ("dog", 0, 0): 0.3})


def random_stock(seed: int, count: int, folder: str) -> dict[Key, Made]:
    """Attempts of which every fourth is near an earlier one, of the own class or the other."""
    rng, firsts, made = np.random.default_rng(seed), list[np.ndarray](), dict[Key, Made]()
    for number, key in enumerate(itertools.product(CLASSES, range(count), range(3))):
        bits = rng.integers(0, 2, 256, np.uint8)
        if firsts and rng.random() < 0.25:
            bits = firsts[rng.integers(len(firsts))].copy()
            bits[rng.choice(256, rng.choice([0, 3, 5]), replace=False)] ^= 1
        if key[2] == 0:
            firsts.append(bits)
        made[key] = one(f"{number}", hash=np.packbits(bits).tobytes(), file=folder)
    return made


@pytest.mark.parametrize("distance", [0, 1, 4, 30, 120])
def test_near_duplicates_are_those_of_a_comparison_with_all(distance):
    made, wanted = random_stock(distance, 60, "f"), {"cat": 60, "dog": 55}
    chosen = choose(settings(filter={"duplicate_distance": distance}), wanted, made, NOTHING, None)
    kept: dict[str, list[bytes]] = {"cat": [], "dog": []}
    for key, verdict in chosen.verdicts.items():
        own = made[key].hash
        nearest = min(
            (sum((a ^ b).bit_count() for a, b in zip(own, h, strict=True)) for h in kept[key[0]]), default=999
        )
        assert verdict == ("near duplicate" if nearest <= distance else "kept")
        if verdict == "kept":
            kept[key[0]].append(own)
    assert sum(chosen.rejected.values()) > 0


@pytest.mark.cluster
def test_tasks_see_in_images_what_this_process_sees(ray_session, tmp_path, monkeypatch):
    rng, images = np.random.default_rng(0), Images(path="x", size=16, shard_size=7)
    pictures = [encode(Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))) for _ in range(40)]
    files = {
        made_file(tmp_path / f"{k:02d}.parquet", [None, *pictures[k : k + 4]]): CLASSES[k % 2] for k in range(0, 40, 4)
    }
    here = list(look_at(files, images, PLAN))
    held = pictures[4:10]
    working = [working_image(picture, images).tobytes() for picture in held]
    for shard in range(3):
        write_shard(tmp_path, f"test-{shard:05d}", working[2 * shard :][:2], [0, 0], of=held[2 * shard :][:2])
    samples = SampleSet(str(tmp_path), CLASSES, 16, {"test": (2, 2, 2)}, {}, 0, {}, {})
    order = [(one, k % 2) for k, (_, one) in enumerate(here) if one.id]
    sizes = {}
    for where in ("here", "there"):
        if where == "there":
            monkeypatch.setattr(made_module, "FILES_OF_A_TASK", 3)
            monkeypatch.setattr(shards, "FILES_OF_A_TASK", 3)
            monkeypatch.setattr(shards, "SHARD_BYTES", 0)
            monkeypatch.setattr(selection, "_SHARDS_OF_A_TASK", 1)
            assert list(look_at(files, images, PLAN)) == here
        assert HeldOut(samples, 4, PLAN).shown_by(dict(enumerate(one for _, one in here))) == {
            sample_id(picture) for picture in held
        }
        (tmp_path / where).mkdir()
        sizes[where] = shards.write_shards(str(tmp_path / where), order, images, PLAN)
    assert sizes["here"] == sizes["there"] == [7] * 5 + [5]
    written = sorted((tmp_path / "here").iterdir())
    assert [path.read_bytes() for path in written] == [
        (tmp_path / "there" / path.name).read_bytes() for path in written
    ]
    rows = [row for path in written for row in pq.read_table(path).to_pylist()]
    assert [(row["sample_id"], row["label"]) for row in rows] == [(one.id, label) for one, label in order]
    assert {row["sample_id"]: row["image"] for row in rows} == {
        sample_id(picture): working_image(picture, images).tobytes() for picture in pictures
    }


@pytest.mark.parametrize("size", [12, 16, 28, 32, 45])
def test_a_copy_of_a_held_out_image_is_known_at_whatever_size_is_trained_on(tmp_path, photo, size):
    """The pipeline makes 16 pixels: of grey noise, whose hash another size changes, and of a photograph."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(photo).resize((16, 16))
    pictures = [small, *(Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).convert("RGB") for _ in range(20))]
    files, images = [encode(picture) for picture in pictures], Images(path="x", size=size)
    held = files[:11]
    working = [working_image(file, images).tobytes() for file in held]
    write_shard(tmp_path, "test-00000", working, [0] * len(held), of=held)
    samples = SampleSet(str(tmp_path), CLASSES, size, {"test": (len(held),)}, {}, 0, {}, {})
    made = dict(look_at({made_file(tmp_path / "made.parquet", [None, *files]): "cat"}, images, PLAN))
    assert [made["cat", k, 0].row for k in range(len(files) + 1)] == list(range(len(files) + 1))
    assert HeldOut(samples, 4, PLAN).shown_by(made) == {sample_id(file) for file in held}


def test_the_judge_sees_every_image_once_and_files_without_any_not_at_all(words, tmp_path, photo):
    """Against the teacher itself, shown the working image whole."""
    config = load_config(words)
    backbone = load_teacher(config.teacher)[0]
    rng, width = np.random.default_rng(0), 0
    rows, image = [], Image.fromarray(photo)
    with torch.inference_mode():
        working = torch.from_numpy(np.asarray(decode(encode(image), 32, "crop", 10**6))[None].copy())
        features_1D = backbone(render(working, torch.from_numpy(WHOLE_IMAGE)[None], backbone.preprocessing)).half()
    width = features_1D.shape[1]
    head = LinearHead(rng.normal(0, 1, (3, width)).astype(np.float32), np.zeros(3, np.float32))
    (tmp_path / "head.safetensors").write_bytes(encode_head(head))
    for name, picture in (("whole", image), ("flagged", None)):
        png = None if picture is None else encode(picture)
        made_file(tmp_path / f"{name}.parquet", [png])
        rows.append(one(name, file=f"{tmp_path}/{name}.parquet", id=sample_id(png) if png else ""))
    made = {("cat", 0, 0): rows[0], ("cat", 0, 1): rows[1]}
    threads = torch.get_num_threads()
    likely = [Judge(config, str(tmp_path), PLAN).of(made, names) for names in (("cat", "dog"), ("dog", "cat"))]
    assert torch.get_num_threads() == threads
    assert [set(of_names) for of_names in likely] == [{("cat", rows[0].id)}] * 2
    expected = torch.from_numpy(head.logits(features_1D.float().numpy())).softmax(1)[0]
    for number, of_names in enumerate(likely):
        first, probability = of_names["cat", rows[0].id]
        assert first == int(expected.argmax())
        assert probability == pytest.approx(float(expected[number]), abs=2e-3)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}
    assert Judge(config, str(tmp_path), PLAN).of(made, ("cat", "dog")) == likely[0]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")} == before


@pytest.mark.cluster
@pytest.mark.slow
def test_a_pool_of_teachers_has_the_opinions_of_one(words, ray_session, tmp_path, monkeypatch):
    config, rng = load_config(words), np.random.default_rng(0)
    width = load_teacher(config.teacher)[0](torch.zeros(1, 3, 32, 32)).shape[1]
    head = LinearHead(rng.normal(0, 1, (5, width)).astype(np.float32), np.zeros(5, np.float32))
    (tmp_path / "head.safetensors").write_bytes(encode_head(head))
    files, names = {}, [f"class {number}" for number in range(5)]
    for number, name in enumerate(names):
        pictures = [encode(Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))) for _ in range(3)]
        files[made_file(tmp_path / f"{number}.parquet", [*pictures, None])] = name
    made = dict(look_at(files, None, PLAN))
    here = dict(Judge(config, str(tmp_path), PLAN).of(made, names))
    for path in tmp_path.glob("[0-9]*.safetensors"):
        path.unlink()
    for module in (features, selection):
        monkeypatch.setattr(module, "FILES_OF_A_TASK", 1)
    there = Judge(config, str(tmp_path), PLAN).of(made, names)
    assert len(here) == 15
    assert there.keys() == here.keys()
    for key, (first, probability) in here.items():
        assert there[key] == (first, pytest.approx(probability, abs=1e-6))


def test_a_dark_but_textured_image_has_contrast_and_a_grey_one_has_not(photo):
    assert contrast(Image.fromarray((photo * 0.2).astype(np.uint8))) > 3
    assert contrast(Image.new("RGB", (64, 64), (90, 90, 90))) == 0


def test_the_hash_knows_a_picture_at_another_size_and_tells_pictures_apart(photo):
    def distance(a: Image.Image, b: Image.Image) -> int:
        first, second = (np.unpackbits(np.frombuffer(difference_hash(i), np.uint8)) for i in (a, b))
        return int((first != second).sum())

    picture = Image.fromarray(photo)
    assert distance(picture, picture.resize((64, 64), Image.Resampling.BICUBIC)) <= 12
    assert distance(picture, Image.fromarray(photo[:, ::-1])) > 60
    assert distance(picture, Image.fromarray(photo.transpose(1, 0, 2))) > 60


@given(st.integers(0, 2**32 - 1), st.text(max_size=9), st.integers(0, 99), st.integers(0, 9))
def test_seeds_differ_in_every_part_of_their_key(seed, name, index, attempt):
    others = {(seed, name, index, attempt), (seed + 1, name, index, attempt), (seed, f"{name}x", index, attempt),
              (seed, name, index + 1, attempt), (seed, name, index, attempt + 1)}  # fmt: skip
    seeds = {image_seed(*key) for key in others}
    assert len(seeds) == 5
    assert all(0 <= number < 2**63 for number in seeds)
