"""The configuration: every layer, every error at once, and nothing but `Loaded` or `ConfigError` whatever is read."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from exporter import catalog, config, privacy
from exporter.config import PRESETS, Config, ConfigError, Loaded, load
from exporter.config.environment import SHORT_VARIABLES, variable
from exporter.config.fields import find, keys, written
from exporter.config.models import SHORT_FORMS
from exporter.config.reader import MOST_BYTES, dotted
from exporter.config.values import Duration, Size, read_duration, show_duration

Writer = Callable[..., Path]

ROOT = Path(config.__file__).parent.parent.parent


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Write a file and return its path."""

    def _write(content: str | bytes, name: str = "file.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return _write


def problems(
    path: Path | None = None, preset: str | None = None, environ: dict[str, str] | None = None, **flags: object
) -> list[str]:
    """Return the lines of the error that loading raises."""
    with pytest.raises(ConfigError) as caught:
        load(path, preset, environ or {}, flags)
    return str(caught.value).splitlines()


# --- values and layers ----------------------------------------------------------------------------------------------


def test_no_source_at_all_gives_the_defaults() -> None:
    """An empty machine has a valid configuration, and nothing claims to have set anything."""
    loaded = load(None, None, {}, {})
    assert loaded.config == Config()
    assert loaded.preset == ""
    assert loaded.sources == {}
    assert len(loaded.sha256) == 64


def test_the_names_that_must_be_accepted(write: Writer) -> None:
    """Every section and key that users write in their files today is taken, in the forms they write."""
    path = write("""
general:
  enable_container_integration: true
  enable_container_discovery: true
  enable_kubernetes_integration: false
  container_discovery_interval: 15
  enable_load_management: true
  max_events_per_second: 5000
  min_sampling_rate: 0.05
  max_sampling_rate: 1.0
container_config:
  enable_container_discovery: true
  enable_kubernetes_integration: true
  enable_namespace_isolation: true
  enable_service_mesh_support: true
  container_runtimes: [docker, containerd, cri-o]
  kubeconfig_path: ~/.kube/config
  namespace_filters: [default, "team-*", "!team-x"]
  discovery_interval: "1m30s"
  metadata_collection: true
  resource_monitoring: false
load_config:
  enable_adaptive_filtering: true
  enable_kernel_filtering: false
  enable_intelligent_sampling: true
  enable_load_balancing: true
  max_events_per_second: 20000
  min_sampling_rate: 0.01
  max_sampling_rate: 1
  load_thresholds: {low: 1000, medium: 10000, high: 50000, critical: 100000}
  adaptation_interval: "5s"
  cpu_threshold: 80.0
  memory_threshold: 1073741824
  priority_filters:
    - name: dns
      priority: critical
      patterns: ["port 53", "^dns"]
      sampling_rate: 1.0
      enabled: true
cni_config:
  config_paths: [/etc/cni/net.d]
  bin_paths: [/opt/cni/bin]
  use_ebpf: true
  use_inotify: true
  use_k8s_informer: true
  poll_interval: 30s
""")
    found = load(path, None, {}, {}).config
    assert found.container_config.discovery_interval == 90.0
    assert found.load_config.max_events_per_second == 20000
    assert found.load_config.memory_threshold == 2**30
    assert found.load_config.priority_filters[0].patterns == ("port 53", "^dns")
    assert found.container_config.kubeconfig_path == Path("~/.kube/config")
    assert not found.kubernetes


def test_each_layer_wins_over_the_one_below(write: Writer) -> None:
    """Defaults, preset, file, environment, flags: each key comes from the highest layer that sets it, and says so."""
    path = write("preset: production\nlog: {level: warning}\nweb:\n  max_connections: 7\n  listen_address: :1\n")
    environ = {"CNI_EXPORTER_LOG_LEVEL": "error", "CNI_EXPORTER_WEB_LISTEN_ADDRESS": ":2"}
    loaded = load(path, None, environ, {"web.listen_address": ":3", "log.format": None})
    assert loaded.preset == "production"
    assert loaded.config.log.format == "json"
    assert loaded.config.web.max_connections == 7
    assert loaded.config.log.level == "error"
    assert loaded.config.web.listen_address == ":3"
    assert loaded.sources["log.format"].endswith("deploy/config/production.yaml:33")
    assert loaded.sources["web.max_connections"] == f"{path}:4"
    assert loaded.sources["log.level"] == "environment CNI_EXPORTER_LOG_LEVEL"
    assert loaded.sources["web.listen_address"] == "flag --web.listen-address"
    assert "cni_config.use_ebpf" not in loaded.sources


def test_the_preset_of_the_highest_layer_is_taken(write: Writer) -> None:
    """Command line over environment over file."""
    path = write("preset: minimal")
    assert load(path, None, {}, {}).preset == "minimal"
    assert load(path, None, {"CNI_EXPORTER_PRESET": "production"}, {}).preset == "production"
    assert load(path, "development", {"CNI_EXPORTER_PRESET": "production"}, {}).preset == "development"


def test_mappings_are_merged_and_lists_replaced(write: Writer) -> None:
    """One threshold or limit may be set without writing the others; a list is what its highest layer says."""
    path = write("load_config: {load_thresholds: {low: 5}}\nmetrics: {series_limits: {cni_veths: 3}}\n")
    environ = {
        "CNI_EXPORTER_METRICS_SERIES_LIMITS": '{"cni_veth_info": 4}',
        "CNI_EXPORTER_CNI_CONFIG_CONFIG_PATHS": "/a, /b",
    }
    found = load(path, None, environ, {}).config
    assert found.load_config.load_thresholds.low == 5
    assert found.load_config.load_thresholds.medium == 10_000
    assert found.metrics.series_limits == {"cni_veths": 3, "cni_veth_info": 4}
    assert found.cni_config.config_paths == (Path("/a"), Path("/b"))


def test_short_forms_stand_for_the_keys_of_other_sections(write: Writer) -> None:
    """Within a layer the section's own key wins, between layers the higher layer."""
    low = write("general: {max_events_per_second: 5}\nload_config: {max_events_per_second: 6}\n")
    assert load(low, None, {}, {}).config.load_config.max_events_per_second == 6
    environ = {"CNI_EXPORTER_GENERAL_MAX_EVENTS_PER_SECOND": "7"}
    loaded = load(low, None, environ, {})
    assert loaded.config.load_config.max_events_per_second == 7
    assert loaded.sources["load_config.max_events_per_second"] == f"environment {next(iter(environ))}"
    assert (
        load(
            None, "production", {}, {"general.container_discovery_interval": "9s"}
        ).config.container_config.discovery_interval
        == 9
    )
    assert all(find(Config, key) for key in SHORT_FORMS.values())


@pytest.mark.parametrize("key", [key for key, _ in keys(Config)], ids=dotted)
def test_every_key_can_be_set_by_its_variable(key: tuple[str, ...]) -> None:
    """What a key holds by default, written into its variable, is accepted and changes nothing."""
    found = find(Config, key)
    value: Any = Config()
    for part in key:
        value = getattr(value, part)
    assert found is not None
    if value is None:
        value = {"preset": "minimal", "kubeconfig_path": "/x", "config_file": "/x"}.get(
            key[-1], 1.0 if "rate" in key[-1] else 1
        )
    shown = written(found, value)
    text = shown if isinstance(shown, str) else json.dumps(shown)
    loaded = load(None, None, {variable(key): text}, {})
    after: Any = loaded.config
    for part in key:
        after = getattr(after, part)
    assert str(after) == str(value) or after == value


def test_variables_have_names_of_their_own() -> None:
    """No two keys share a variable."""
    names = [variable(key) for key, _ in keys(Config)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("CNI_EXPORTER_GENERAL_ENABLE_LOAD_MANAGEMENT", "off", False),
        ("CNI_EXPORTER_GENERAL_ENABLE_LOAD_MANAGEMENT", "1", True),
        ("CNI_EXPORTER_WEB_MAX_CONNECTIONS", " 7 ", 7),
        ("CNI_EXPORTER_LOAD_CONFIG_MIN_SAMPLING_RATE", "5e-2", 0.05),
        ("CNI_EXPORTER_WEB_SCRAPE_TIMEOUT", "250ms", 0.25),
        ("CNI_EXPORTER_WEB_SCRAPE_TIMEOUT", "2", 2.0),
        ("CNI_EXPORTER_LOAD_CONFIG_MEMORY_THRESHOLD", "512Mi", 2**29),
        ("CNI_EXPORTER_PRIVACY_ENVIRONMENT", "A,B*,", ("A", "B*")),
        ("CNI_EXPORTER_PRIVACY_ENVIRONMENT", '["A,B"]', ("A,B",)),
        ("CNI_EXPORTER_PRIVACY_CONTAINER_LABELS", "[]", ()),
        ("CNI_EXPORTER_WEB_MAX_CONNECTIONS", "", 512),
        ("CNI_EXPORTER_CONTAINER_CONFIG_DOCKER_SOCKET", "/run/d.sock", (Path("/run/d.sock"),)),
    ],
)
def test_variables_are_read_as_their_key_asks(name: str, text: str, expected: object) -> None:
    """Switches, numbers, durations, sizes, lists; an empty variable is one that is not set."""
    found = load(None, None, {name: text}, {}).config
    values = {variable(key): getattr(getattr(found, key[0]), key[1]) for key, _ in keys(Config) if len(key) == 2}
    assert values[name] == expected


