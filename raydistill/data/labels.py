"""What a label's value means, in any kind of file, and which names are the same class."""

from __future__ import annotations

import ast
import math
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal

from raydistill.errors import DataError
from raydistill.escaping import quoted, shortened

MOST_CLASSES = 1 << 17  # of a set; a set with more of them numbers its images
MOST_BYTES = 65536  # of a label, and characters of one that is text
# What programs write where there is no value. People have to write a class called `null` in another way.
_NOTHING = frozenset({"nan", "NaN", "NAN", "-nan", "NaT", "<NA>", "null", "NULL", "None", "N/A", "n/a", "#N/A"})
_MINUS_ONE = re.compile(r"-1(\.0+)?")
_WHOLE = re.compile(r"-?\d+(\.0+)?")
# How programs write bytes and lists as text: b'cat', ['cat', 'dog'], [0 1].
_REPR = re.compile(r"""b(['"]).*\1|[\[{].*[\]}]""", re.DOTALL)
_ARRAY = re.compile(r"\[[-+.\d\s]+\]")


def label_of(value: object, where: str, notes: Counter[str]) -> str | None:
    """A class's name, or None for no label. Counts in `notes` what is not as it may seem. Raises DataError, which
    begins with `where`, for what is neither text nor a whole number."""
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
                raise DataError(f"{where}: the label is bytes that are no UTF-8; write a name") from None
        case str():
            if len(value) > MOST_BYTES:
                raise DataError(f"{where}: the label has {len(value):,} characters, too many for a label")
            text = value.rstrip("\0").strip()  # numpy and h5py fill up bytes of a fixed length with NULs
            if text in _NOTHING or _MINUS_ONE.fullmatch(text):
                notes[f"labels {text}, read as no label"] += 1
                return None
            meant = _literal(text)
            if isinstance(meant, bytes):
                notes["labels such as b'cat', read as the text in them"] += 1
            return (text or None) if meant is None else label_of(meant, where, notes)
        case dict():
            raise DataError(f"{where}: the label is a mapping; write the name of the class alone")
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
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # TypeError: a mapping has a list as key
        return None


def refuse_many_classes(count: int, where: str) -> None:
    if count > MOST_CLASSES:
        raise DataError(f"{where}: {count:,} classes, above {MOST_CLASSES:,}; are the labels names of single images?")


def whole_numbers(labels: Iterable[str], listed: Sequence[str] | None, notes: Counter[str]) -> Mapping[str, str]:
    """`3.0`, which pandas makes of whole numbers beside gaps, to `3`, where all labels are whole numbers and the class
    list does not have them as they stand."""
    counts = Counter(labels)
    if not all(map(_WHOLE.fullmatch, counts)) or counts.keys() <= set(listed or ()):
        return {}
    found = {label: label.partition(".")[0] for label in counts if "." in label}
    if found:
        notes["labels such as 1.0, read as whole numbers"] += sum(counts[label] for label in found)
    return found


def one_spelling(labels: Iterable[str], listed: Sequence[str] | None, notes: Counter[str]) -> Mapping[str, str]:
    """Each label to its class. Labels that look alike (composed or decomposed letters, spaces, invisible signs) are one
    class, spelt as in the class list or else as most of them; `notes` counts the others. Raises DataError for two that
    differ in case alone, unless both are in the class list."""
    named = frozenset(listed or ())
    counts, alike, folded = Counter(labels), defaultdict[str, list[str]](list), defaultdict[str, set[str]](set)
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
                f"the classes {both} differ in case alone; give them one name or, where they are two, list both in "
                "images.classes"
            )
    return spelt


def _look(name: str) -> str:
    if name.isascii():  # which has no signs that do not show
        return " ".join(name.split())
    shown = "".join(sign for sign in unicodedata.normalize("NFC", name) if unicodedata.category(sign) != "Cf")
    return " ".join(shown.split())
