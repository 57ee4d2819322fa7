"""CNI configurations as plain files: what they say, which is active, how full the pools are, what changed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorder import Recorder

from exporter.contract import Paths, Unsupported
from exporter.monitors.cni_config import Settings, monitor
from exporter.monitors.cni_config.active import Rule, active
from exporter.monitors.cni_config.configuration import Configuration, read
from exporter.monitors.cni_config.document import place
from exporter.monitors.cni_config.files import Found, Reader
from exporter.monitors.cni_config.inotify import InotifySource, Refusal
from exporter.monitors.cni_config.ipam import pools
from exporter.monitors.cni_config.plugins import available
from exporter.monitors.cni_config.polling import PollingSource
from exporter.monitors.cni_config.records import Records
from exporter.monitors.cni_config.watches import lookups

Config = dict[str, Any]


def conflist(*kinds: str, name: str = "net", **more: object) -> bytes:
    """Write a list of plugins."""
    plugins = [{"type": kind} for kind in kinds]
    return json.dumps({"cniVersion": "1.0.0", "name": name, "plugins": plugins, **more}).encode()


def conf(kind: str = "bridge", **more: object) -> bytes:
    """Write a single plugin."""
    return json.dumps({"cniVersion": "1.0.0", "name": "net", "type": kind, **more}).encode()


class Host:
    """A configuration directory and a directory of plugins, watched by polling."""

    def __init__(self, root: Path) -> None:
        self.net, self.bin = root / "net.d", root / "bin"
        self.context = Recorder(Paths())
        self.now = 1000.0
        self.settings = Settings((str(self.net),), (str(self.bin),))

    def plugins(self, *names: str) -> None:
        self.bin.mkdir(exist_ok=True)
        for name in names:
            (self.bin / name).touch(0o755)

    def write(self, name: str, content: bytes) -> Path:
        path = self.net / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def start(self, **settings: Any) -> PollingSource:  # noqa: ANN401 - of several types
        """Open a source and look for the first time."""
        self.records = Records(Settings(**{**self._as_dict(), **settings}), clock=lambda: self.now)
        source = PollingSource(self.records)
        source.open(self.context)
        source.update()
        return source

    def family(self, name: str) -> dict[tuple[str, ...], float]:
        return self.context.families.snapshots.get(name, {})

    def active(self) -> list[str]:
        return [Path(key[0]).name for key, value in self.family("cni_config_active").items() if value]

    def changes(self) -> dict[str, float]:
        counted = self.family("cni_config_changes_total")
        return {operation: value for (_, operation), value in counted.items() if value}

    def _as_dict(self) -> dict[str, Any]:
        return {"directories": self.settings.directories, "bin_directories": self.settings.bin_directories}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


# What a configuration says


@pytest.mark.parametrize(
    "kind",
    [
        *("bridge", "ptp", "macvlan", "ipvlan", "calico", "cilium-cni", "weave-net", "aws-cni"),
        *("azure-vnet", "multus", "ovn-k8s-cni-overlay", "istio-cni", "something-of-ours"),
    ],
)
def test_a_plugin_is_known_by_its_type(kind: str) -> None:
    """In a single configuration and in a list, whatever the type."""
    for found in (read("10-a.conf", conf(kind)), read("10-a.json", conf(kind)), read("a.conflist", conflist(kind))):
        assert found == Configuration("net", "1.0.0", (kind,), frozenset({kind}), loads=True)


def test_plugins_are_in_the_order_of_the_list_with_the_address_plugin_among_the_binaries() -> None:
    """A chain is shown as it runs; libcni starts the address plugin too."""
    plugins = [{"type": "calico", "ipam": {"type": "calico-ipam"}}, {"type": "portmap"}, {"type": "bandwidth"}]
    found = read("10.conflist", json.dumps({"cniVersion": "0.3.1", "name": "k8s", "plugins": plugins}).encode())
    assert found.plugins == ("calico", "portmap", "bandwidth")
    assert found.binaries == {"calico", "calico-ipam", "portmap", "bandwidth"}


def test_delegates_of_multus_and_flannel_are_plugins_too() -> None:
    """Multus' delegates are configurations or lists; their pools belong to the network of their own name."""
    ipam = {"type": "host-local", "subnet": "10.0.0.0/24"}
    delegates = [
        {"name": "inner", "plugins": [{"type": "bridge", "ipam": ipam}, {"type": "portmap"}]},
        {"type": "flannel", "delegate": {"type": "ipvlan"}},
        "no delegate",
    ]
    found = read("00-multus.conf", conf("multus", delegates=delegates, kubeconfig="/etc/cni/net.d/multus.d/k"))
    assert found.plugins == ("multus", "bridge", "portmap", "flannel", "ipvlan")
    assert found.binaries == {*found.plugins, "host-local"}
    assert [pool.network for pool in found.pools] == ["inner", "net"]
    bare = read("10-flannel.conf", conf("flannel"))
    assert (bare.plugins, bare.binaries) == (("flannel", "bridge"), {"flannel", "bridge", "host-local"})


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.conf", '{\n  "type" "bridge"\n}', "(line 2, column 10)"),
        ("a.conf", '{"type": NaN}', "a number that no runtime reads"),
        ("a.conf", '{"mtu": ' + "9" * 5000 + "}", "a number that no runtime reads"),
        ("a.conf", "\ufeff{}", "(line 1, column 1)"),
        ("a.conf", "", "(line 1, column 1)"),
        ("a.conf", "[]", "not a JSON object (line 1, column 1)"),
        ("a.conf", '{"cniVersion": "1.0.0", "name": "a"}', "has no type (line 1, column 1)"),
        ("a.conf", '{"name": "a",\n "type": 7}', "type is no text (line 2, column 10)"),
        ("a.conf", '{"type": "a",\n "ipam": []}', "ipam is no JSON object (line 2, column 10)"),
        ("a.conf", '{"type": "a", "ipam": {"type": 1}}', "the type of ipam is no text (line 1, column 32)"),
        ("a.conf", '{"type": "a", "dns": {"search": "x"}}', "dns search is no list of texts (line 1, column 33)"),
        ("a.conf", '{"type": "a", "capabilities": {"x": 1}}', "a capability is neither true nor false"),
        ("a.conflist", '{"plugins": []}', "has no name (line 1, column 1)"),
        ("a.conflist", '{"name": "a"}', "has no plugins (line 1, column 1)"),
        ("a.conflist", '{"name": "a",\n\n "plugins": []}', "plugins is empty (line 3, column 13)"),
        ("a.conflist", '{"name": "a", "plugins": {}}', "plugins is no list (line 1, column 26)"),
        ("a.conflist", '{"name": "a", "cniVersion": 1, "plugins": []}', "cniVersion is no text (line 1, column 29)"),
        (
            "a.conflist",
            '{"name": "a", "plugins": [{"type": "b"}, 3]}',
            "a plugin is no JSON object (line 1, column 42)",
        ),
        ("a.conflist", '{"name": "a", "plugins": [{"type": "b"},\n {}]}', "a plugin has no type (line 2, column 2)"),
        ("a.conflist", '{"name": "a", "plugins": [null]}', "a plugin has no type (line 1, column 27)"),
        ("a.conflist", '{"type": "bridge", "name": "a"}', "has no plugins (line 1, column 1)"),
    ],
)
def test_what_no_runtime_loads_is_told_with_its_place(name: str, text: str, problem: str) -> None:
    """Line and column are those of the value that is wrong, as an editor counts them."""
    found = read(name, text.encode())
    assert problem in str(found.problem)
    assert not found.loads


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"type": "a", "cniVersion": "1.0.0"}', "has no name (line 1, column 1)"),
        (
            '{"type": "a",\n "name": "a b", "cniVersion": "1.0.0"}',
            "characters that a network's name must not have (line 2",
        ),
        ('{"type": "a", "name": "a"}', "has no cniVersion (line 1, column 1)"),
        ('{"type": "a", "name": "a", "cniVersion": "one"}', "cniVersion is no version (line 1, column 42)"),
        (
            '{"type": "a/b", "name": "a", "cniVersion": "1.0.0"}',
            "the type of a plugin is no file name (line 1, column 10)",
        ),
    ],
)
def test_what_is_loaded_and_of_no_use_is_invalid(text: str, problem: str) -> None:
    """Only when a pod is to be made does libcni find these out."""
    found = read("a.conf", text.encode())
    assert problem in str(found.problem)
    assert found.loads