def test_variables_without_prefix() -> None:
    """The two short variables work, and the one with the prefix wins over them."""
    off = {"ENABLE_CONTAINER_INTEGRATION": "false", "ENABLE_KUBERNETES_INTEGRATION": "no"}
    found = load(None, None, off, {}).config
    assert not found.kubernetes
    assert not found.container_discovery
    again = load(None, None, {**off, "CNI_EXPORTER_GENERAL_ENABLE_KUBERNETES_INTEGRATION": "true"}, {}).config
    assert again.kubernetes
    assert set(SHORT_VARIABLES) == set(off)


@pytest.mark.parametrize(
    "name",
    [
        "CNI_EXPORTER_SERVICE_HOST",
        "CNI_EXPORTER_SERVICE_PORT",
        "CNI_EXPORTER_SERVICE_PORT_METRICS",
        "CNI_EXPORTER_PORT",
        "CNI_EXPORTER_PORT_10266_TCP",
        "CNI_EXPORTER_PORT_10266_TCP_ADDR",
        "CNI_EXPORTER_CLUSTER_SERVICE_HOST",
        "CNI_EXPORTER_CLUSTER_PORT_10266_TCP_PROTO",
        "UNRELATED",
    ],
)
def test_variables_that_kubernetes_sets_are_let_be(name: str) -> None:
    """A Service called cni-exporter in the namespace must not keep the exporter from starting."""
    assert load(None, None, {name: "tcp://10.0.0.1:10266"}, {}).config == Config()


