"""From files, environment and flags to one configuration, or to everything that is wrong with them.

Layers, lowest first: defaults of the models, preset file, configuration file, environment, flags.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

import exporter
from exporter.config.check import check_layer, check_whole
from exporter.config.environment import from_environment, from_flags
from exporter.config.fields import fields, written
from exporter.config.layers import Layer, merge, origin
from exporter.config.models import SHORT_FORMS, Config, Preset
from exporter.config.problems import ConfigError, Problem, Where
from exporter.config.reader import Key, dotted, read_file

PRESETS: tuple[str, ...] = get_args(Preset)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration in force."""

    config: Config
    sha256: str
    """Of what the configuration says, in hexadecimal: equal wherever the meaning is, whatever the layers."""
    preset: str
    """Name of the preset; empty where there is none."""
    sources: Mapping[str, str]
    """Dotted key to the place that it comes from, for every value that is not the default."""


def preset_path(name: str) -> Path:
    """Return the file of a preset: `deploy/config` lies beside the package, in a checkout as in an installation."""
    return Path(exporter.__file__).parent.parent / "deploy" / "config" / f"{name}.yaml"


def load(path: Path | None, preset: str | None, environ: Mapping[str, str], flags: Mapping[str, Any]) -> Loaded:
    """Load the configuration.

    Args:
        path: a YAML or JSON file; None for none.
        preset: name of a preset from the command line; where None, the environment or the file may name one.
        environ: the environment; only the variables that are ours are looked at.
        flags: dotted key (`FLAGS` has those of the command line) to value; None is a flag that was not given.

    Raises:
        ConfigError: with every problem of every layer.
    """
    file = Layer(Where(str(path)), read_file(path)) if path is not None else Layer(Where("no file"))
    upper = [file, from_environment(environ), from_flags({"preset": preset, **flags} if preset else flags)]
    problems = [problem for layer in upper for problem in check_layer(layer)]
    name = next((layer.tree.values["preset"] for layer in reversed(upper) if layer.tree.values.get("preset")), "")
    layers = [*_preset(name, problems), *upper]
    for layer in layers:
        layer.spell_out()
    config = Config.model_validate(merge(layers))
    problems += check_whole(config, layers, _wrong(problems))
    if problems:
        raise ConfigError(problems)
    return Loaded(config, _digest(config), name, dict(_sources(config, layers)))


def _preset(name: str, problems: list[Problem]) -> list[Layer]:
    """Return the preset's layer, if there is a preset; what is wrong in it comes first, as it lies lowest."""
    if not name:
        return []
    path = preset_path(name)
    layer = Layer(Where(str(path)), read_file(path))
    problems[:0] = check_layer(layer)
    return [layer]


def _wrong(problems: Sequence[Problem]) -> set[str]:
    """Return the keys that have a problem, and those that a wrong short form stands for."""
    wrong = {problem.key for problem in problems}
    return wrong | {dotted(key) for short, key in SHORT_FORMS.items() if f"general.{short}" in wrong}


def _digest(config: Config) -> str:
    """Hash what the configuration says; the preset and the short forms are ways to say it."""
    meaning = {name: written(field, getattr(config, name)) for name, field in fields(Config).items()}
    del meaning["preset"]
    for short in SHORT_FORMS:
        del meaning["general"][short]
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def _sources(config: Config, layers: Sequence[Layer]) -> Iterator[tuple[str, str]]:
    for key in changed(config, Config(), ()):
        yield dotted(key), str(origin(layers, key))


def changed(value: object, default: object, key: Key) -> Iterator[Key]:
    """Return the keys whose value is not the default."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from changed(getattr(value, name), getattr(default, name), (*key, name))
    elif isinstance(value, Mapping):
        yield from ((*key, name) for name in value)
    elif value != default:
        yield key
