"""A layer of the configuration: one source of values, with the place of each; and how layers lie on one another.

Flows in: trees as read from files, variables, flags. Flows out: merged values, and the place that a key comes from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from exporter.config.models import SHORT_FORMS
from exporter.config.problems import Where
from exporter.config.reader import Key, Tree

Values = dict[str, Any]


@dataclass(slots=True)
class Layer:
    """One source of values, and where in it each value stands."""

    place: Where
    tree: Tree = field(default_factory=Tree)
    places: dict[Key, Where] = field(default_factory=dict)
    """Places of keys that are no lines of a file."""

    def where(self, key: Key) -> Where:
        """Return the place of a key, or of the nearest mapping around it."""
        for length in range(len(key), 0, -1):
            if place := self.places.get(key[:length]):
                return place
            if line := self.tree.lines.get(key[:length]):
                return Where(self.place.file, line)
        return self.place

    def holds(self, key: Key) -> bool:
        """Tell whether the layer sets a key."""
        value: Any = self.tree.values
        for part in key:
            if not isinstance(value, dict) or part not in value:
                return False
            value = value[part]
        return True

    def put(self, key: Key, value: object, place: Where) -> None:
        """Set a key."""
        self.places[key] = place
        values = self.tree.values
        for part in key[:-1]:
            values = values.setdefault(str(part), {})
        values[str(key[-1])] = value

    def remove(self, key: Key) -> None:
        """Take a key out; where it lies within a list, the whole list."""
        values = self.tree.values
        for part in map(str, key[:-1]):
            inner = values.get(part)
            if not isinstance(inner, dict):
                values.pop(part, None)
                return
            values = inner
        values.pop(str(key[-1]), None)

    def spell_out(self) -> None:
        """Set the keys that short forms stand for, where the layer does not set them itself."""
        general = self.tree.values.get("general", {})
        for short, key in SHORT_FORMS.items():
            if general.get(short) is not None and not self.holds(key):
                self.put(key, general[short], self.where(("general", short)))


def merge(layers: Sequence[Layer]) -> Values:
    """Lay the values on one another, lowest layer first: mappings are merged, all else is replaced."""
    merged: Values = {}
    for layer in layers:
        merged = _over(merged, layer.tree.values)
    return merged


def _over(low: Values, high: Values) -> Values:
    merged = dict(low)
    for name, value in high.items():
        below = merged.get(name)
        merged[name] = _over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def height(layers: Sequence[Layer], key: Key) -> int:
    """Return the index of the highest layer that sets a key; -1 where it is the default."""
    return max((index for index, layer in enumerate(layers) if layer.holds(key)), default=-1)


def origin(layers: Sequence[Layer], key: Key) -> Where:
    """Return the place that the value in force of a key comes from."""
    index = height(layers, key)
    return layers[index].where(key) if index >= 0 else Where("defaults")