def test_the_hash_is_of_the_meaning(write: Writer) -> None:
    """The same meaning has the same hash in whatever way it is said; another meaning has another."""
    one = load(write("web: {request_timeout: 90}", "a.yaml"), None, {}, {})
    other = load(write('{"web": {"request_timeout": "1m30s"}}', "b.json"), None, {}, {})
    short = load(None, None, {"CNI_EXPORTER_GENERAL_MAX_SAMPLING_RATE": "0.5"}, {})
    long = load(None, None, {"CNI_EXPORTER_LOAD_CONFIG_MAX_SAMPLING_RATE": "0.5"}, {})
    assert one.sha256 == other.sha256
    assert short.sha256 == long.sha256
    assert len({one.sha256, short.sha256, load(None, None, {}, {}).sha256}) == 3


# --- meaning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["general", "container_config"])
@pytest.mark.parametrize("feature", ["kubernetes", "container_discovery"])
def test_a_feature_with_two_switches_needs_both(section: str, feature: str) -> None:
    """Either switch turns it off."""
    key = {"kubernetes": "enable_kubernetes_integration", "container_discovery": "enable_container_discovery"}[feature]
    assert Config().features[feature]
    assert not load(None, None, {}, {f"{section}.{key}": False}).config.features[feature]


def test_runtimes_are_asked_when_named_and_discovery_is_on() -> None:
    """A runtime that is not listed is not asked; without discovery none is."""
    found = load(None, None, {}, {"container_config.container_runtimes": "docker"}).config
    assert found.runtime_enabled("docker")
    assert not found.runtime_enabled("cri-o")
    off = load(None, None, {}, {"general.enable_container_integration": "false"}).config
    assert not off.runtime_enabled("docker")


@pytest.mark.parametrize(
    ("filters", "admitted", "left_out"),
    [
        ("", ["a", ""], []),
        ("team-*", ["team-a", ""], ["kube-system"]),
        ("!kube-*", ["team-a", ""], ["kube-system"]),
        ("team-*,!team-x", ["team-a"], ["team-x", "b"]),
    ],
)
def test_namespace_filters(filters: str, admitted: list[str], left_out: list[str]) -> None:
    """Globs admit, globs with `!` leave out, and what is in no Kubernetes namespace is never filtered."""
    found = load(None, None, {}, {"container_config.namespace_filters": filters}).config.container_config
    assert all(found.admits_namespace(name) for name in admitted)
    assert not any(found.admits_namespace(name) for name in left_out)


