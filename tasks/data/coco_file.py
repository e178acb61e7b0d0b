"""A COCO annotation file as typed records, or one line that says where it is wrong.

The decoder is typed (msgspec), so that wrong types are found while reading; segmentations, by far the most
of such a file, stay undecoded. `Raw` values point into the bytes of the file and keep them alive.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET, Raw, Struct, UnsetType
from numpy.typing import NDArray

from resnext_backbones.errors import UsageError
from tasks.data.faults import NAMED, counted, listed

Id = int | float | str
Ids = NDArray[np.int64]
LARGEST_EXACT = 2**53  # above it a whole float no longer names one integer


class ImageRecord(Struct, gc=False):
    id: Id
    file_name: str
    width: int | float
    height: int | float


class AnnotationRecord(Struct, gc=False):
    id: Id
    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | float | bool = 0
    segmentation: Raw = Raw()
    keypoints: Raw = Raw()


class CategoryRecord(Struct, gc=False):
    id: Id
    name: str
    keypoints: list[str] = []
    skeleton: list[tuple[int, int]] = []
    flip_pairs: list[tuple[int, int]] | None = None
    sigmas: list[float] | None = None


class CocoFile(Struct, gc=False):
    images: list[ImageRecord] | UnsetType = UNSET
    annotations: list[AnnotationRecord] | UnsetType = UNSET
    categories: list[CategoryRecord] | UnsetType = UNSET


class _Unread(Struct, gc=False):
    """The same file, each record left as it is, to find all the records that are wrong."""

    images: list[Raw] = []
    annotations: list[Raw] = []
    categories: list[Raw] = []


class _Named(Struct):
    id: Any = None
    file_name: Any = None


_NAMED = msgspec.json.Decoder(_Named)
_RECORDS: dict[str, msgspec.json.Decoder] = {
    "images": msgspec.json.Decoder(ImageRecord),
    "annotations": msgspec.json.Decoder(AnnotationRecord),
    "categories": msgspec.json.Decoder(CategoryRecord),
}
_NOT_NUMBERS = re.compile(rb'(?<![\w"])-?(?:NaN|Infinity)(?![\w"])')
_MARKER = "(not a number)"


def read_file(path: Path) -> CocoFile:
    """Reads a COCO annotation file.

    Raises:
        UsageError: there is no such file, or it is not JSON (line and column are given), or not COCO's (the
            records that are wrong are named by their path in the file and their ids).
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such annotation file; {_nearest(path)}") from None
    except OSError as error:
        raise UsageError(f"{path}: the annotation file cannot be read: {error.strerror}") from None
    try:
        return msgspec.json.decode(data, type=CocoFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: {_diagnosis(data, str(error))}") from None


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"nor is there a folder {folder}; check data.root"
    found = sorted(entry.name for entry in folder.glob("*.json"))
    return f"{folder} holds {', '.join(found[:NAMED])}" if found else f"{folder} holds no .json file"


def _diagnosis(data: bytes, reason: str) -> str:
    """What is wrong with a file that could not be decoded as COCO's, and what to do."""
    try:
        unread = msgspec.json.decode(data, type=_Unread)
    except msgspec.ValidationError as error:
        where, why = _split(str(error))
        return (
            f"not a COCO file: {where or 'at the top'}: {why}; an object is expected that holds the lists "
            "`images`, `annotations` and `categories`"
        )
    except msgspec.DecodeError as error:
        return _wrong_syntax(data, str(error))
    except RecursionError:
        return "its lists are nested too deeply for a COCO file; export it again"
    return _wrong_text(data) or _wrong_records(unread, reason)


def _wrong_records(unread: _Unread, reason: str) -> str:
    wrong = [
        (name, index, fault)
        for name, decoder in _RECORDS.items()
        for index, record in enumerate(getattr(unread, name))
        if (fault := _wrong(decoder, record))
    ]
    named = []
    for name, index, fault in wrong[:NAMED]:
        where, why = _split(fault)
        named.append(f"{name}[{index}]{where}: {why}{_whose(name, index, unread)}")
    records = counted(len(wrong), "record")
    return f"{records} of a wrong form: {listed(named, len(wrong)) or reason}; correct or remove them"


def _wrong(decoder: msgspec.json.Decoder, record: Raw) -> str:
    try:
        decoder.decode(record)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return str(error)
    return ""


def _split(message: str) -> tuple[str, str]:
    """msgspec's message as the path within the record and the reason."""
    reason, _, path = message.partition(" - at `$")
    return path.removesuffix("`"), reason


def _whose(name: str, index: int, unread: _Unread) -> str:
    """The ids and the file of a record, as far as it has any."""
    record = _loosely(getattr(unread, name)[index])
    if name == "categories":
        parts = {"category": record.get("id")}
    elif name == "images":
        parts = {"image": record.get("id"), "file": record.get("file_name")}
    else:
        image_id = record.get("image_id")
        file = _file_name(image_id, unread.images)
        parts = {"annotation": record.get("id"), "image": image_id, "file": file}
    told = ", ".join(f"{what} {value!r}" for what, value in parts.items() if value is not None)
    return f" ({told})" if told else ""


def _file_name(image_id: Any, images: Sequence[Raw]) -> Any:
    for record in images:
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            named = _NAMED.decode(record)
            if named.id == image_id:
                return named.file_name
    return None


def _loosely(record: Raw) -> dict[str, Any]:
    """The fields of a record that can be read at all."""
    fields: dict[str, Any] = {}
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        for name, value in msgspec.json.decode(record, type=dict[str, Raw]).items():
            with suppress(msgspec.DecodeError, UnicodeDecodeError):
                fields[name] = msgspec.json.decode(value)
    return fields


def _wrong_syntax(data: bytes, reason: str) -> str:
    """What to say of a file that is not JSON: where it breaks off, or which records hold NaN."""
    if not data.strip():
        return "the annotation file is empty; write it again"
    if data.startswith(b"\xef\xbb\xbf"):
        return "the file begins with a byte-order mark; save it as UTF-8 without one"
    match = re.search(r"\(byte (\d+)\)", reason)
    offset = int(match[1]) if match else len(data)
    if _NOT_NUMBERS.match(data, max(0, offset - 1)) or _NOT_NUMBERS.match(data, offset):
        named = _not_numbers(data)
        where = f": {named}" if named else f" at {_place(data, offset)}"
        return f"NaN and Infinity are not numbers of JSON{where}; correct or remove them"
    if "truncated" in reason:
        return f"the file ends too early, at {_place(data, offset)}; it was not written or copied to its end"
    what = reason.partition(" (byte")[0].removeprefix("JSON is malformed: ")
    return f"not JSON: {what} at {_place(data, offset)}; correct it or export it again"


def _not_numbers(data: bytes) -> str:
    """The records that hold NaN or Infinity, found by reading these as text."""
    try:
        unread = msgspec.json.decode(_NOT_NUMBERS.sub(b'"%s"' % _MARKER.encode(), data), type=_Unread)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    wrong = [
        (name, index)
        for name in _RECORDS
        for index, record in enumerate(getattr(unread, name))
        if _MARKER.encode() in bytes(record)
    ]
    named = [
        f"{name}[{index}].{field}{_whose(name, index, unread)}"
        for name, index in wrong[:NAMED]
        for field, value in _loosely(getattr(unread, name)[index]).items()
        if _MARKER in str(value)
    ]
    return listed(named, max(len(wrong), len(named)))


def _wrong_text(data: bytes) -> str:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 at {_place(data, error.start)}; save it as UTF-8"
    return ""


def _place(data: bytes, offset: int) -> str:
    line = data.count(b"\n", 0, offset) + 1
    column = offset - data.rfind(b"\n", 0, offset)
    return f"line {line}, column {column}"


def whole_numbers(path: Path, columns: dict[str, Sequence[Id]]) -> tuple[list[Ids], bool]:
    """Columns of one sort of id as int64 [N] each, and whether they were written as text.

    columns: the values by their path in the file, with `{}` in the place of the index. Whole floats are
    taken for integers; strings of digits are, where all columns hold nothing else.

    Raises:
        UsageError: an id is neither.
    """
    as_text = any(str in set(map(type, values)) for values in columns.values())
    convert = _from_text if as_text else _whole
    converted, wrong = [], []
    for name, values in columns.items():
        if not as_text and set(map(type, values)) <= {int}:
            try:  # nearly every file; the way below takes a second for a million ids
                column = np.array(values, dtype=np.int64)
            except OverflowError:
                column = np.array([-1])
            if column.min(initial=0) >= 0:
                converted.append(column)
                continue
        numbers = [convert(value) for value in values]
        wrong += [f"{name.format(i)} = {values[i]!r}" for i, number in enumerate(numbers) if number is None]
        converted.append(np.array([0 if number is None else number for number in numbers], dtype=np.int64))
    if wrong:
        rule = "integers from 0 are expected"
        if as_text:
            rule = "either all of a kind are integers, or all are strings of digits"
        raise UsageError(f"{path}: {counted(len(wrong), 'id')} of a wrong form: {listed(wrong)}; {rule}")
    return converted, as_text


def _whole(value: Id) -> int | None:
    if isinstance(value, int):
        return value if 0 <= value < 2**63 else None
    if isinstance(value, float):
        return int(value) if value.is_integer() and 0 <= value <= LARGEST_EXACT else None
    return None


def _from_text(value: Id) -> int | None:
    plain = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19
    return int(value) if plain else None
