"""What a CNI configuration says: network, version, plugins, address pools; and whether a runtime can use it.

Flows in: a file's name and bytes. Flows out: a `Configuration` of what may be shown; all else of the file is dropped
here. Rules: the CNI specification 1.1, section 1; libcni/conf.go (ConfListFromBytes, ConfFromBytes), pkg/types/types.go
(PluginConf), pkg/utils (ValidateNetworkName); the `delegates` of Multus.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from exporter.monitors.cni_config.document import Invalid, Problem, parse, place
from exporter.monitors.cni_config.ipam import Pool, pools

EXTENSIONS = (".conf", ".conflist", ".json")
"""What containerd and CRI-O read (go-cni opts.go, ocicni loadNetworks); only `.conflist` is read as a list."""

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
_VERSION = re.compile(r"\d{1,9}\.\d{1,9}(\.\d{1,9})?")
_DELEGATIONS = 4  # levels of plugins within plugins that are followed
_MOST_PLUGINS = 64

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Configuration:
    """A file's configuration, valid or not."""

    network: str = ""
    version: str = ""
    plugins: tuple[str, ...] = ()
    """Types in order, those that another plugin delegates to behind it; without the address plugins."""
    binaries: frozenset[str] = frozenset()
    """Every plugin that is run: the above and the address plugins (`ipam.type`)."""
    pools: tuple[Pool, ...] = ()
    problem: Problem | None = None
    """What is wrong, the first thing that is."""
    loads: bool = False
    """Whether libcni loads it; it may, and still be of no use, as when it has no name."""


@dataclass(slots=True)
class _Reading:
    """A document that is being judged: gathers what is shown, and what keeps a runtime from using it."""

    text: str
    problem: Problem | None = None
    plugins: list[str] = field(default_factory=list)
    binaries: set[str] = field(default_factory=set)
    pools: list[Pool] = field(default_factory=list)

    def note(self, problem: str, path: Path) -> None:
        """Keep the first problem, with its place."""
        if self.problem is None:
            self.problem = Problem(problem, *place(self.text, path))

    def refuse(self, problem: str, path: Path) -> Invalid:
        """Make an error of what libcni does not load."""
        return Invalid(Problem(problem, *place(self.text, path)))


def read(name: str, content: bytes, *, part: bool = False) -> Configuration:
    """Judge a file; never raises. A `.conflist` is a list, every other file one plugin: so both runtimes have it.

    `part`: it lies in a subdirectory, where libcni 1.3 looks for plugins of the network that the directory is named
    after; these need neither name nor version.
    """
    reading = _Reading(content.decode("utf-8", "replace"))
    network = version = ""
    try:
        document = parse(reading.text)
        if not isinstance(document, dict):
            raise reading.refuse("not a JSON object", ())
        if name.endswith(".conflist"):
            network, version = _list(reading, document)
        else:
            network, version = _plugin(reading, document, ())
        if not part:
            _head(reading, network, version)
    except Invalid as error:
        return Configuration(network, version, problem=error.problem)
    return Configuration(
        network,
        version,
        tuple(reading.plugins),
        frozenset(reading.binaries),
        tuple(reading.pools),
        reading.problem,
        loads=True,
    )


def _head(reading: _Reading, network: str, version: str) -> None:
    """Note what the specification asks for and libcni finds out only when a pod is made."""
    if not network:
        reading.note("has no name", ())
    elif not _NAME.fullmatch(network):
        reading.note("the name has characters that a network's name must not have", ("name",))
    if not version:
        reading.note("has no cniVersion", ())
    elif not _VERSION.fullmatch(version):
        reading.note("cniVersion is no version", ("cniVersion",))


def _list(reading: _Reading, document: Mapping[str, Any]) -> tuple[str, str]:
    """Read a list; its own keys are taken as they are written."""
    if "name" not in document:
        raise reading.refuse("has no name", ())
    for key in ("name", "cniVersion"):
        if key in document and not isinstance(document[key], str):
            raise reading.refuse(f"{key} is no text", (key,))
    if "plugins" not in document:
        raise reading.refuse("has no plugins", ())
    plugins = document["plugins"]
    if not isinstance(plugins, list) or not plugins:
        raise reading.refuse("plugins is empty" if plugins == [] else "plugins is no list", ("plugins",))
    network = document["name"]
    for index, plugin in enumerate(plugins):
        path: Path = ("plugins", index)
        if plugin is not None and not isinstance(plugin, dict):
            raise reading.refuse("a plugin is no JSON object", path)
        _plugin(reading, plugin or {}, path, network)
    return network, document.get("cniVersion", "")