def test_the_address_is_taken_apart() -> None:
    """The server binds to host and port, brackets of IPv6 removed."""
    for address, host, port in [(":10266", "", 10266), ("[::1]:0", "::1", 0), ("localhost:9", "localhost", 9)]:
        web = load(None, None, {}, {"web.listen_address": address}).config.web
        assert (web.host, web.port) == (host, port)


@settings(deadline=None)
@given(st.integers(0, 10**9))
def test_durations_are_read_as_they_are_shown(milliseconds: int) -> None:
    """Writing and reading a duration is the identity."""
    seconds = milliseconds / 1000
    assert read_duration(show_duration(seconds)) == seconds


@settings(deadline=None)
@given(st.integers(2**24, 2**46))
def test_sizes_are_read_as_they_are_shown(size: int) -> None:
    """Writing and reading a size is the identity."""
    kind = Size("16MiB", "64TiB")
    assert kind.read(kind.show(size)) == size


@pytest.mark.parametrize("text", ["30s", "500ms", "1m30s", "0.5h", "1d", "15", 15, 0.5, "1h0m5s"])
def test_durations(text: object) -> None:
    """Texts with units and plain numbers of seconds."""
    assert Duration("0s", "10d").read(text) > 0


# --- errors ---------------------------------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_said_at_once(write: Writer) -> None:
    """File, line, key, what is wrong and what to write instead, for every problem of every layer, in order."""
    path = write("""\
general:
  enable_container_discovry: true
  min_sampling_rate: 0.5
container_config:
  discovery_interval: "3x"
  discovery_interval: 30s
  namespace_filters: a
  container_runtimes: [docker, crio]
load_config:
  cpu_threshold: 180
  max_sampling_rate: 0.1
  memory_threshold: 1GiX
  load_thresholds: {low: 10, medium: 5}
  priority_filters:
    - patterns: ["("]
      extra: 1
log: {level: loud}
web:
  max_connections: many
  max_events_per_second: 5
  listen_address:
metrics: {series_limits: {cni_vth: 2}}
privacy: []
""")
    environ = {"CNI_EXPORTER_LOG_LEVL": "x", "CNI_EXPORTER_LOAD_CONFIG_LOAD_THRESHOLDS": "{"}
    found = problems(path, None, environ, **{"general.role": "nod"})
    level = 'write "debug" or "info" or "warning" or "error"'
    address = 'write for example ":10266", "127.0.0.1:10266" or "[::1]:10266"'
    thresholds = "let the thresholds ascend: low, medium, high, critical"
    pattern = "missing ), unterminated subpattern at position 0"
    assert found == [
        f"{path}:2: general.enable_container_discovry: is no known key; did you mean enable_container_discovery?",
        f'{path}:5: container_config.discovery_interval: "3x" is no duration; write for example "30s"',
        f"{path}:6: container_config.discovery_interval: is written twice (first in line 5); remove one of the two",
        f'{path}:7: container_config.namespace_filters: "a" is no list; write for example ["first", "second"]',
        f'{path}:8: container_config.container_runtimes[1]: "crio" is not known here; did you mean "cri-o"?',
        f"{path}:10: load_config.cpu_threshold: 180 is out of range; write 1 to 100",
        f'{path}:12: load_config.memory_threshold: "1GiX" is no size; write for example "1GiB" or a number of bytes',
        f"{path}:15: load_config.priority_filters[0].name: is missing; write name: and a value",
        f'{path}:15: load_config.priority_filters[0].patterns[0]: "(" is no regular expression ({pattern}); '
        'write for example "^veth"',
        f"{path}:16: load_config.priority_filters[0].extra: is no known key; remove it, or look it up in the reference "
        "of the configuration",
        f'{path}:17: log.level: "loud" is not known here; {level}',
        f'{path}:19: web.max_connections: "many" is no whole number; write for example 1000',
        f"{path}:20: web.max_events_per_second: is no known key; did you mean general.max_events_per_second?",
        f"{path}:21: web.listen_address: an empty value is no address; {address}",
        f'{path}:22: metrics.series_limits.cni_vth: "cni_vth" is no metric family; did you mean "cni_veths"?',
        f"{path}:23: privacy: a list is no mapping; write its keys below it, indented, or {{}}",
        "environment CNI_EXPORTER_LOAD_CONFIG_LOAD_THRESHOLDS: load_config.load_thresholds: is no JSON; "
        'write for example {"low": 1000}',
        "environment CNI_EXPORTER_LOG_LEVL: sets no known key; did you mean CNI_EXPORTER_LOG_LEVEL?",
        'flag --role: general.role: "nod" is not known here; did you mean "node"?',
        f"{path}:3: load_config.min_sampling_rate: min_sampling_rate 0.5 is above max_sampling_rate 0.1; "
        "raise the one or lower the other",
        f"{path}:13: load_config.load_thresholds.low: low 10 is not below medium 5; {thresholds}",
    ]


