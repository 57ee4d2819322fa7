"""Reads YAML or JSON text into plain values, and remembers the line of each.

Flows in: bytes that may be anything. Flows out: a nested mapping, the line of every key, and the problems found on the
way. Only the core of YAML 1.2 is taken: no anchors, aliases, tags or several documents, so that size in is size out.
"""

import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from exporter.config.problems import Problem, Where, show_value
from exporter.config.values import number

MOST_BYTES = 2**20
MOST_DEPTH = 20
MOST_VALUES = 20_000

Key = tuple[str | int, ...]

_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_BASED = re.compile(r"0x[0-9a-fA-F]{1,16}|0o[0-7]{1,21}", re.ASCII)
_SPECIAL = {".inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}


@dataclass(slots=True)
class Tree:
    """What a text holds."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[Key, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class _Refusal(Exception):  # noqa: N818 - carried to the one place that turns it into a problem
    """Ends the reading of a text at a line."""

    def __init__(self, line: int, wrong: str, instead: str) -> None:
        super().__init__(wrong)
        self.line = line
        self.wrong = wrong
        self.instead = instead


class _Loader(yaml.SafeLoader):
    """Composes nodes, and stops before what could grow: depth, number, aliases."""

    depth = 0
    values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401 - PyYAML's own
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        self._check(event, line)
        self.depth += 1
        self.values += 1
        if self.depth > MOST_DEPTH:
            raise _Refusal(line, f"is nested deeper than {MOST_DEPTH} levels", "take levels out")
        if self.values > MOST_VALUES:
            raise _Refusal(line, f"holds more than {MOST_VALUES} values", "name the file that was meant")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    @staticmethod
    def _check(event: yaml.Event, line: int) -> None:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Refusal(line, "anchors and aliases (& and *) are not taken", "write the value out, or in quotes")
        if tag := getattr(event, "tag", None):
            raise _Refusal(
                line, f"{show_value('', tag)} is read as a YAML tag", "put a text that begins with ! in quotes"
            )


def _scalar(node: yaml.ScalarNode) -> object:
    """Resolve a scalar by the core schema of YAML 1.2 (chapter 10.3), of which JSON is a part."""
    text = str(node.value)
    if node.style is not None:
        return _joined(text)
    if text in _WORDS:
        return _WORDS[text]
    if _BASED.fullmatch(text):
        return int(text, 0)
    found = _SPECIAL.get(text.lower(), number(text))
    return _joined(text) if found is None else found


def _joined(text: str) -> str:
    """Join the surrogate pairs that JSON writes as two escapes; a lone surrogate becomes the replacement character."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class _Reading:
    """Turns nodes into values, noting lines and duplicate keys."""

    def __init__(self, tree: Tree, where: Callable[[int], Where]) -> None:
        self._tree = tree
        self._where = where

    def value(self, node: yaml.Node, key: Key) -> object:
        self._tree.lines.setdefault(key, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return tuple(self.value(item, (*key, index)) for index, item in enumerate(node.value))
        assert isinstance(node, yaml.ScalarNode)  # noqa: S101 - there are three kinds of nodes
        return _scalar(node)

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, object]:
        values: dict[str, object] = {}
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            if not isinstance(name_node, yaml.ScalarNode):
                self._report(line, key, "a key is no text", 'write "key: value"')
                continue
            name = _joined(str(name_node.value))
            child = (*key, name)
            if name in values:
                wrong = f"is written twice (first in line {self._tree.lines[child]})"
                self._report(line, child, wrong, "remove one of the two")
                continue
            self._tree.lines[child] = line
            values[name] = self.value(value_node, child)
        return values

    def _report(self, line: int, key: Key, wrong: str, instead: str) -> None:
        self._tree.problems.append(Problem(self._where(line), dotted(key), wrong, instead))


def dotted(key: Key) -> str:
    """Write a key as the user does: `load_config.priority_filters[0].name`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{_key_name(part)}" for part in key)
    return text.removeprefix(".")


def _key_name(name: str) -> str:
    shown = show_value("", name)[1:-1]
    return shown or '""'


def read_value(text: str, where: Callable[[int], Where]) -> tuple[object, Tree]:
    """Read one document of any type. Every problem is in the tree; nothing is raised."""
    tree = Tree()
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:
        tree.problems.append(_syntax(text, error, where))
        return None, tree
    try:
        node = loader.get_single_node()
        return None if node is None else _Reading(tree, where).value(node, ()), tree
    except _Refusal as refusal:
        tree.problems.append(Problem(where(refusal.line), "", refusal.wrong, refusal.instead))
    except yaml.YAMLError as error:
        tree.problems.append(_syntax(text, error, where))
    except (ValueError, OverflowError):  # PyYAML lets those of chr() and int() through
        wrong = "is no YAML or JSON: an escape or a version is out of range"
        tree.problems.append(Problem(where(loader.line + 1), "", wrong, "write the character itself"))
    return None, tree


def read_text(text: str, where: Callable[[int], Where]) -> Tree:
    """Read one document, which is a mapping or empty. Every problem is in the tree; nothing is raised."""
    value, tree = read_value(text, where)
    if isinstance(value, dict):
        tree.values = value
    elif value is not None:
        instead = "begin with a section, for example log: {level: debug}"
        tree.problems.append(Problem(where(tree.lines.get((), 1)), "", "is no mapping", instead))
    return tree


def _syntax(text: str, error: yaml.YAMLError, where: Callable[[int], Where]) -> Problem:
    """Say where YAML stopped. Its message quotes single characters at most, so no secret gets out."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Problem(where(line), "", f"the character #x{error.character:04x} is not allowed", "remove it")
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "context", None) or "it ends too early"
    column = f" at column {mark.column + 1}" if mark else ""
    wrong = f"is no YAML or JSON{column}: {show_value('', str(what))[1:-1]}"
    return Problem(where(mark.line + 1 if mark else 1), "", wrong, "indent with spaces, and quote special characters")


def read_file(path: Path) -> Tree:
    """Read a configuration file. Every problem is in the result; nothing is raised, nothing waits."""
    tree = Tree()

    def refuse(wrong: str, instead: str, line: int | None = None) -> Tree:
        tree.problems.append(Problem(Where(str(path), line), "", wrong, instead))
        return tree

    try:
        data = _read_bytes(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return refuse(f"cannot be read ({reason})", "name a regular file that this user may read")
    if len(data) > MOST_BYTES:
        return refuse(f"is larger than {MOST_BYTES} bytes", "name the file that was meant")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return refuse("is not UTF-8", "save it as UTF-8", data.count(b"\n", 0, error.start) + 1)
    if path.suffix == ".json":
        text = text.replace("\t", " ")  # white space in JSON; within its strings a tab must be escaped
    return read_text(text, lambda line: Where(str(path), line))


def _read_bytes(path: Path) -> bytes:
    """Read one byte more than allowed at most; a pipe or a device is refused, so that nothing waits for a writer."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("no regular file")
        return file.read(MOST_BYTES + 1)
