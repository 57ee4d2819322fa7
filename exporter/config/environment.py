"""The two upper layers: variables of the environment, and flags of the command line.

Flows in: names and texts. Flows out: layers whose values have the types that a file would give them. A variable with
our prefix that sets nothing is a problem, since it is most likely misspelled.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.config.fields import Field, find, keys
from exporter.config.layers import Layer
from exporter.config.models import Config
from exporter.config.problems import Problem, Where, did_you_mean
from exporter.config.reader import Key, dotted, read_value

PREFIX = "CNI_EXPORTER_"

SHORT_VARIABLES = {
    "ENABLE_CONTAINER_INTEGRATION": ("general", "enable_container_integration"),
    "ENABLE_KUBERNETES_INTEGRATION": ("general", "enable_kubernetes_integration"),
}
"""Variables without our prefix, and the keys that they set; the variable with the prefix wins."""

FLAGS = {
    "preset": "--preset",
    "general.role": "--role",
    "web.listen_address": "--web.listen-address",
    "web.config_file": "--web.config.file",
    "log.level": "--log.level",
    "paths.procfs": "--path.procfs",
    "paths.sysfs": "--path.sysfs",
}
"""Keys that have a flag of the command line, and how it is spelled."""

_SERVICE_LINK = re.compile(
    PREFIX + r"(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?)",
)
"""What Kubernetes sets in every pod of a namespace that has a Service called `cni-exporter` or `cni-exporter-…`."""


def variable(key: Key) -> str:
    """Return the name of the variable that sets a key."""
    return PREFIX + "_".join(map(str, key)).upper()


def from_environment(environ: Mapping[str, str]) -> Layer:
    """Read the variables that are ours. An empty one counts as not set: compose files write them so."""
    layer = Layer(Where("environment"))
    ours = {variable(key): key for key, _ in keys(Config)}
    for name, key in SHORT_VARIABLES.items():
        if environ.get(name):
            _put(layer, key, environ[name], Where(f"environment {name}"))
    for name in sorted(name for name in environ if name.startswith(PREFIX)):
        place = Where(f"environment {name}")
        if name not in ours and not _SERVICE_LINK.fullmatch(name):
            close = did_you_mean(name, ours)
            instead = f"did you mean {close}?" if close else "unset it, or look it up in the reference"
            layer.tree.problems.append(Problem(place, "", "sets no known key", instead))
        elif name in ours and environ[name]:
            _put(layer, ours[name], environ[name], place)
    return layer


def from_flags(flags: Mapping[str, Any]) -> Layer:
    """Read the flags that were given: dotted key to value; None is a flag that was not."""
    layer = Layer(Where("flags"))
    for name, value in flags.items():
        if value is not None:
            plain = str(value) if isinstance(value, Path) else value
            _put(layer, tuple(name.split(".")), plain, Where(f"flag {FLAGS.get(name, name)}"))
    return layer


def _put(layer: Layer, key: Key, value: object, place: Where) -> None:
    known = find(Config, key)
    if isinstance(value, str) and known is not None:
        text = value.strip()
        if known.container == "scalar":
            value = known.kind.from_text(text) if known.kind else text
        elif known.container == "list" and known.model is None and not text.startswith("["):
            value = tuple(part.strip() for part in text.split(",") if part.strip())
        else:
            value = _json(layer, known, text, place, key)
    if value is not None:
        layer.put(key, value, place)


def _json(layer: Layer, known: Field, text: str, place: Where, key: Key) -> object:
    """Read what is nested. What YAML says about the text is left out: it may quote a part of it."""
    value, tree = read_value(text, lambda _: place)
    if tree.problems:
        layer.tree.problems.append(Problem(place, dotted(key), "is no JSON", f"write for example {known.example}"))
        return None
    return value