def _plugin(reading: _Reading, plugin: Mapping[str, Any], path: Path, network: str = "") -> tuple[str, str]:
    """Read a plugin's configuration; Go finds its keys in whatever case they are written."""
    fields = {key.lower(): (key, value) for key, value in plugin.items() if value is not None}
    texts = {}
    for name in ("name", "cniVersion", "type"):
        key, value = fields.get(name.lower(), (name, ""))
        if not isinstance(value, str):
            raise reading.refuse(f"{name} is no text", (*path, key))
        texts[name] = value
    if not texts["type"]:
        raise reading.refuse("a plugin has no type" if path else "has no type", path)
    _check_parts(reading, fields, path)
    if "/" in texts["type"]:
        reading.note("the type of a plugin is no file name", (*path, fields["type"][0]))
    network = network or texts["name"]
    for kind, config in _with_delegates(texts["type"], plugin, 0):
        _gather(reading, kind, config, str(config.get("name") or network))
    return texts["name"], texts["cniVersion"]


def _check_parts(reading: _Reading, fields: Mapping[str, tuple[str, Any]], path: Path) -> None:
    """Refuse the parts that Go cannot put into its struct PluginConf."""
    for name in ("ipam", "dns", "capabilities", "prevresult"):
        key, value = fields.get(name, (name, {}))
        if not isinstance(value, dict):
            raise reading.refuse(f"{name} is no JSON object", (*path, key))
    key, capabilities = fields.get("capabilities", ("", {}))
    wrong = [name for name, value in capabilities.items() if value is not None and not isinstance(value, bool)]
    if wrong:
        raise reading.refuse("a capability is neither true nor false", (*path, key, wrong[0]))
    key, ipam = fields.get("ipam", ("", {}))
    if not isinstance(ipam.get("type") or "", str):
        raise reading.refuse("the type of ipam is no text", (*path, key, "type"))
    key, dns = fields.get("dns", ("", {}))
    for name, value in dns.items():
        many = name.lower() in ("nameservers", "search", "options")
        if many and not (value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value))):
            raise reading.refuse(f"dns {name.lower()} is no list of texts", (*path, key, name))


def _with_delegates(kind: str, plugin: Mapping[str, Any], depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Give a plugin and those it hands over to: Multus' `delegates`, Flannel's `delegate` (a bridge if not said)."""
    yield kind, plugin
    if depth >= _DELEGATIONS:
        return
    handed: list[Any] = [plugin.get("delegate")]
    if kind == "flannel":
        own = handed.pop()
        handed.append({"type": "bridge", **own} if isinstance(own, dict) else {"type": "bridge"})
    if isinstance(plugin.get("delegates"), list):
        handed += plugin["delegates"]
    for delegate in handed:
        if not isinstance(delegate, dict):
            continue
        inner = delegate.get("plugins")
        for one in inner if isinstance(inner, list) else [delegate]:
            if isinstance(one, dict) and isinstance(one.get("type"), str) and one["type"]:
                named = {"name": delegate.get("name"), **one}
                yield from _with_delegates(one["type"], named, depth + 1)


def _gather(reading: _Reading, kind: str, plugin: Mapping[str, Any], network: str) -> None:
    if len(reading.plugins) >= _MOST_PLUGINS:
        return
    reading.plugins.append(kind)
    reading.binaries.add(kind)
    ipam = plugin.get("ipam")
    if isinstance(ipam, dict) and isinstance(ipam.get("type"), str) and ipam["type"]:
        reading.binaries.add(ipam["type"])
    if _NAME.fullmatch(network) and (found := pools(network, plugin)):
        reading.binaries.add("host-local")
        reading.pools += found
