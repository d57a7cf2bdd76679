"""The meaning of a label's value, in any kind of file, and which names are the same class."""

from __future__ import annotations

import ast
import math
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from decimal import Decimal

from raydistill.errors import DataError
from raydistill.escaping import quoted, shortened

MOST_CLASSES = 1 << 17  # of a data set; one with more of them numbers its images
MOST_BYTES = 65536  # of a label, and characters of a text label
# What programs write for a missing value. For a class called `null`, people have to choose another name.
_NOTHING = frozenset({"nan", "NaN", "NAN", "-nan", "NaT", "<NA>", "null", "NULL", "None", "N/A", "n/a", "#N/A"})
_MINUS_ONE = re.compile(r"-1(\.0+)?")
_WHOLE = re.compile(r"-?\d+(\.0+)?")
# How programs write bytes and lists as text: b'cat', ['cat', 'dog'], [0 1].
_REPR = re.compile(r"""b(['"]).*\1|[\[{].*[\]}]""", re.DOTALL)
_ARRAY = re.compile(r"\[[-+.\d\s]+\]")


def label_of(value: object, where: str, notes: Counter[str]) -> str | None:
    """A class's name, or None for no label. `notes` counts labels that are not read as they look. Raises DataError,
    which begins with `where`, for values that are neither text nor a whole number."""
    match value:
        case None:
            return None
        case bool():
            return str(value).lower()
        case float() if math.isnan(value):
            return label_of("nan", where, notes)
        case int() | float() if value == -1:
            return label_of("-1", where, notes)
        case Decimal() if value.adjusted() < 1000 and value == value.to_integral_value():
            return label_of(int(value), where, notes)
        case Decimal():
            return label_of(float(value), where, notes)
        case float() if not value.is_integer():
            kind = "a fraction" if math.isfinite(value) else "no number"
            raise DataError(f"{where}: the label is {value}, {kind}; a class has a name or a whole number")
        case int() | float():
            return str(int(value))
        case bytes() | bytearray() | memoryview():
            try:
                return label_of(bytes(value).decode("utf-8-sig"), where, notes)
            except UnicodeDecodeError:
                raise DataError(f"{where}: the label is bytes that are not UTF-8; write a name") from None
        case str():
            if len(value) > MOST_BYTES:
                raise DataError(f"{where}: the label has {len(value):,} characters, too many for a label")
            text = value.rstrip("\0").strip()  # numpy and h5py pad bytes of a fixed length with NULs
            if text in _NOTHING or _MINUS_ONE.fullmatch(text):
                notes[f"labels {text}, read as no label"] += 1
                return None
            meant = _literal(text)
            if isinstance(meant, bytes):
                notes["labels such as b'cat', read as the text in them"] += 1
            return (text or None) if meant is None else label_of(meant, where, notes)
        case dict():
            raise DataError(f"{where}: the label is a mapping; write only the name of the class")
        case list() | tuple() | set():
            what = f"the label is a {type(value).__name__}"
            raise DataError(f"{where}: {what}; multi-label data is not supported, an image has one class")
    raise DataError(f"{where}: the label is of type {type(value).__name__}; write a name or a whole number")


def _literal(text: str) -> object:
    """The bytes, list or mapping that a program wrote as text; None for other text."""
    if not _REPR.fullmatch(text):
        return None
    if _ARRAY.fullmatch(text):
        return text.strip("[]").split()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes that Python does not know
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # TypeError: a mapping has a list as key
        return None


def refuse_many_classes(count: int, where: str) -> None:
    if count > MOST_CLASSES:
        raise DataError(f"{where}: {count:,} classes, above {MOST_CLASSES:,}; are the labels names of single images?")


def whole_numbers(counts: Counter[str], listed: Sequence[str] | None, notes: Counter[str]) -> Mapping[str, str]:
    """`3.0`, which pandas makes of whole numbers beside gaps, becomes `3`, if all labels are whole numbers and the
    class list does not have them as they are."""
    if not all(map(_WHOLE.fullmatch, counts)) or counts.keys() <= set(listed or ()):
        return {}
    found = {label: label.partition(".")[0] for label in counts if "." in label}
    if found:
        notes["labels such as 1.0, read as whole numbers"] += sum(counts[label] for label in found)
    return found


def one_spelling(counts: Counter[str], listed: Sequence[str] | None, notes: Counter[str]) -> Mapping[str, str]:
    """The class of each label that is counted or listed.

    Labels that look alike (composed or decomposed letters, spaces, invisible characters) are one class, spelt as in the
    class list or else as in most labels; `notes` counts the others. Raises DataError for two that differ only in case,
    unless both are in the class list.
    """
    named = frozenset(listed or ())
    alike, folded = defaultdict[str, list[str]](list), defaultdict[str, set[str]](set)
    for name in {*counts, *named}:
        alike[_look(name)].append(name)
    spelt = {}
    for look, names in alike.items():
        chosen = min(names, key=lambda name: (name not in named, -counts[name], name))
        folded[look.casefold()].add(chosen)
        for name in names:
            spelt[name] = quoted(chosen)
            if name != chosen and counts[name]:
                both = f"{shortened(ascii(name))}, read as {shortened(ascii(chosen))}"
                notes[f"labels {both}, which looks the same"] += counts[name]
    for same in folded.values():
        if len(same) > 1 and not same <= named:
            both = " and ".join(repr(spelt[name]) for name in sorted(same))
            raise DataError(
                f"the classes {both} differ only in case; give them one name or, if they are two classes, list both in "
                "images.classes"
            )
    return spelt


def _look(name: str) -> str:
    if name.isascii():  # ASCII has no invisible characters
        return " ".join(name.split())
    shown = "".join(sign for sign in unicodedata.normalize("NFC", name) if unicodedata.category(sign) != "Cf")
    return " ".join(shown.split())
