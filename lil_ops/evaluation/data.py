r"""Problems: questions with their right answers, from JSON lines, a reasoning-gym generator or the Hugging Face hub.

A source is one of

- the path of a ``.jsonl`` file, an object with a question and an answer in each line;
- ``reasoning_gym:NAME:SEED:COUNT``, a generator (extra ``reasoning-gym``);
- ``hf:NAME:SPLIT`` or ``hf:NAME:CONFIG:SPLIT``, a data set of the hub or of a local folder (extra ``datasets``).

The right answer is what follows ``####`` (GSM8K), or else the last ``\boxed{...}`` (MATH), or else the whole field.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from lil_ops.evaluation.answers import last_boxed
from lil_ops.evaluation.extras import require

QUESTION_FIELDS = ("question", "problem", "prompt")
ANSWER_FIELDS = ("answer", "solution")
ID_FIELDS = ("id", "unique_id")


@dataclass(frozen=True)
class Problem:
    """``id``: unique among the problems of a run. ``answer``: the right one, without its derivation."""

    id: str
    question: str
    answer: str


def load(
    source: str,
    question_field: str | None = None,
    answer_field: str | None = None,
    id_field: str | None = None,
    limit: int | None = None,
) -> list[Problem]:
    """The problems of a source, or its first ``limit``.

    Fields not given are the first present of `QUESTION_FIELDS`, `ANSWER_FIELDS` and `ID_FIELDS`; a problem without an
    id has its number, from 0. Raises ValueError, naming source and line, for whatever is not as expected.
    """
    records = itertools.islice(_records(source), limit)
    problems = []
    for number, (place, record) in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{place}: expected an object with a question and an answer")
        question = _field(place, record, question_field, QUESTION_FIELDS, "question")
        answer = right_answer(_field(place, record, answer_field, ANSWER_FIELDS, "answer"))
        names = (id_field,) if id_field else ID_FIELDS
        named = id_field or any(name in record for name in names)
        problems.append(
            Problem(_field(place, record, id_field, names, "id") if named else str(number), question, answer)
        )
        if not answer:
            raise ValueError(f"{place}: the answer is empty")
    if not problems:
        raise ValueError(f"{source}: no problems in it")
    seen = set()
    for problem in problems:
        if problem.id in seen:
            raise ValueError(f"{source}: expected each id once, got {problem.id!r} twice")
        seen.add(problem.id)
    return problems


def fingerprint(problems: Iterable[Problem]) -> str:
    """Of ids, questions and answers: whether two runs had the same problems."""
    return hashlib.sha256(json.dumps([astuple(problem) for problem in problems]).encode()).hexdigest()[:16]


def right_answer(text: str) -> str:
    """The answer itself, of a field that may derive it first."""
    if "####" in text:
        text = text.rpartition("####")[2]
    elif (boxed := last_boxed(text)) is not None:
        text = boxed
    return text.strip()


def _field(place: str, record: dict, given: str | None, usual: tuple[str, ...], what: str) -> str:
    names = (given,) if given else usual
    for name in names:
        value = record.get(name)
        if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
            _check_encodes(place, name, str(value))
            return str(value)
    raise ValueError(
        f"{place}: expected the {what} as text or number in field {' or '.join(map(repr, names))}, "
        f"got the fields {', '.join(map(repr, record)) or 'none'}"
    )


def _check_encodes(place: str, name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: expected text in field {name!r}, got half of a character: {error}") from error


def _records(source: str) -> Iterator[tuple[str, object]]:
    """Each record with what to call it in an error."""
    kind, *arguments = source.split(":")
    if kind == "reasoning_gym":
        rows = _reasoning_gym(source, arguments)
    elif kind == "hf":
        rows = _hugging_face(source, arguments)
    else:
        yield from _json_lines(Path(source).expanduser())
        return
    for number, row in enumerate(rows):
        yield f"{source}, row {number}", row


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield f"{path}, line {number}", json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"cannot read the problems: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read the problems: {path}: not UTF-8 text") from error


def _reasoning_gym(source: str, arguments: list[str]) -> Iterable[dict]:
    if len(arguments) != 3 or not all(number.isdecimal() for number in arguments[1:]):
        raise ValueError(f"data: expected reasoning_gym:NAME:SEED:COUNT, got {source!r}")
    name, seed, count = arguments
    # Any exception: its generators check their options by assertions and errors of their own.
    try:
        return require("reasoning_gym", "reasoning-gym").create_dataset(name, seed=int(seed), size=int(count))
    except (ValueError, AssertionError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from error


def _hugging_face(source: str, arguments: list[str]) -> Iterable[dict]:
    if len(arguments) not in (2, 3) or not all(arguments):
        raise ValueError(f"data: expected hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, got {source!r}")
    *name, split = arguments
    datasets = require("datasets", "datasets")
    # Any exception: hub, cache and file formats raise kinds of their own.
    try:
        return datasets.load_dataset(*name, split=split)
    except Exception as error:
        raise ValueError(f"{source}: {str(error).partition(chr(10))[0]}") from error
