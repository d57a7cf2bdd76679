"""From class names to prompts: literal whatever the names hold, never two classes with one, drawn as weighed."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.config import Generate
from raydistill.data.prompts import PRESETS, class_prompts, words_of
from raydistill.errors import ConfigError


def settings(**changes: object) -> Generate:
    return Generate.model_validate({"pipeline": "owner/name", **changes})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dining_room", "dining room"), ("T-shirt", "T shirt"),
        ("001.Black_footed_Albatross", "Black footed Albatross"), ("017_cardinal", "cardinal"), ("7up can", "7up can"),
        ("3 trees", "3 trees"), ("17", "17"), ("17.Cardinal", "Cardinal"), ("3.5mm_jack", "3.5mm jack"),
        ("  cat ", "cat"), ("鳥", "鳥"), ("great white shark, white shark", "great white shark"),
        ("great_white_shark,_white_shark", "great white shark"), ("car | automobile", "car"), (", cat", "cat"),
        ("1,000 dollar bill", "1,000 dollar bill"), ("bowl (red, big)", "bowl (red, big)"),
        ("goldenRetriever", "golden Retriever"), ("iPhone", "iPhone"), ("McDonald", "McDonald"),
        ("n02085620-German_short-haired_pointer", "German short haired pointer"), ("cafe\u0301", "caf\u00e9"),
    ],
)  # fmt: skip
def test_a_folders_name_becomes_words(name, words):
    assert words_of(name) == words


@given(name=st.text(min_size=1).filter(lambda name: words_of(name)))
def test_whatever_a_name_holds_is_literal(name):
    prompts = class_prompts(settings(templates=['a {x} 100% "{class}" {{}} \\1']), [name])[name]
    assert prompts.sentences == (f'a {{x}} 100% "{words_of(name)}" {{{{}}}} \\1',)


def test_a_name_with_a_placeholder_in_it_is_not_filled_in_again():
    assert class_prompts(settings(), ["{class} {description}"])["{class} {description}"].sentences == (
        "a picture of a {class} {description}",
    )


SAME = [
    ("dining_room", "dining-room"), ("Cat", "cat"), ("1.cat", "cat"), ("caf\u00e9", "cafe\u0301"),
    ("T-shirt", "TShirt"), ("goldenRetriever", "golden_retriever"), ("rock'n'roll", "rock n roll"), ("cat!", "(cat)"),
    ("stra\u00dfe", "STRASSE"), ("cat, felis", "cat, tomcat"), ("hip\u2011hop", "Hip Hop"), ("\ufb01sh", "fish"),
    ("bl\u00adue", "blue"),
]  # fmt: skip


@pytest.mark.parametrize("pair", SAME)
def test_two_classes_with_one_prompt_are_refused(pair):
    with pytest.raises(ConfigError, match="share the prompt") as error:
        class_prompts(settings(), pair)
    assert all(repr(name) in str(error.value) for name in pair)


@pytest.mark.parametrize(
    "pair", [("C++", "C#"), ("3.5mm jack", "35mm jack"), ("r\u00e9sum\u00e9", "resume"), ("1-1", "11")]
)
def test_what_tells_two_classes_apart_stays(pair):
    assert len(class_prompts(settings(), pair)) == 2


def test_numbers_that_count_the_folders_are_left_out():
    def read(*names: str) -> list[str]:
        return [prompts.sentences[0] for prompts in class_prompts(settings(templates=["{class}"]), names).values()]

    assert read("1_cat", "2_dog", "3_owl") == ["cat", "dog", "owl"]
    assert read("1_tree", "2_tree") == ["1 tree", "2 tree"]
    assert read("2_door car", "4_wheeler") == ["2 door car", "4 wheeler"]


# Written down from how they are said, not from what the code answers.
AN = (
    "apple", "hour", "heir", "honest man", "MRI", "FBI agent", "X-ray", "F-150", "SUV", "8-ball", "11", "18 wheeler",
    "80s car", "umbrella", "urn", "usher", "\u00e9clair", "\u00c5ngstr\u00f6m", "ytterbium", "onion",
    "unidentified object", "HDMI cable",
)  # fmt: skip
A = (
    "cat", "unicorn", "university", "European robin", "ewe", "one-way street", "UFO", "USB stick", "U-turn", "ukulele",
    "yacht", "house", "hotel", "BMW", "NASA rocket", "7up can", "180 cm board", "xylophone", "rhino", "mnemonic",
    "llama", "fjord", "HAT",
)  # fmt: skip


@pytest.mark.parametrize("name", [*AN, *A])
def test_the_article_follows_the_sound(name):
    found = class_prompts(settings(templates=["a picture of a {class}", "An {class}, a bee"]), [name])[name]
    n, words = "n" * (name in AN), words_of(name)
    assert found.sentences == (f"a picture of a{n} {words}", f"A{n} {words}, a bee")


def test_of_synonyms_the_first_is_read_and_said(tmp_path, caplog):
    names = {"n01": "tench, Tinca tinca", "n02": {"words": "cat, a tabby one"}}
    (tmp_path / "names.json").write_text(json.dumps(names))
    found = class_prompts(settings(names=str(tmp_path / "names.json")), ["n01", "n02"])
    assert found["n01"].sentences == ("a picture of a tench",)
    assert found["n02"].sentences == ("a picture of a cat, a tabby one",)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "'tench, Tinca tinca' as 'tench'" in line


def test_templates_are_drawn_by_weight_and_by_the_key_alone():
    prompts = class_prompts(settings(templates={"a {class}": 1, "two {class}s": 3}), ["cat"])["cat"]
    drawn = [prompts.draw(str(key)) for key in range(4000)]
    assert Counter(drawn)["two cats"] / 4000 == pytest.approx(0.75, abs=0.03)  # four standard deviations
    assert drawn == [prompts.draw(str(key)) for key in range(4000)]


def test_the_papers_templates_go_by_name():
    found = class_prompts(settings(templates=list(PRESETS)), ["dining_room"])["dining_room"]
    assert found.sentences == ("a picture of a dining room", "the inside of a dining room", "dining room texture")


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_names_file_gives_words_synonyms_and_a_description(tmp_path, form):
    names = {"n01": "tench", "n02": {"words": "great shark", "synonyms": ["white death"], "description": "a big fish"}}
    file = tmp_path / f"names.{form}"
    file.write_text(json.dumps(names))  # JSON is YAML
    found = class_prompts(settings(names=str(file), templates=["a {class}"]), ["n01", "n02"])
    assert found["n01"].sentences == ("a tench",)
    assert found["n02"].sentences == ("a great shark", "a white death")
    described = settings(names=str(file), templates=["{class}: {description}"])
    with pytest.raises(ConfigError, match=r"asks for a description.*'tench'"):
        class_prompts(described, ["n01", "n02"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"cat": "cat", "dgo": "dog"}', "no class 'dgo'"),
        ('{"cat": "cat"}', "lacks the classes 'dog'"),
        ('{"cat": "cat", "dog": null}', "'dog' must be words"),
        ('{"cat": "cat", "dog": {"word": "dog"}}', "'dog' must be words"),
        ("[1, 2]", "has to be a mapping"),
        ("{", "not YAML|cannot be read"),
    ],
)
def test_a_names_file_that_does_not_fit_is_refused(tmp_path, content, message):
    file = tmp_path / "names.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        class_prompts(settings(names=str(file)), ["cat", "dog"])


def test_a_name_with_its_own_article_gets_no_second() -> None:
    found = class_prompts(
        settings(templates=["a photo of a {class}"]), ["an apple", "The Thinker", "orange", "theatre"]
    )
    said = [prompts.sentences[0].removeprefix("a photo of ") for prompts in found.values()]
    assert said == ["an apple", "The Thinker", "an orange", "a theatre"]


def test_what_is_not_there_or_says_nothing_of_the_class_is_refused():
    with pytest.raises(ConfigError, match="no such file"):
        class_prompts(settings(names="nowhere.yaml"), ["cat"])
    with pytest.raises(ConfigError, match="does not say where the class goes"):
        class_prompts(settings(templates=["a picture"]), ["cat"])
    with pytest.raises(ConfigError, match="no class 'dog'"):
        class_prompts(settings(overrides={"dog": {"steps": 3}}), ["cat"])


def test_one_class_may_have_templates_of_its_own():
    found = class_prompts(settings(overrides={"cat": {"templates": ["{class}!"]}}), ["cat", "dog"])
    assert found["cat"].sentences == ("cat!",)
    assert found["dog"].sentences == ("a picture of a dog",)


CODES = ("n01440764", "017", "c_12", "xkq", "xk7", "class_0", "class0", "label_12", "cat-17", "a3f9c2d1", "x")
WORDS = ("cat", "TV", "BMW", "SUV", "tv", "T-shirt", "3_trees", "7up_can", "3.5mm_jack", "17.Cardinal", "decade", "鳥")


@pytest.mark.parametrize("name", [*CODES, *WORDS])
def test_a_code_for_a_name_is_warned_of(caplog, name):
    class_prompts(settings(), [name])
    assert bool([r for r in caplog.records if repr(name) in r.getMessage()]) is (name in CODES)
