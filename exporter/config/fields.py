"""Looks into the models: which keys there are, of what kind, with what default; and writes values as a person would.

Flows in: the model classes. Flows out: a `Field` for each key, for the environment, the messages and the reference.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from exporter.config.reader import Key
from exporter.config.values import Kind

Container = Literal["scalar", "list", "mapping", "model"]

_CONTAINERS: dict[object, Container] = {tuple: "list", Mapping: "mapping"}


@dataclass(frozen=True, slots=True)
class Field:
    """One key of the configuration."""

    name: str
    description: str
    default: Any
    container: Container
    kind: Kind | None
    """Of the value, or of the values in a list or mapping; None for choices and models."""
    choices: tuple[str, ...]
    model: type[BaseModel] | None
    """Of the value, or of the values in a list."""

    @property
    def form(self) -> str:
        """Name what may be written, for a person."""
        each = self.kind.form if self.kind else " or ".join(f"`{choice}`" for choice in self.choices)
        if self.model is not None:
            each = f"{'mappings' if self.container == 'list' else 'mapping'}, see below"
        return {"scalar": each, "list": f"list of {each}", "mapping": f"mapping of family to {each}"}.get(
            self.container, each
        )

    @property
    def example(self) -> str:
        """Return an example in JSON."""
        if self.container == "list":
            return '["first", "second"]' if self.model is None else '[{"name": "dns", "patterns": ["port 53"]}]'
        return '{"cni_veth_info": 100}' if self.container == "mapping" else '{"low": 1000}'


def _inner(annotation: object) -> Iterator[object]:
    """Return the annotation and what it is made of, from outside to inside, without None."""
    yield annotation
    origin = get_origin(annotation)
    if origin is Annotated:
        first, *metadata = get_args(annotation)
        yield from metadata
        yield from _inner(first)
    elif origin in (Union, UnionType):
        yield from _inner(next(part for part in get_args(annotation) if part is not NoneType))
    elif origin is tuple:
        yield from _inner(get_args(annotation)[0])
    elif origin is Mapping:
        yield from _inner(get_args(annotation)[1])


def _describe(name: str, info: FieldInfo) -> Field:
    parts = [*info.metadata, *_inner(info.annotation)]
    model = next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)
    nested: Container = "scalar" if model is None else "model"
    return Field(
        name=name,
        description=info.description or "",
        default=None if info.is_required() else info.default,
        container=next((_CONTAINERS[get_origin(part)] for part in parts if get_origin(part) in _CONTAINERS), nested),
        kind=next((part for part in parts if isinstance(part, Kind)), None),
        choices=next((get_args(part) for part in parts if get_origin(part) is Literal), ()),
        model=model,
    )


def fields(model: type[BaseModel]) -> dict[str, Field]:
    """Return the keys of one model, in order."""
    return {name: _describe(name, info) for name, info in model.model_fields.items()}


def find(model: type[BaseModel], key: Key) -> Field | None:
    """Return the field at a key; None where there is none, or where the key leads into a mapping of free names."""
    found: Field | None = None
    inside: type[BaseModel] | None = model
    for part in key:
        if isinstance(part, int):
            continue
        found = fields(inside).get(part) if inside is not None else None
        if found is None:
            return None
        inside = found.model
    return found


def keys(model: type[BaseModel]) -> Iterator[tuple[Key, Field]]:
    """Return every key of every section, and the keys outside of sections."""
    for name, field in fields(model).items():
        if field.container == "model" and field.model is not None:
            yield from (((name, inner), found) for inner, found in fields(field.model).items())
        else:
            yield (name,), field


def written(field: Field, value: Any) -> Any:  # noqa: ANN401 - any value that a key can have
    """Return a value in plain types, as a person writes it in YAML."""
    if value is None:
        return None
    if isinstance(value, BaseModel):
        return {name: written(found, getattr(value, name)) for name, found in fields(type(value)).items()}
    if isinstance(value, tuple):
        return [written(field, item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): written(field, item) for name, item in value.items()}
    return field.kind.show(value) if field.kind else value