def test_a_problem_has_its_parts(write: Writer) -> None:
    """A program can read file, line and key of a problem."""
    path = write("log:\n  level: loud\n")
    with pytest.raises(ConfigError) as caught:
        load(path, None, {}, {})
    (problem,) = caught.value.problems
    assert (problem.where.file, problem.where.line, problem.key) == (str(path), 2, "log.level")
    assert problem.wrong == '"loud" is not known here'
    assert problem.instead.startswith("write ")


def test_a_conflict_between_layers_is_told_where_the_higher_one_stands(write: Writer) -> None:
    """File and environment are right by themselves and wrong together."""
    path = write("load_config: {max_sampling_rate: 0.1}")
    environ = {"CNI_EXPORTER_LOAD_CONFIG_MIN_SAMPLING_RATE": "0.5"}
    (line,) = problems(path, None, environ)
    assert line.startswith("environment CNI_EXPORTER_LOAD_CONFIG_MIN_SAMPLING_RATE: load_config.min_sampling_rate: ")


def test_a_wrong_value_is_told_even_where_a_higher_layer_hides_it(write: Writer) -> None:
    """What is hidden today is in force tomorrow."""
    assert len(problems(write("log: {level: loud}"), None, {"CNI_EXPORTER_LOG_LEVEL": "info"})) == 1


def test_a_conflict_with_a_value_that_is_wrong_already_is_not_told(write: Writer) -> None:
    """One mistake gives one line."""
    assert len(problems(write("load_config: {load_thresholds: {low: x, medium: 500}}"))) == 1
    assert len(problems(write("general: {max_sampling_rate: x}\nload_config: {min_sampling_rate: 1}"))) == 1


def test_two_rules_of_one_name_are_refused(write: Writer) -> None:
    """Their metrics could not be told apart."""
    (line,) = problems(write("load_config:\n  priority_filters: [{name: a}, {name: a}]"))
    assert line.split(": ", 1)[1] == 'load_config.priority_filters: two rules are called "a"; rename one'


@pytest.mark.parametrize(
    ("kind", "subject", "instead"),
    [
        ("pid", "-1", "write a whole number, 0 to 4194304"),
        ("port", "70000", "write a whole number, 0 to 65535"),
        ("syscall", "open", "write a whole number, 0 to 1023"),
        ("command", "sixteen-letters!", "write at most 15 bytes"),
        ("address", "10.0.0.1/8", 'write an address or a prefix without host bits, for example "10.0.0.0/8"'),
        ("address", "somewhere", 'write an address or a prefix without host bits, for example "10.0.0.0/8"'),
    ],
)
def test_a_kernel_filter_whose_subject_is_of_another_kind_is_refused(
    write: Writer, kind: str, subject: str, instead: str
) -> None:
    """The second rule is wrong: it is named by its number."""
    rules = f'[{{kind: port, subject: 53}}, {{kind: {kind}, subject: "{subject}"}}]'
    (line,) = problems(write(f"load_config:\n  kernel_filters: {rules}"))
    assert line.split(": ", 1)[1] == f'load_config.kernel_filters: "{subject}" of rule 2 is no {kind}; {instead}'


def test_kernel_filters_are_read(write: Writer) -> None:
    """A number is as good as its digits; all that is left out has its default."""
    text = """
load_config:
  strategy: budget
  kernel_filters:
    - {kind: port, subject: 53, classes: [connection, exec], ratio: 0.5}
    - {kind: address, subject: "2001:db8::/32"}
    - {kind: container, subject: shop/web-0}
"""
    found = load(write(text), None, {}, {}).config.load_config
    assert found.strategy == "budget"
    assert [(rule.kind, rule.subject, rule.classes, rule.ratio) for rule in found.kernel_filters] == [
        ("port", "53", ("connection", "exec"), 0.5),
        ("address", "2001:db8::/32", (), 0.0),
        ("container", "shop/web-0", (), 0.0),
    ]


