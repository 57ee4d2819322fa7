"""Checks one layer by itself, and the merged whole; words every finding.

Flows in: a layer's values with their places. Flows out: problems; the wrong values are taken out of the layer, so that
everything that is wrong anywhere is found in one go.
"""

import ipaddress
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from exporter.config.fields import fields, find, keys
from exporter.config.layers import Layer, height, origin
from exporter.config.models import Config, KernelFilter
from exporter.config.problems import MOST_PROBLEMS, Problem, Where, did_you_mean, show_value
from exporter.config.reader import Key, dotted
from exporter.config.values import Refused

_HIGHEST = {"pid": 4_194_304, "port": 65_535, "syscall": 1023}  # PID_MAX_LIMIT of linux/threads.h
_COMMAND_BYTES = 15  # TASK_COMM_LEN without the final zero


def check_layer(layer: Layer) -> list[Problem]:
    """Return the problems of one layer, and take the wrong values out of it."""
    values = layer.tree.values
    for name in [name for name in fields(Config) if name in values and values[name] is None]:
        del values[name]  # a section of which nothing is left but its name
    problems = layer.tree.problems
    try:
        Config.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        places = sorted(((layer.where(_path(detail)), detail) for detail in details), key=lambda it: it[0].line or 0)
        problems += [_problem(place, detail) for place, detail in places[:MOST_PROBLEMS]]
        if len(places) > MOST_PROBLEMS:
            wrong = f"has {len(places) - MOST_PROBLEMS} more problems"
            problems.append(Problem(layer.place, "", wrong, "mend the first ones first"))
        for detail in details:
            layer.remove(_path(detail))
    return sorted(problems, key=lambda problem: problem.where.line or 0)


def _path(detail: ErrorDetails) -> Key:
    """Return the key; pydantic puts a mark behind it where the name itself is wrong."""
    return tuple(part for part in detail["loc"] if part != "[key]")


# --- wording --------------------------------------------------------------------------------------------------------


def _problem(where: Where, detail: ErrorDetails) -> Problem:
    key = _path(detail)
    wrong, instead = _finding(key, detail)
    return Problem(where, dotted(key), wrong, instead)


def _finding(key: Key, detail: ErrorDetails) -> tuple[str, str]:
    """Say what is wrong and what to write instead."""
    shown, known = show_value(dotted(key), detail["input"]), find(Config, key)
    reason = detail.get("ctx", {}).get("error")
    if isinstance(reason, Refused):
        return reason.wrong(dotted(key)), reason.instead
    match detail["type"]:
        case "extra_forbidden":
            finding = "is no known key", _known_key(key)
        case "missing":
            finding = "is missing", f"write {key[-1]}: and a value"
        case "literal_error":
            finding = f"{shown} is not known here", _known_choice(detail["input"], known.choices if known else ())
        case "tuple_type":
            finding = f"{shown} is no list", f"write for example {known.example if known else '[]'}"
        case "model_type" | "dict_type" | "mapping_type":
            finding = f"{shown} is no mapping", "write its keys below it, indented, or {}"
        case _:
            finding = f"{shown} is not taken ({detail['msg']})", "see the reference of the configuration"
    return finding


def _known_key(key: Key) -> str:
    """Name the nearest key of the same section, else a key of that name in another one."""
    parent = find(Config, key[:-1])
    model = Config if len(key) == 1 else parent.model if parent else None
    name = str(key[-1])
    if model is not None and (close := did_you_mean(name, model.model_fields)):
        return f"did you mean {close}?"
    for other, _ in keys(Config):
        if other[-1] == name:
            return f"did you mean {dotted(other)}?"
    return "remove it, or look it up in the reference of the configuration"


def _known_choice(value: object, choices: Sequence[str]) -> str:
    close = did_you_mean(value, choices) if isinstance(value, str) else ""
    return f'did you mean "{close}"?' if close else "write " + " or ".join(f'"{choice}"' for choice in choices)


# --- the whole ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Conflict:
    """Values that do not go together."""

    keys: tuple[Key, ...]
    wrong: str
    instead: str


def conflicts(config: Config) -> Iterator[Conflict]:
    """Return what is wrong between keys of a configuration whose values are right each by itself."""
    load = config.load_config
    if load.min_sampling_rate > load.max_sampling_rate:
        yield Conflict(
            (("load_config", "min_sampling_rate"), ("load_config", "max_sampling_rate")),
            f"min_sampling_rate {load.min_sampling_rate:g} is above max_sampling_rate {load.max_sampling_rate:g}",
            "raise the one or lower the other",
        )
    for (lower, low), (upper, high) in pairwise(load.load_thresholds):
        if low >= high:
            base = ("load_config", "load_thresholds")
            yield Conflict(
                ((*base, lower), (*base, upper)),
                f"{lower} {low} is not below {upper} {high}",
                "let the thresholds ascend: low, medium, high, critical",
            )
    names = [own.name for own in load.priority_filters]
    for name in sorted({name for name in names if names.count(name) > 1}):
        shown = show_value("name", name)
        yield Conflict((("load_config", "priority_filters"),), f"two rules are called {shown}", "rename one")
    for number, rule in enumerate(load.kernel_filters, 1):
        if instead := _unfit(rule):
            wrong = f"{show_value('subject', rule.subject)} of rule {number} is no {rule.kind}"
            yield Conflict((("load_config", "kernel_filters"),), wrong, instead)


def _unfit(rule: KernelFilter) -> str:
    """Say what the subject of a rule should have been; empty where it is right."""
    if rule.kind in _HIGHEST:
        highest = _HIGHEST[rule.kind]
        fits = rule.subject.isascii() and rule.subject.isdigit() and int(rule.subject[:20]) <= highest
        return "" if fits else f"write a whole number, 0 to {highest}"
    if rule.kind == "command":
        return "" if len(rule.subject.encode()) <= _COMMAND_BYTES else f"write at most {_COMMAND_BYTES} bytes"
    if rule.kind == "address":
        try:
            ipaddress.ip_network(rule.subject)
        except ValueError:
            return 'write an address or a prefix without host bits, for example "10.0.0.0/8"'
    return ""


def check_whole(config: Config, layers: Sequence[Layer], wrong: AbstractSet[str]) -> Iterator[Problem]:
    """Return the conflicts, each at the highest layer that has a part in it.

    Args:
        config: the merged configuration.
        layers: what it was merged from, lowest first.
        wrong: dotted keys that have a problem already; conflicts of theirs are not worth telling.
    """
    for conflict in conflicts(config):
        if wrong.isdisjoint(dotted(key) for key in conflict.keys):
            key = max(conflict.keys, key=lambda key: height(layers, key))
            yield Problem(origin(layers, key), dotted(key), conflict.wrong, conflict.instead)
