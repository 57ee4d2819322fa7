"""The configuration: typed, documented, put together from preset, file, environment and flags.

Flows in: what the user wrote. Flows out: one frozen `Config`, or one `ConfigError` with everything that is wrong.
"""

from exporter.config.environment import FLAGS
from exporter.config.loading import PRESETS, Loaded, load, preset_path
from exporter.config.models import Config
from exporter.config.problems import ConfigError, Problem, Where
from exporter.config.reference import reference, schema, show

__all__ = [
    "FLAGS",
    "PRESETS",
    "Config",
    "ConfigError",
    "Loaded",
    "Problem",
    "Where",
    "load",
    "preset_path",
    "reference",
    "schema",
    "show",
]