@pytest.mark.parametrize(
    ("content", "line", "part"),
    [
        ("log:\n\tlevel: info\n", 2, "is no YAML or JSON at column 1"),
        ("log: {level: info\n", 2, "is no YAML or JSON"),
        ("log: &a {}\nweb: *a\n", 1, "anchors and aliases"),
        ("web: *a\n", 1, "anchors and aliases"),
        ("log:\n  level: !!python/object:os.system x\n", 2, "is read as a YAML tag"),
        ("container_config: {namespace_filters: [!kube-system ]}\n", 1, '"!kube-system" is read as a YAML tag'),
        ("- a\n- b\n", 1, "is no mapping"),
        ("just text\n", 1, "is no mapping"),
        ("42", 1, "is no mapping"),
        ("log: {}\n---\nweb: {}\n", 2, "is no YAML or JSON"),
        ("a: " + "[" * 30, 1, "is nested deeper than 20 levels"),
        ("a: " + "[" * 500_000, 1, "is nested deeper than 20 levels"),
        ("a:\n" + "".join(f"{' ' * n}- \n" for n in range(1, 40)), 21, "is nested deeper than 20 levels"),
        ("a: [" + "1," * 30_000 + "]", 1, "holds more than 20000 values"),
        ("? [a]\n: b\n", 1, "a key is no text"),
        (b"log:\n  level: \xff\n", 2, "is not UTF-8"),
        ("log: {}".encode("utf-16"), 1, "is not UTF-8"),
        ("log:\n  level: a\x00b\n", 2, "the character #x0000 is not allowed"),
        ('a: "\\U00110000"', 1, "out of range"),
        ("%YAML 9" + "9" * 5000 + "\n---\na: 1", 1, "is no YAML or JSON"),
        ("<<: {log: {}}", 1, "<<: is no known key"),
        ("1: 2", 1, "1: is no known key"),
        ("'': 2", 1, '"": is no known key'),
        ("web: {max_connections: 0o10000000}", 1, "is out of range"),
        ("web: {max_connections: .inf}", 1, "inf is no whole number"),
        ("load_config: {cpu_threshold: .nan}", 1, "nan is out of range"),
        ("load_config: {cpu_threshold: true}", 1, "True is no number"),
        ("web: {max_connections: true}", 1, "True is no whole number"),
        ("web: {max_connections: 1.0}", 1, "1.0 is no whole number"),
        ("web: {request_timeout: -5}", 1, "-5 is out of range"),
        ("web: {request_timeout: 1e99}", 1, "1e+99 is no duration"),
        ("web: {request_timeout: " + "9" * 5000 + "}", 1, "is no duration"),
        ("web: {listen_address: ':65536'}", 1, "is no address"),
        ("web: {listen_address: '[::g]:1'}", 1, "is no address"),
        ('web: {config_file: ""}', 1, "is empty, too long or not printable"),
        ('web: {config_file: "a\\nb"}', 1, "is empty, too long or not printable"),
        ("privacy: {deny_values: ['a{99999999999}']}", 1, "is no regular expression"),
        ('"\\ud83d": 1', 1, "is no known key"),
    ],
)
def test_bad_files(write: Writer, content: str | bytes, line: int, part: str) -> None:
    """Each is refused with its line and a reason, quickly, and never by a traceback."""
    path = write(content)
    begin = time.monotonic()
    found = problems(path)
    assert time.monotonic() - begin < 5
    assert any(text.startswith(f"{path}:{line}: ") and part in text for text in found), found


def test_files_that_cannot_be_read(tmp_path: Path, write: Writer) -> None:
    """Absent, a directory, a pipe that nobody writes to, a device, too large: refused at once."""
    os.mkfifo(tmp_path / "pipe")
    large = write(b"#" * (MOST_BYTES + 1))
    for path in (tmp_path / "absent", tmp_path, tmp_path / "pipe", Path("/dev/zero"), Path("a\x00b")):
        (line,) = problems(path)
        assert "cannot be read" in line
    assert "is larger than 1048576 bytes" in problems(large)[0]


def test_the_largest_file_is_read_in_bounded_time(write: Writer) -> None:
    """A megabyte of unknown keys is answered, with the first hundred problems and the number of the others."""
    rows = "".join(f"key{number}: {'x' * 80}\n" for number in range(9_000))
    begin = time.monotonic()
    found = problems(write(rows))
    assert time.monotonic() - begin < 20
    assert len(found) <= 101
    assert any("more problems" in line for line in found)


