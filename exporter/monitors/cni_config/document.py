"""A configuration file as JSON text: what it holds, or what is wrong with it and where.

Flows in: any bytes. Flows out: plain values, and problems with line and column. What counts as JSON is what Go's
encoding/json takes, since that is what the runtimes read with: bytes that are no UTF-8 are replaced, `NaN` is refused.
Texts of problems are fixed words: they never hold anything of the file, which may hold secrets.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined] # part of the standard library, not of its stubs
from typing import Any, NoReturn

_BLANK = " \t\n\r"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a file is invalid, in words of ours, and where; line and column count from 1, 0 where there is no place."""

    text: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        """Give the text with its place."""
        return f"{self.text} (line {self.line}, column {self.column})" if self.line else self.text


class Invalid(ValueError):  # noqa: N818 - a judgement, not a failure
    """A document that is no configuration; carries the problem."""

    def __init__(self, problem: Problem) -> None:
        """Keep the problem."""
        super().__init__(str(problem))
        self.problem = problem


def parse(text: str) -> Any:  # noqa: ANN401 - JSON has every type
    """Read a document. Raises Invalid."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise Invalid(Problem(error.msg, error.lineno, error.colno)) from None
    except RecursionError:
        raise Invalid(Problem("nested too deeply")) from None
    except ValueError:
        raise Invalid(Problem("a number that no runtime reads")) from None


def _refuse(_constant: str) -> NoReturn:
    raise ValueError


def place(text: str, path: Sequence[str | int]) -> tuple[int, int]:
    """Give line and column of the value at `path` (keys and indices) in a document that `parse` has read.

    Of a key that is there twice it is the last, which is the one in force. Where the path ends early, it is the place
    of the last value on it: what lacks something stands there.
    """
    offset = _skip(text, 0)
    for step in path:
        inner = _inside(text, offset, step)
        if inner < 0:
            break
        offset = inner
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def _inside(text: str, offset: int, step: str | int) -> int:
    """Give the offset of one entry of the container at `offset`, -1 where it has none such."""
    closing = {"{": "}", "[": "]"}.get(text[offset], "")
    if not closing or (closing == "}") != isinstance(step, str):
        return -1
    found, count, offset = -1, 0, _skip(text, offset + 1)
    while text[offset] != closing:
        name: str | int = count
        if closing == "}":
            name, offset = scanstring(text, offset + 1)
            offset = _skip(text, _skip(text, offset) + 1)
        if name == step:
            found = offset
        offset = _skip(text, _DECODER.raw_decode(text, offset)[1])
        offset, count = _skip(text, offset + 1) if text[offset] == "," else offset, count + 1
    return found


def _skip(text: str, offset: int) -> int:
    while offset < len(text) and text[offset] in _BLANK:
        offset += 1
    return offset