def test_keys_of_a_plugin_may_be_written_in_any_case() -> None:
    """Go's decoder of structures takes them so; a list's own keys it does not."""
    assert read("a.conf", b'{"CNIVersion": "1.0.0", "NAME": "a", "Type": "bridge"}').problem is None
    assert str(read("a.conflist", b'{"Name": "a", "plugins": []}').problem).startswith("has no name")


def test_of_a_key_that_is_there_twice_the_last_is_in_force_and_is_shown() -> None:
    """As with Go; a problem's place is that of the last."""
    found = read("a.conf", b'{"type": "a",\n"type": 1}')
    assert str(found.problem) == "type is no text (line 2, column 9)"


def test_bytes_that_are_no_utf8_are_replaced() -> None:
    """As with Go: the file is loaded."""
    assert read("a.conf", b'{"cniVersion": "1.0.0", "name": "a", "type": "b", "x": "\xff"}').problem is None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def _paths(value: object) -> list[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [()] + [(key, *path) for key, inner in items for path in _paths(inner)]


@given(_JSON, st.sampled_from([None, 1]))
def test_the_place_of_every_value_of_any_document_is_found(value: object, indent: int | None) -> None:
    """What stands at the place that is given is the value."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    for path in _paths(value):
        line, column = place(text, path)
        found = json.JSONDecoder().raw_decode(text, starts[line - 1] + column - 1)[0]
        expected: Any = value
        for step in path:
            expected = expected[step]
        assert found == expected


# Which file is active


def files(**contents: bytes) -> list[Found]:
    """Make files in the order given; `__` stands for a dot."""
    names = {name.replace("__", "."): content for name, content in contents.items()}
    return [Found(f"/net.d/{name}", read(name, content)) for name, content in names.items()]


def names(paths: set[str]) -> set[str]:
    return {Path(path).name for path in paths}


@pytest.mark.parametrize(
    ("contents", "containerd", "crio"),
    [
        ({"a__conf": conf(), "b__conflist": conflist("ptp")}, {"a.conf"}, {"a.conf"}),
        ({"a__conf": b"{", "b__conflist": conflist("ptp")}, set(), {"b.conflist"}),
        ({"a__conf": conflist("ptp"), "b__conflist": conflist("ptp")}, set(), {"b.conflist"}),
        ({"a__conf": conf(cniVersion=None)}, {"a.conf"}, {"a.conf"}),
        ({"a__conf": conf("absent"), "b__json": conf()}, {"a.conf"}, {"b.json"}),
        ({}, set(), set()),
    ],
)
def test_runtimes_choose_by_their_own_rules(contents: dict[str, bytes], containerd: set[str], crio: set[str]) -> None:
    """A file that does not load stops containerd; CRI-O passes over it, and over one whose plugin is not there."""
    plugins = {"bridge": True, "ptp": True, "absent": False}
    found = files(**contents)
    assert names(active(found, Rule("containerd"), plugins)) == containerd
    assert names(active(found, Rule("cri-o"), plugins)) == crio


def test_containerd_uses_as_many_as_it_is_told() -> None:
    """`max_conf_num`; 0 means all, and then all of them must load."""
    found = files(a__conf=conf(), b__conf=conf(), c__conf=b"{")
    assert names(active(found, Rule(max_conf_num=2), {})) == {"a.conf", "b.conf"}
    assert active(found, Rule(max_conf_num=0), {}) == set()
    assert len(active(found[:2], Rule(max_conf_num=0), {})) == 2


def test_crio_uses_the_network_that_it_is_told() -> None:
    """The first of that name; one without a name has the file's."""
    found = files(a__conf=conf(), b__conf=conf(name="other"), c__conf=conf(name="other"), d__conf=conf(name=None))
    assert names(active(found, Rule("cri-o", default_network="other"), {})) == {"b.conf"}
    assert names(active(found, Rule("cri-o", default_network="d.conf"), {})) == {"d.conf"}
    assert active(found, Rule("cri-o", default_network="none"), {}) == set()


@pytest.mark.parametrize(
    ("there", "runtime"),
    [((), "containerd"), (("crio",), "cri-o"), (("containerd",), "containerd"), (("crio", "containerd"), "containerd")],
)
def test_the_rule_is_that_of_the_runtime_that_is_there(tmp_path: Path, there: tuple[str, ...], runtime: str) -> None:
    """By its socket; containerd's where there are both, or none."""
    for name in there:
        (tmp_path / name).touch()
    sockets = {"cri-o": (f"{tmp_path}/crio",), "containerd": (f"{tmp_path}/containerd",)}
    assert Settings((), (), sockets=sockets).rule().runtime == runtime
    assert Settings((), (), sockets=sockets, runtime="cri-o").rule().runtime == "cri-o"


def test_files_are_taken_by_the_bytes_of_their_names(host: Host) -> None:
    """Neither by number nor by letter; hidden files count, other extensions do not."""
    for name in ("9-a.conf", "10-a.conflist", "a.json", "Z.conf", ".z.conf", "1.yaml", "0-a.conf.bak", "0.conf~"):
        host.write(name, conflist("ptp") if name.endswith("list") else conf())
    host.start()
    order = [Path(found.path).name for found in host.records.trees[0].files]
    assert order == [".z.conf", "10-a.conflist", "9-a.conf", "Z.conf", "a.json"]
    assert host.active() == [".z.conf"]


def test_files_in_subdirectories_are_shown_and_never_active(host: Host) -> None:
    """There libcni 1.3 looks for plugins, which need neither name nor version. Hidden directories are a ConfigMap's."""
    host.write("10-a.conflist", conflist("bridge"))
    host.write("net/1.conf", b'{"type": "tuning"}')
    host.write("..data/10-a.conflist", conflist("bridge"))
    host.start()
    valid = host.family("cni_config_valid")
    assert {Path(path).name: value for (path,), value in valid.items()} == {"10-a.conflist": 1.0, "1.conf": 1.0}
    assert host.active() == ["10-a.conflist"]
    assert len(host.family("cni_config_active")) == 1


def test_a_directory_under_two_names_is_read_once(host: Host, tmp_path: Path) -> None:
    """Where one configured directory is a link to another, its files are not there twice."""
    host.write("a.conf", conf())
    (tmp_path / "other").symlink_to(host.net)
    host.start(directories=(str(host.net), f"{tmp_path}/other"))
    assert len(host.family("cni_config_info")) == 1


# Plugins


def test_a_plugin_must_be_a_file_that_can_be_started(tmp_path: Path) -> None:
    """The first regular file of the name counts, as for libcni, also where a good one is behind it."""
    first, second = tmp_path / "1", tmp_path / "2"
    for directory in (first, second):
        directory.mkdir()
    (first / "plain").touch(0o644)
    (second / "plain").touch(0o755)
    (first / "directory").mkdir()
    (second / "directory").touch(0o755)
    (second / "link").symlink_to(second / "plain")
    asked = ("plain", "directory", "link", "absent", "../2/plain", "nul\0")
    found = available(asked, (str(first), str(second), f"{tmp_path}/3"))
    assert found == {**dict.fromkeys(asked, False), "directory": True, "link": True}


def test_without_a_directory_of_plugins_nothing_is_said(host: Host) -> None:
    """In a container that does not see the host's directories, no plugin is called missing."""
    host.write("a.conf", conf())
    host.start()
    assert host.family("cni_config_plugin_available") == {}
    host.plugins("ptp")
    host.start()
    assert host.family("cni_config_plugin_available") == {("bridge",): 0.0}


# Address pools


@pytest.mark.parametrize(
    ("ipam", "sizes"),
    [
        ({"subnet": "10.0.0.0/24"}, [253]),
        ({"ranges": [[{"subnet": "10.0.0.0/24"}]]}, [253]),
        ({"ranges": [[{"subnet": "10.0.0.0/24", "gateway": "10.0.0.254"}]]}, [253]),
        ({"ranges": [[{"subnet": "10.0.0.0/24", "gateway": "10.0.1.1"}]]}, [254]),
        ({"ranges": [[{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.10", "rangeEnd": "10.0.0.19"}]]}, [10]),
        ({"ranges": [[{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.0", "rangeEnd": "10.0.0.255"}]]}, [255]),
        ({"ranges": [[{"subnet": "10.0.0.0/30"}]]}, [1]),
        ({"ranges": [[{"subnet": "10.0.0.0/24"}, {"subnet": "10.0.1.0/24"}]]}, [506]),
        ({"ranges": [[{"subnet": "10.0.0.0/16"}], [{"subnet": "fd00::/64"}]]}, [65533, 2**64 - 2]),
        ({"subnet": "10.1.0.0/24", "ranges": [[{"subnet": "10.0.0.0/24"}]]}, [253, 253]),
        ({"ranges": [[{"subnet": "10.0.0.0/31"}]]}, []),
        ({"ranges": [[{"subnet": "10.0.0.1/24"}]]}, []),
        ({"ranges": [[{"subnet": "usePodCidr"}]]}, []),
        ({"ranges": [[{"subnet": "10.0.0.0/24", "rangeStart": "10.1.0.0"}]]}, []),
        ({"ranges": [[{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.9", "rangeEnd": "10.0.0.8"}]]}, []),
        ({"ranges": [[{}], ["x"], 3, []]}, []),
        ({"ranges": "x"}, []),
        ({"subnet": "10.0.0.0/24", "dataDir": "relative"}, []),
        ({"subnet": "10.0.0.0/24", "type": "dhcp"}, []),
    ],
)
def test_pools_are_as_large_as_host_local_has_them(ipam: Config, sizes: list[int]) -> None:
    """Without network, broadcast and gateway; what host-local refuses, or is told only at run time, is no pool."""
    plugin = {"type": "bridge", "ipam": {"type": "host-local", **ipam}}
    assert [pool.size for pool in pools("net", plugin)] == sizes


def test_leases_are_counted_in_their_pool(host: Host, tmp_path: Path) -> None:
    """By the names of files; those of another pool, the lock and the last address are none."""
    leases = tmp_path / "leases" / "net"
    leases.mkdir(parents=True)
    for name in ("10.0.0.2", "10.0.0.9", "10.9.0.2", "fd00::2", "last_reserved_ip.0", "lock", "10.0.0", "::x"):
        (leases / name).touch()
    sets = [[{"subnet": "10.0.0.0/29"}, {"subnet": "10.0.0.8/29"}], [{"subnet": "fd00::/64"}]]
    ipam = {"type": "host-local", "dataDir": str(leases.parent), "ranges": sets}
    host.write("a.conf", conf(ipam=ipam))
    host.write("b.conf", conf(ipam=ipam))
    host.start()
    assert host.family("cni_ipam_addresses") == {
        ("net", "10.0.0.0/29,10.0.0.8/29", "used"): 2.0,
        ("net", "10.0.0.0/29,10.0.0.8/29", "free"): 8.0,
        ("net", "fd00::/64", "used"): 1.0,
        ("net", "fd00::/64", "free"): float(2**64 - 3),
    }


def test_a_pool_whose_leases_cannot_be_listed_is_said_to_be_so(host: Host, tmp_path: Path) -> None:
    """No figure rather than a wrong one; one that nobody used yet is empty."""
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / "net").touch()
    host.write("a.conf", conf(ipam={"type": "host-local", "dataDir": f"{tmp_path}/leases", "subnet": "10.0.0.0/24"}))
    host.write("b.conf", conf(name="b", ipam={"type": "host-local", "dataDir": "/nowhere", "subnet": "10.0.0.0/24"}))
    host.start()
    assert host.context.error_kinds() == ["leases"]
    assert host.family("cni_ipam_addresses")["b", "10.0.0.0/24", "used"] == 0.0
    assert ("net", "10.0.0.0/24", "used") not in host.family("cni_ipam_addresses")


def test_flannels_pool_is_in_its_subnet_file(host: Host, tmp_path: Path) -> None:
    """What flanneld has been given for this node; until it has, there is no pool. Leases are host-local's."""
    env, leases = tmp_path / "subnet.env", tmp_path / "leases" / "cbr0"
    leases.mkdir(parents=True)
    (leases / "10.244.3.7").touch()
    content = conf("flannel", name="cbr0", subnetFile=str(env), ipam={"dataDir": str(leases.parent)})
    host.write("10-flannel.conf", content)
    source = host.start()
    assert host.family("cni_ipam_addresses") == {}
    env.write_text(
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_MTU=1450\n"
        "FLANNEL_IPV6_SUBNET=fd00:3::1/120\nFLANNEL_IPMASQ=true\n"
    )
    source.update()
    assert host.family("cni_ipam_addresses") == {
        ("cbr0", "10.244.3.0/24", "used"): 1.0,
        ("cbr0", "10.244.3.0/24", "free"): 252.0,
        ("cbr0", "fd00:3::/120", "used"): 0.0,
        ("cbr0", "fd00:3::/120", "free"): 254.0,
    }
    assert host.context.error_kinds() == []
    for wrong in ("FLANNEL_SUBNET=x", "FLANNEL_SUBNET=10.0.0.0/31"):
        env.write_text(wrong)
        source.update()
    assert host.context.error_kinds() == ["leases", "leases"]
    assert host.family("cni_ipam_addresses") == {}


# What changed


def test_what_is_there_at_the_start_is_no_change(host: Host) -> None:
    """Every counter is there from the start, at zero; the last change is when the newest file was written."""
    path = host.write("a.conf", conf())
    host.start()
    assert host.changes() == {}
    assert len(host.family("cni_config_changes_total")) == 4
    assert host.family("cni_config_last_change_timestamp_seconds") == {(str(host.net),): path.stat().st_mtime}


def _rewritten(host: Host) -> None:
    host.write("a.conf", (host.net / "a.conf").read_bytes())


def _edited(host: Host) -> None:
    host.write("a.conf", conf("ptp"))


def _renamed(host: Host) -> None:
    (host.net / "a.conf").rename(host.net / "c.conf")


def _swapped(host: Host) -> None:
    for old, new in (("a.conf", "t"), ("b.conf", "a.conf"), ("t", "b.conf")):
        (host.net / old).rename(host.net / new)


def _removed(host: Host) -> None:
    (host.net / "a.conf").unlink()


def _added(host: Host) -> None:
    host.write("c.conf", conf("macvlan"))


def _copied(host: Host) -> None:
    host.write("c.conf", (host.net / "a.conf").read_bytes())


def _others(host: Host) -> None:
    for name in ("cni.lock", ".a.conf.swp", "a.conf~", "4913", "#a.conf#"):
        host.write(name, b"x")
    (host.net / ".#a.conf").symlink_to("user@host.1:1")


@pytest.mark.parametrize(
    ("act", "counted"),
    [
        (_rewritten, {}),
        (_edited, {"modify": 1.0}),
        (_renamed, {"rename": 1.0}),
        (_swapped, {"modify": 2.0}),
        (_removed, {"delete": 1.0}),
        (_added, {"create": 1.0}),
        (_copied, {"create": 1.0}),
        (_others, {}),
    ],
)
def test_a_change_is_one_of_content(host: Host, act: Callable[[Host], None], counted: dict[str, float]) -> None:
    """Equal content, locks and editors' files are none; content under another name was renamed."""
    host.write("a.conf", conf())
    host.write("b.conf", conf("tuning"))
    source = host.start()
    host.now = 5000.0
    act(host)
    source.update()
    assert host.changes() == counted
    changed = host.family("cni_config_last_change_timestamp_seconds")[str(host.net),]
    assert (changed == 5000.0) == bool(counted)
    source.update()
    assert host.changes() == counted


def test_a_directory_that_vanishes_and_comes_back(host: Host, tmp_path: Path) -> None:
    """Its files are deleted, and created again where it comes back with them."""
    host.write("a.conf", conf())
    source = host.start()
    host.net.rename(tmp_path / "away")
    source.update()
    assert host.changes() == {"delete": 1.0}
    assert host.family("cni_config_info") == {}
    (tmp_path / "away").rename(host.net)
    source.update()
    assert host.changes() == {"delete": 1.0, "create": 1.0}
    assert host.active() == ["a.conf"]


def test_what_may_not_be_read_for_a_while_is_neither_gone_nor_invalid(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A permission that is missing says nothing about the file."""
    host.write("a.conf", conf())
    source = host.start()
    refused = PermissionError(13, "Permission denied")

    def refuse(*_: object, **__: object) -> None:
        raise refused

    monkeypatch.setattr("exporter.monitors.cni_config.reading.os.open", refuse)
    source.update()
    assert host.family("cni_config_valid") == {}
    assert host.active() == ["a.conf"]
    assert [key[1] for key in host.family("cni_config_problem_info")] == ["cannot be read: no permission"]
    monkeypatch.undo()
    source.update()
    assert host.changes() == {}
    assert host.family("cni_config_valid") == {(f"{host.net}/a.conf",): 1.0}


def test_what_has_not_changed_is_not_read_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a file is older than the coarsest time stamps; until then it might change without a trace."""
    host.write("a.conf", conf())
    opened: list[str] = []
    clock = [0.0]
    reader = Reader(clock=lambda: clock[0])
    monkeypatch.setattr("exporter.monitors.cni_config.files._read", lambda path, *_, **__: opened.append(path))
    written = (host.net / "a.conf").stat().st_mtime
    for seconds, times in ((0.5, 1), (1.5, 2), (10.0, 3), (20.0, 3), (30.0, 3)):
        clock[0] = written + seconds
        reader.trees((str(host.net),))
        assert len(opened) == times
    reader.forget()
    reader.trees((str(host.net),))
    assert len(opened) == 4


def test_problems_are_told_once_in_the_log(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """With line and column, when they come, and again when they are others."""
    host.write("a.conf", b"{")
    source = host.start()
    source.update()
    assert [record.getMessage() for record in caplog.records].count(caplog.records[0].getMessage()) == 1
    assert "line 1, column 2" in caplog.text
    host.write("a.conf", b'{"type": 1}')
    source.update()
    assert "type is no text (line 1, column 10)" in caplog.text


# What is watched


def test_every_entry_that_decides_where_a_path_leads_is_known(tmp_path: Path) -> None:
    """Parts, links and what they lead to, by the place where each is; the list ends with what is missing."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/../a/b")
    (tmp_path / "absolute").symlink_to(f"{tmp_path}/link/")
    root = str(tmp_path)
    entries, place = lookups(f"{root}/absolute/./c")
    own = [entry for entry in entries if entry[0].startswith(root)]
    assert own == [
        (root, "absolute"),
        (root, "link"),
        (root, "a"),
        (root, "a"),
        (f"{root}/a", "b"),
        (f"{root}/a/b", "c"),
    ]
    assert place == ""
    assert lookups(f"{root}/absolute//")[1] == f"{root}/a/b"
    assert ("/", root.split("/")[1]) in entries
    assert lookups("/../..") == ([], "/")


def test_links_in_a_loop_come_to_an_end(tmp_path: Path) -> None:
    """As the kernel gives up after 40, so do we; each is known, so that a change of any is heard of."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    entries, place = lookups(f"{tmp_path}/a")
    assert place == ""
    assert {(str(tmp_path), "a"), (str(tmp_path), "b")} <= set(entries)


def test_without_pyinotify_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Python 3.12 without pyasyncore. Within a minute it is not tried again."""
    monkeypatch.setitem(sys.modules, "pyinotify", None)
    refusal, now = Refusal(), [0.0]
    for moment, rests_until in ((0.0, 60.0), (59.0, 60.0), (61.0, 121.0)):
        now[0] = moment
        with pytest.raises(Unsupported) as caught:
            InotifySource(Records(Settings((), ())), refusal, clock=lambda: now[0]).open(Recorder(Paths()))
        assert "pyasyncore" in caught.value.remedy
        assert refusal.until == rests_until


def test_with_inotify_switched_off_polling_is_no_fallback() -> None:
    """It is then the best rung that there is."""
    assert len(monitor(Settings((), ()), use_inotify=False).rungs) == 1
    assert len(monitor(Settings((), ())).rungs) == 2