@pytest.mark.parametrize("content", ["", "# nothing\n", "general:\nlog:\n", "{}", "---\n", "\ufefflog: {level: info}"])
def test_files_that_say_nothing(write: Writer, content: str) -> None:
    """An empty file, comments, sections without keys and a byte order mark are fine."""
    assert load(write(content), None, {}, {}).config == Config()


def test_json_with_tabs_and_escapes(write: Writer) -> None:
    """JSON as programs write it is taken: tabs, escaped slashes, surrogate pairs."""
    content = (
        '{\n\t"cni_config":\t{"config_paths": ["\\/etc\\/cni"]},\n\t"privacy": {"environment": ["\\ud83d\\ude00"]}\n}'
    )
    found = load(write(content, "file.json"), None, {}, {}).config
    assert found.cni_config.config_paths == (Path("/etc/cni"),)
    assert found.privacy.environment == ("😀",)


def test_no_secret_is_echoed(write: Writer) -> None:
    """A secret in the wrong place is not repeated in the message, by its looks or by the name it stands under."""
    token = "gh" + "p_16C7e42F292c6912E7710c838347Ae178B4a"
    content = f"""
log: {{level: {token}}}
web:
  listen_address: "https://u:hunter2@h"
  password: hunter2
general: {{role: "Bearer hunter2"}}
{token}: 1
load_config: {{priority_filters: [{{name: a, api_key: hunter2}}]}}
"""
    environ = {"CNI_EXPORTER_LOAD_CONFIG_PRIORITY_FILTERS": '[{"password": "hunter2", ]'}
    text = "\n".join(problems(write(content), None, environ))
    assert "hunter2" not in text
    assert "16C7e42" not in text


def test_an_unknown_preset_is_named_with_the_known_ones() -> None:
    """From the command line too it is a problem like the others."""
    (line,) = problems(None, "prodution")
    assert line == 'flag --preset: preset: "prodution" is not known here; did you mean "production"?'


_PIECES = st.sampled_from(
    [
        *(part for key, _ in keys(Config) for part in key),
        "load_thresholds",
        "low",
        "name",
        ":",
        " ",
        "\n",
        "  ",
        "- ",
        "{",
        "}",
        "[",
        "]",
        ",",
        '"',
        "'",
        "&a",
        "*a",
        "!x",
        "!!int",
        "|",
        ">",
        "%YAML",
        "---",
        "<<",
        "#",
        "?",
        "\t",
        "\\",
        "true",
        "3",
        "0x",
        "1e9",
        ".inf",
        "~",
        "30s",
        "1GiB",
        "\\ud800",
        "\\U00110000",
        "\x00",
        "\ufeff",
        "é",
        "\u2028",
    ],
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.lists(_PIECES, max_size=40).map(lambda pieces: "".join(pieces).encode())))
@example(b"general: {role: {role: {}}}")
@example(b"metrics: {series_limits: {cni_veths: {a: 1}}}")
@example(b"general:\n  min_sampling_rate: []\nload_config: 3")
@example(b"preset: [minimal]")
@example(b"preset: {a: b}")
def test_any_bytes_load_or_are_refused(tmp_path: Path, data: bytes) -> None:
    """Whatever the file holds, the answer is a configuration or a ConfigError whose text can be printed."""
    path = tmp_path / "any.yaml"
    path.write_bytes(data)
    try:
        assert isinstance(load(path, None, {}, {}), Loaded)
    except ConfigError as error:
        str(error).encode()


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.one_of(st.sampled_from([variable(key) for key, _ in keys(Config)]), st.text().map("CNI_EXPORTER_".__add__)),
        st.one_of(
            st.text(st.characters(codec=None, exclude_categories=())), st.lists(_PIECES, max_size=9).map("".join)
        ),
        max_size=4,
    ),
)
def test_any_environment_loads_or_is_refused(environ: dict[str, str]) -> None:
    """Whatever the environment holds, undecodable bytes included."""
    try:
        config.show(load(None, None, environ, {})).encode()
    except ConfigError as error:
        str(error).encode()


_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("30s")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["name", "low", "patterns", "cni_veths", "x"]), inner, max_size=3),
    ),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([key for key, _ in keys(Config)]), _JSON, max_size=4))
