"""Which configuration a runtime uses for new pods, by that runtime's own rule.

Flows in: the files of a directory, in order. Flows out: the paths of those in force.

| | containerd | CRI-O |
|---|---|---|
| code | go-cni, `loadFromConfDir` (opts.go) | ocicni, `loadNetworks` (pkg/ocicni/ocicni.go) |
| files | `.conf`, `.conflist`, `.json`, by name, byte by byte | the same |
| a file that does not load | stops it: no network at all | is passed over |
| a plugin that is not there | shows when a pod is made | passes the file over |
| taken | the first `max_conf_num` (1; 0: all) | the first; or the first whose name is `cni_default_network` |

Neither prefers lists: only who looks a network up by name (libcni's LoadConfList: nerdctl, cnitool, Multus) tries the
`.conflist` files before the others.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePath

from exporter.monitors.cni_config.files import Found


@dataclass(frozen=True, slots=True)
class Rule:
    """What the runtime was told."""

    runtime: str = "containerd"
    max_conf_num: int = 1
    default_network: str = ""


def active(files: Sequence[Found], rule: Rule, plugins: Mapping[str, bool]) -> set[str]:
    """Give the paths in force; `plugins` says which are there, as far as it is known."""
    if rule.runtime == "cri-o":
        return _crio(files, rule.default_network, plugins)
    first = list(islice(files, rule.max_conf_num or None))
    return {found.path for found in first} if all(_loads(found) for found in first) else set()


def _loads(found: Found) -> bool:
    """Whether libcni takes the file; for one that only we may not read, the answer is yes."""
    return found.configuration.loads or not found.readable


def _crio(files: Iterable[Found], default_network: str, plugins: Mapping[str, bool]) -> set[str]:
    for found in files:
        configuration = found.configuration
        if not _loads(found) or not all(plugins.get(plugin, True) for plugin in configuration.plugins):
            continue
        name = configuration.network or PurePath(found.path).name
        if default_network in ("", name):
            return {found.path}
    return set()
