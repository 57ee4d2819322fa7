"""The configuration in words: JSON schema, the effective values as YAML, and the reference in Markdown.

Flows in: the models, or a loaded configuration. Flows out: text. Everything is made of the models, so that what is
written cannot differ from what is read.
"""

import json
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from exporter import privacy
from exporter.config.environment import FLAGS, SHORT_VARIABLES, variable
from exporter.config.fields import Field, fields, written
from exporter.config.loading import PRESETS, Loaded
from exporter.config.models import Config
from exporter.config.reader import Key, dotted

_INTRODUCTION = f"""\
# Configuration

<!-- Made from the models in exporter/config by `reference()`. A test compares the two. -->

The configuration is one YAML or JSON file (`--config FILE`), UTF-8, of at most 1 MiB. Every key is optional. A value
is taken from the highest layer that sets it, in this order, highest first:

1. flags of the command line,
2. the environment,
3. the configuration file,
4. the preset (`--preset NAME`, `CNI_EXPORTER_PRESET`, or `preset:` in the file):
   {", ".join(PRESETS)},
5. the defaults below.

Mappings are merged over the layers, lists are replaced as a whole. `cni-exporter check` says everything that is wrong
at once, with file, line and key; `cni-exporter config show` prints the values in force and where each comes from.

**Values.** A duration is a number of seconds, or a text such as `30s`, `500ms`, `1m30s`. A size is a number of bytes,
or a text such as `512MiB`, `1.5Gi`, `2GB`. A switch is `true` or `false`. A glob knows `*`, `?` and `[…]`. Put a text
that begins with `!`, `&` or `*` in quotes; YAML's anchors, aliases and tags are not taken.

**Environment.** Each key has the variable `CNI_EXPORTER_<SECTION>_<KEY>`. Lists are separated by commas (or JSON,
where an item holds a comma); what is nested is JSON. An empty variable counts as not set. A variable with this prefix
that sets no known key is an error, except those that Kubernetes makes for a Service called `cni-exporter`
(`…_SERVICE_HOST`, `…_SERVICE_PORT`, `…_PORT`, `…_PORT_<number>_TCP`). Two more are taken, without the prefix; where
both are set, the one with the prefix wins:

{chr(10).join(f"- `{name}` sets `{dotted(key)}`" for name, key in SHORT_VARIABLES.items())}

**Two switches for one feature.** Some features have a switch in `general` and one in `container_config`: such a
feature is on where both are. Container discovery needs `general.enable_container_integration` too.

**Short forms.** Four numbers of `general` stand for a key of another section. Within one layer the key of that
section wins; between layers the higher one wins, whichever way it says it.
"""


def schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of the file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def show(loaded: Loaded) -> str:
    """Return the values in force as YAML that can be loaded again, each with where it comes from if not the default."""
    return "\n".join(_lines(loaded, loaded.config, (), "")) + "\n"


def _lines(loaded: Loaded, model: BaseModel, key: Key, indent: str) -> Iterator[str]:
    for name, field in fields(type(model)).items():
        value, inner = getattr(model, name), (*key, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _lines(loaded, value, inner, indent + "  ")
        elif field.container == "mapping" and value:
            yield f"{indent}{name}:"
            for entry, number in value.items():
                yield f"{indent}  {entry}: {_yaml(number)}{_origin(loaded, (*inner, entry))}"
        else:
            shown = _yaml(_safe(name, written(field, value)))
            yield f"{indent}{name}: {shown}{_origin(loaded, inner)}"


def _origin(loaded: Loaded, key: Key) -> str:
    source = loaded.sources.get(dotted(key))
    return f"  # {source}" if source else ""


def _yaml(value: object) -> str:
    """Write a value on one line."""
    if value is None:
        return "null"
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False)
    return str(text).removesuffix("\n").removesuffix("\n...")


def _safe(name: str, value: object) -> object:
    """Take secrets out of a value in plain types."""
    if isinstance(value, dict):
        return {key: _safe(key, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_safe(name, item) for item in value]
    if isinstance(value, str):
        return privacy.REDACTED if privacy.secret_key(name) else privacy.DEFAULT.scrub(value)
    return value


def reference() -> str:
    """Return the reference in Markdown."""
    return "\n".join([_INTRODUCTION, *_sections(Config, ()), *_flags()])


def _sections(model: type[BaseModel], key: Key) -> Iterator[str]:
    """Return a table per section, and behind it a table per mapping within it."""
    plain = {name: field for name, field in fields(model).items() if key or field.container != "model"}
    if key:
        yield f"## {dotted(key)}\n\n{(model.__doc__ or '').strip()}\n"
    else:
        yield "## Outside of sections\n"
    yield "| key | type | default | environment variable | meaning |\n|---|---|---|---|---|"
    for name, field in plain.items():
        yield _row((*key, name), field)
    yield ""
    for name, field in fields(model).items():
        if field.model is not None:
            yield from _sections(field.model, (*key, name))


def _row(key: Key, field: Field) -> str:
    default = json.dumps(written(field, field.default), ensure_ascii=False) if field.default is not None else ""
    if field.container == "model":
        default = ""
    name = f"`{variable(key)}`" if len(key) <= 2 else ""  # noqa: PLR2004 - section and key have a variable, no deeper
    cells = (f"`{key[-1]}`", field.form, f"`{default}`" if default else "", name, field.description)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _flags() -> Iterator[str]:
    yield "## Flags\n\n| flag | key |\n|---|---|"
    for key, flag in FLAGS.items():
        yield f"| `{flag}` | `{key}` |"
    yield ""