def test_any_value_under_a_known_key_loads_or_is_refused(tmp_path: Path, values: dict[tuple[str, ...], Any]) -> None:
    """Whatever type stands where: and what loads can be shown and loaded again."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        inner = tree
        for part in key[:-1]:
            inner = inner.setdefault(part, {})
        inner[key[-1]] = value
    path = tmp_path / "any.json"
    path.write_text(json.dumps(tree))
    try:
        loaded = load(path, None, {}, {})
    except ConfigError:
        return
    path.write_text(config.show(loaded))
    assert load(path, None, {}, {}).config == loaded.config


# --- presets, schema, reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_differ(name: str) -> None:
    """Each preset loads by itself, names no preset, and means something of its own."""
    loaded = load(None, name, {}, {})
    assert loaded.preset == name
    assert "preset" not in yaml.safe_load(config.preset_path(name).read_text())
    assert loaded.sha256 not in {load(None, other, {}, {}).sha256 for other in (None, *PRESETS) if other != name}


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_of_a_preset_has_its_reason(name: str) -> None:
    """A comment above or behind each value says why it is so."""
    lines = config.preset_path(name).read_text().splitlines()
    for above, line in pairwise(lines):
        value = line.split("#")[0].partition(":")[2].strip()
        if value and not line.startswith("#"):
            assert "#" in above or "#" in line, line


def test_presets_are_where_the_documentation_says() -> None:
    """One file per preset in deploy/config, and no other."""
    assert {path.stem for path in (ROOT / "deploy" / "config").glob("*.yaml")} == set(PRESETS)


def test_show_can_be_loaded_again(write: Writer) -> None:
    """What is shown is the whole configuration, in the words of the file, with the origin of what is no default."""
    environ = {
        "CNI_EXPORTER_WEB_LISTEN_ADDRESS": "[::1]:0",
        "CNI_EXPORTER_PRIVACY_DENY_NAMES": '["^a: b#", "!x"]',
        "CNI_EXPORTER_LOAD_CONFIG_PRIORITY_FILTERS": '[{"name": "dns", "patterns": ["port: 53"]}]',
    }
    loaded = load(None, "high-performance", environ, {"log.level": "debug"})
    text = config.show(loaded)
    again = load(write(text), None, {}, {})
    assert again.config == loaded.config
    assert again.sha256 == loaded.sha256
    assert "  level: debug  # flag --log.level\n" in text
    assert "  discovery_interval: 2m  # " in text
    assert "  identity_grace: 1s  # " in text
    assert "    cni_veth_info: 20000  # " in text
    assert "  poll_interval: 2m" in text


def test_show_keeps_secrets() -> None:
    """A secret that someone put into a value is not printed."""
    loaded = load(None, None, {}, {"privacy.deny_values": "password=hunter2"})
    assert "hunter2" not in config.show(loaded)


def test_the_reference_is_up_to_date() -> None:
    """docs/configuration.md says what the models say; write it with `reference()` when this fails."""
    assert (ROOT / "docs" / "configuration.md").read_text() == config.reference()


def test_every_key_is_described() -> None:
    """Reference and schema have a sentence for each key, and a form for each value."""
    text = config.reference()
    schema = json.dumps(config.schema())
    for key, field in keys(Config):
        assert field.description.endswith("."), key
        assert field.form, key
        assert f"`{variable(key)}`" in text
        assert json.dumps(field.description) in schema


def test_no_key_of_ours_is_taken_for_a_secret() -> None:
    """Else its value could not be shown."""
    assert not [key for key, _ in keys(Config) if any(privacy.secret_key(part) for part in key)]


def test_every_family_can_be_limited() -> None:
    """`series_limits` knows the catalogue."""
    limits = dict.fromkeys(catalog.FAMILIES, 1)
    environ = {"CNI_EXPORTER_METRICS_SERIES_LIMITS": json.dumps(limits)}
    assert load(None, None, environ, {}).config.metrics.series_limits == limits


def test_the_configuration_cannot_be_changed() -> None:
    """It is shared by threads."""
    with pytest.raises(ValueError, match="frozen"):
        Config().log.level = "debug"  # type: ignore[misc]


def test_importing_is_cheap() -> None:
    """No client library, no settings library comes with the configuration."""
    code = "import sys, exporter.config; print(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    heavy = {"pydantic_settings", "docker", "kubernetes", "grpc", "prometheus_client", "click", "urllib3", "asyncio"}
    assert not heavy & set(out.stdout.split())
