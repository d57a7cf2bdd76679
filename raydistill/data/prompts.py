"""Makes sentences for a text-to-image pipeline from class names, and chooses one for each image."""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raydistill.config import Generate
from raydistill.errors import ConfigError
from raydistill.escaping import counted, first_few
from raydistill.yaml_files import TextLoader, read_mapping

logger = logging.getLogger(__name__)
# The templates of Farhat & Chen 2024, by name.
PRESETS = {
    "paper:object": "a picture of a {class}",
    "paper:scene": "the inside of a {class}",
    "paper:texture": "{class} texture",
}
# names that are codes, not words
_CODE = re.compile(
    r"[a-z]{0,2}\d+"  # n01440764, 017
    r"|([a-z]+ |class|label|category|type|group|item|object|id)\d+"  # cat-17, class0
    r"|(?=.*\d)\S{1,3}"  # xk7
    r"|.*\d[a-z]+\d.*"  # a3f9c2d1
    r"|[a-z]"
    r"|(?-i:[b-df-hj-np-tv-xz]{3,4})",  # xkq, but not BMW
    re.IGNORECASE,
)
# A comma, `;` or `|` separates synonyms, as in ImageNet's names, except inside a number or brackets.
_BETWEEN_SYNONYMS = re.compile(r"(?:(?<!\d),|,(?!\d)|[;|])(?![^()\[\]]*[)\]])")
# Names of three letters and more run together: goldenRetriever, but not iPhone or McDonald.
_HUMP = re.compile(r"(?<=[^\W\d_A-Z]{2})(?=[A-Z][^\W\d_A-Z])")
# What begins with the sound of a vowel. The library for this, inflect, gives "a 8-ball" and "a SUV".
_AN = re.compile(
    r"8|1[18](\d\d|(\d{3})*)(?!\d)"
    r"|(hour|heir|honest|hono)"
    r"|(?!eu|ew|ouija|one(s|\b)|once\b|uni([^nmd]|mo)|u(\b|[kv]\b)|u[bcfghjkqrst][aeiou]|(?-i:U[A-Z]{1,2}\b))[aeiou]"
    r"|y[^\Waeiou\d_]"
    # Spelled letters, because no English word begins like this: MRI, X-ray, F-150.
    r"|suv\b|(?-i:[FLMRS][B-DF-HJ-NP-TV-XZ]+\b)"
    r"|[hnx](?![aeiouy])|f(?![aeiouyjlr])|l(?![aeiouyl])|m(?![aeiouyn])|r(?![aeiouyh])|s(?![aeiouychklmnpqtw])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ClassPrompts:
    """The sentences of one class and how often each is drawn; `weights` sum to 1."""

    sentences: tuple[str, ...]
    weights: tuple[float, ...]

    def draw(self, key: str) -> str:
        """One of the sentences; it depends only on the key."""
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64
        return self.sentences[
            min(int(np.searchsorted(np.cumsum(self.weights), number, "right")), len(self.weights) - 1)
        ]


def words_of(name: str) -> str:
    """A class's name as words, NFC. `_` and `-` are spaces, and words that run together are separated.

    It leaves out a leading number that orders folders (`17.Cardinal`, `017_cardinal`; not a quantity such as
    `3.5mm_jack`), WordNet's number before a name (`n02085620-Chihuahua`), and the synonyms after the first name.
    """
    words = " ".join(re.split(r"[\s_\-]+", _HUMP.sub(" ", unicodedata.normalize("NFC", name).strip())))
    return re.sub(r"^(\d+\.(?!\d)|0\d* |n\d{8} )\s*(?=\S)", "", _first_synonym(words))


def _first_synonym(words: str) -> str:
    return next((part.strip() for part in _BETWEEN_SYNONYMS.split(words) if part.strip()), words)


def class_words(classes: Sequence[str]) -> dict[str, str]:
    """`words_of` each class, without the numbers if every name begins with one and they count from 0 or 1."""
    words = {name: words_of(name) for name in classes}
    numbered = [re.fullmatch(r"(\d+) (\S.*)", text) for text in words.values()]
    counts = sorted(int(found[1]) for found in numbered if found)
    rests = [found[2] for found in numbered if found]
    if len(classes) > 1 and counts in (list(range(len(classes))), list(range(1, len(classes) + 1))):
        if len({reading(rest) for rest in rests}) == len(classes):
            words = dict(zip(classes, rests, strict=True))
    _say_synonyms({name: words[name] for name in classes if len(_BETWEEN_SYNONYMS.split(name)) > 1})
    return words


def _say_synonyms(read: Mapping[str, str]) -> None:
    if read:
        logger.warning(
            "synonyms in the names of %s: only the first is read (%s); list others in generate.names",
            counted(len(read), "classes"),
            "; ".join(f"{name!r} as {words!r}" for name, words in list(read.items())[:3]),
        )


def reading(text: str) -> str:
    """A text without case, spaces, punctuation and Unicode forms: two texts with the same result are one prompt to any
    model.

    Signs that distinguish names (`C#`, `C++`) and those between digits (`3.5`) stay.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())

    def counts(at: int) -> bool:
        between_digits = text[at - 1 : at].isdigit() and text[at + 1 : at + 2].isdigit()
        return between_digits or text[at] in "#%&@*" or unicodedata.category(text[at])[0] in "LMNS"

    return "".join(text[at] for at in range(len(text)) if counts(at))


def class_prompts(settings: Generate, classes: Sequence[str]) -> dict[str, ClassPrompts]:
    """The prompts of every class. A template's `{class}` and `{description}` are filled in; everything else in
    templates and names is literal, even other braces.

    Raises ConfigError: two classes share a prompt, a names file or an override does not fit the classes, or a template
    has no place for the class.
    """
    names = _names(settings.names, classes)
    refuse_unknown(settings.overrides, classes, "generate.overrides")
    shared = settings.templates if isinstance(settings.templates, dict) else dict.fromkeys(settings.templates, 1.0)
    plain = class_words([name for name in classes if name not in names])
    found = {}
    for name in classes:
        own = settings.prompt_settings(name).templates
        templates = shared if own is None else dict.fromkeys(own, 1.0)
        words, description = names.get(name) or ((plain[name],), "")
        if name not in names and _CODE.fullmatch(words[0]):
            logger.warning("class %r looks like a code, which no pipeline knows; write words in generate.names", name)
        pairs = [
            (_checked_sentence(template, word, description), weight / len(words))
            for template, weight in templates.items()
            for word in words
        ]
        total = sum(weight for _, weight in pairs)
        found[name] = ClassPrompts(tuple(s for s, _ in pairs), tuple(weight / total for _, weight in pairs))
    _refuse_shared(found)
    return found


def _checked_sentence(template: str, words: str, description: str) -> str:
    template = PRESETS.get(template, template)
    if "{class}" not in template and "{description}" not in template:
        raise ConfigError(f"generate.templates: {template!r} does not say where the class goes; use {{class}}")
    if "{description}" in template and not description:
        raise ConfigError(
            f"generate.templates: {template!r} asks for a description, and generate.names has none for {words!r}"
        )
    return sentence(template, words, description)


def sentence(template: str, words: str, description: str = "") -> str:
    """The template with both filled in. An `a` or `an` right before one follows its sound."""
    values = {"class": words, "description": description}

    def fill(found: re.Match[str]) -> str:
        article, space, what = found.groups()
        if re.match(r"(?i)(an?|the)\s", values[what]):  # it has its own article
            return values[what]
        return (_article(article, values[what]) + space if article else "") + values[what]

    return re.sub(r"(?:\b([Aa]n?)(\s+))?\{(class|description)\}", fill, template)


def _article(written: str, following: str) -> str:
    """Unchanged before letters that are not Latin, whose sound is unknown."""
    plain = "".join(c for c in unicodedata.normalize("NFD", following) if not unicodedata.combining(c))
    plain = plain.lstrip("\"'([“‘„« ")
    if not (plain[:1].isascii() and plain[:1].isalnum()):
        return written
    return written[0] + ("n" if _AN.match(plain) else "")


def _names(file: str | None, classes: Sequence[str]) -> dict[str, tuple[tuple[str, ...], str]]:
    """Class name -> (its words and synonyms, its description)."""
    if file is None:
        return {}
    advice = "give a YAML or JSON file of class names and their words"
    entries = read_mapping(file, advice, TextLoader, "generate.names")
    refuse_unknown(entries, classes, f"generate.names={file}")
    if lacking := [name for name in classes if name not in entries]:
        raise ConfigError(f"generate.names={file}: lacks the classes {first_few(lacking)}")
    lists = {name: text for name, text in entries.items() if isinstance(text, str) and _first_synonym(text) != text}
    _say_synonyms({text: _first_synonym(text) for text in lists.values()})
    return {name: _entry(file, name, value) for name, value in entries.items()}


def _entry(file: str, name: str, value: object) -> tuple[tuple[str, ...], str]:
    value = {"words": _first_synonym(value)} if isinstance(value, str) else value
    known = {"words", "synonyms", "description"}
    if not isinstance(value, Mapping) or not set(value) <= known or not isinstance(value.get("words", name), str):
        keys = ", ".join(sorted(known))
        raise ConfigError(f"generate.names={file}: {name!r} must be words, or a mapping with {keys}")
    synonyms = value.get("synonyms") or []
    if isinstance(synonyms, str):
        synonyms = [synonyms]
    words = (str(value.get("words") or words_of(name)), *map(str, synonyms))
    return tuple(dict.fromkeys(words)), str(value.get("description") or "")


def refuse_unknown(given: Mapping[str, object], classes: Sequence[str], what: str) -> None:
    """Raises ConfigError if `what`, a key or a file, names a class that the data does not have."""
    known = set(classes)
    if unknown := [name for name in given if name not in known]:
        near = difflib.get_close_matches(unknown[0], classes, n=3)
        meant = f" (nearest to {unknown[0]!r}: {', '.join(map(repr, near))})" if near else ""
        raise ConfigError(
            f"{what}: the data has no class {first_few(unknown)}{meant}; it has {first_few(list(classes))}"
        )


def _refuse_shared(found: dict[str, ClassPrompts]) -> None:
    owner: dict[str, str] = {}
    for name, text in ((name, text) for name, prompts in found.items() for text in prompts.sentences):
        if (other := owner.setdefault(reading(text), name)) != name:
            raise ConfigError(
                f"classes {other!r} and {name!r} share the prompt {text!r}, so their images would be the same; "
                "give them different words in generate.names"
            )
