"""Every key of the configuration: name, type, bounds, default and meaning. The reference and the schema are made of it.

Flows in: nested mappings, already merged from all layers. Flows out: one frozen `Config` in base units (seconds, bytes,
ratios from 0 to 1), with the questions that the rest of the program asks of it.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from exporter.config.texts import Address, FamilyName, FilePath, Pattern, Subject, Text, one_or_more
from exporter.config.values import Duration, Number, Size, Switch, Whole

KernelClass = Literal["packet_drop", "tcp_fault", "exec", "connection", "connection_close", "syscall"]
Preset = Literal["development", "production", "high-performance", "minimal"]

_On = Annotated[bool, Switch()]
_Path = Annotated[Path, FilePath()]
_Ratio = Annotated[float, Number(0.0, 1.0)]
_Glob = Annotated[str, Text("glob", "team-*")]
_Regex = Annotated[str, Pattern()]
_Events = Annotated[int, Whole(1, 10_000_000)]
_Interval = Annotated[float, Duration("1s", "1h")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class General(_Section):
    """What is on at all. A feature that has a second switch in its own section is on where both are on."""

    role: Literal["node", "cluster"] = Field(
        default="node", description="What is observed: this node, or the objects of the whole cluster."
    )
    enable_container_integration: _On = Field(default=True, description="Observe container runtimes at all.")
    enable_container_discovery: _On = Field(default=True, description="Find containers by themselves.")
    enable_kubernetes_integration: _On = Field(default=True, description="Observe the Kubernetes API.")
    container_discovery_interval: _Interval | None = Field(
        default=None, description="Short form of `container_config.discovery_interval`."
    )
    enable_load_management: _On = Field(default=True, description="Sample and filter events under load.")
    keep_capabilities: tuple[Literal["sys_ptrace", "dac_read_search"], ...] = Field(
        default=("sys_ptrace", "dac_read_search"),
        description="Linux capabilities that are kept as root: `sys_ptrace` for the inventory of namespaces, "
        "`dac_read_search` for sockets in directories that not even root may search; empty: none.",
    )
    own_cpu_limit: Annotated[float, Number(1.0, 10_000.0)] = Field(
        default=50.0,
        description="CPU use of the exporter, in percent of a core, above which it observes less often; reading "
        "events, critical ones aside, takes half of it at most.",
    )
    max_events_per_second: _Events | None = Field(
        default=None, description="Short form of `load_config.max_events_per_second`."
    )
    min_sampling_rate: _Ratio | None = Field(default=None, description="Short form of `load_config.min_sampling_rate`.")
    max_sampling_rate: _Ratio | None = Field(default=None, description="Short form of `load_config.max_sampling_rate`.")


class ContainerConfig(_Section):
    """How containers and pods are found, and what is read about them."""

    enable_container_discovery: _On = Field(default=True, description="Find containers by themselves.")
    enable_kubernetes_integration: _On = Field(default=True, description="Observe the Kubernetes API.")
    enable_namespace_isolation: _On = Field(
        default=True, description="Apply `namespace_filters`, and the namespaces that a scraper is bound to."
    )
    enable_service_mesh_support: _On = Field(default=False, description="Read the published metrics of mesh proxies.")
    container_runtimes: tuple[Literal["docker", "containerd", "cri-o"], ...] = Field(
        default=("docker", "containerd", "cri-o"), description="Runtimes to ask; others are seen by their cgroups."
    )
    docker_socket: Annotated[tuple[_Path, ...], BeforeValidator(one_or_more)] = Field(
        default=(), description="Sockets of the Docker Engine; empty: the usual places."
    )
    cri_sockets: Annotated[tuple[_Path, ...], BeforeValidator(one_or_more)] = Field(
        default=(), description="Sockets that speak CRI (containerd, CRI-O); empty: the usual places."
    )
    kubeconfig_path: _Path | None = Field(
        default=None,
        description="Credentials for the Kubernetes API; empty: the pod's own account, then `~/.kube/config`.",
    )
    namespace_filters: tuple[_Glob, ...] = Field(
        default=(), description="Globs of Kubernetes namespaces to export; a leading `!` leaves out; empty: all."
    )
    discovery_interval: _Interval = Field(
        default=30.0, description="Time between full passes over the runtimes; events come at once in any case."
    )
    metadata_collection: _On = Field(
        default=True, description="Export networks, ports, mounts, labels and environment of containers."
    )
    resource_monitoring: _On = Field(default=True, description="Export CPU, memory, disk and PIDs of containers.")
    namespace_monitoring: _On = Field(
        default=True, description="Export Linux namespaces by type, and processes and UID mappings of containers."
    )

    @property
    def namespace_filter(self) -> Callable[[str], bool] | None:
        """The filter of Kubernetes namespaces; None where all are exported."""
        return self.admits_namespace if self.enable_namespace_isolation and self.namespace_filters else None

    def admits_namespace(self, name: str) -> bool:
        """Tell whether a Kubernetes namespace is exported. What is in no Kubernetes namespace (Docker) always is."""
        if not self.enable_namespace_isolation or not name:
            return True
        left_out = [glob[1:] for glob in self.namespace_filters if glob.startswith("!")]
        wanted = [glob for glob in self.namespace_filters if not glob.startswith("!")] or ["*"]
        return not _matches(name, left_out) and _matches(name, wanted)


def _matches(name: str, globs: list[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


class LoadThresholds(_Section):
    """Upper ends of the load levels, in events per second. They must ascend."""

    low: _Events = Field(default=1_000, description="Below this many events per second the load is low.")
    medium: _Events = Field(default=10_000, description="Below this many events per second the load is medium.")
    high: _Events = Field(
        default=50_000, description="Below this many events per second the load is high, else critical."
    )
    critical: _Events = Field(
        default=100_000, description="From this many events per second on, the ratio stays at its lowest."
    )


class PriorityFilter(_Section):
    """A rule of the user's own for some events. Of what kernel programs see it thins what is shown live."""

    name: Annotated[str, Text("text", "dns")] = Field(description="What the rule is called in the metrics.")
    priority: Literal["critical", "error", "warning", "info", "debug"] = Field(
        default="info", description="Priority of the events that match."
    )
    patterns: tuple[_Regex, ...] = Field(
        default=(),
        description="Regular expressions; an event matches where one is found in its text, such as "
        "`class container, kind start, runtime docker`; empty: each event matches.",
    )
    sampling_rate: _Ratio | None = Field(
        default=None, description="Ratio that is kept whatever the load, 0: none; empty: that of the priority."
    )
    enabled: _On = Field(default=True, description="Whether the rule applies.")


class KernelFilter(_Section):
    """A rule of the user's own that the kernel applies. It stands above ratios and learned rules."""

    kind: Literal["pid", "command", "address", "port", "syscall", "container"] = Field(
        description="What the rule is about."
    )
    subject: Annotated[str, Subject()] = Field(
        description="A PID; a command's first 15 bytes; an address or prefix; a port; a system call's number; a "
        "container's name, its id or the beginning of that (6 digits or more), or `namespace/pod`."
    )
    classes: tuple[KernelClass, ...] = Field(
        default=(),
        description="Classes of events that it holds for; empty: all but critical ones, which are always kept.",
    )
    ratio: _Ratio = Field(default=0.0, description="Ratio that is kept, whatever the load; 0: none.")


class LoadConfig(_Section):
    """How many events are kept, and which."""

    strategy: Literal["thresholds", "budget"] = Field(
        default="thresholds",
        description="`thresholds`: the ratio follows the level of the load. `budget`: whatever can be handled is kept.",
    )
    enable_adaptive_filtering: _On = Field(default=True, description="Give heavy hitters rules of their own.")
    enable_kernel_filtering: _On = Field(default=True, description="Filter in the kernel where eBPF allows.")
    enable_intelligent_sampling: _On = Field(default=True, description="Let forecast and pattern drive the ratio.")
    enable_load_balancing: _On = Field(default=True, description="Give containers fair shares of what is kept.")
    max_events_per_second: _Events = Field(
        default=10_000,
        description="Events per second that are kept at most; up to a third more, and seconds of a step, are let pass.",
    )
    min_sampling_rate: _Ratio = Field(default=0.01, description="Ratio of events that is kept at least.")
    max_sampling_rate: _Ratio = Field(default=1.0, description="Ratio of events that is kept at most.")
    load_thresholds: LoadThresholds = Field(default=LoadThresholds(), description="Upper ends of the load levels.")
    adaptation_interval: Annotated[float, Duration("100ms", "1m")] = Field(
        default=1.0, description="Time between adaptations of the ratio."
    )
    cpu_threshold: Annotated[float, Number(1.0, 100.0)] = Field(
        default=80.0, description="CPU use of the host, in percent, above which the ratio is halved."
    )
    memory_threshold: Annotated[int, Size("16MiB", "64TiB")] = Field(
        default=2**30, description="Memory of the exporter, in bytes, above which filtering is aggressive."
    )
    priority_filters: tuple[PriorityFilter, ...] = Field(
        default=(), description="Rules of your own; names must differ."
    )
    kernel_filters: tuple[KernelFilter, ...] = Field(
        default=(), description="Rules of your own that are applied in the kernel, where eBPF allows; else not at all."
    )


class CniConfig(_Section):
    """How the CNI configuration and plugins are watched."""

    config_paths: tuple[_Path, ...] = Field(
        default=(
            Path("/etc/cni/net.d"),
            Path("/etc/cni/conf.d"),
            Path("/opt/cni/conf"),
            Path("/etc/kubernetes/cni/net.d"),
        ),
        description="Directories of CNI configuration files; they need not exist. Empty: none is watched.",
    )
    bin_paths: tuple[_Path, ...] = Field(
        default=(Path("/opt/cni/bin"), Path("/usr/lib/cni"), Path("/usr/libexec/cni")),
        description="Directories of CNI plugins; they need not exist. Empty: runs of plugins are not watched.",
    )
    use_ebpf: _On = Field(default=True, description="Use eBPF where the kernel allows; else netlink and /proc.")
    use_inotify: _On = Field(default=True, description="Use inotify where it can be had; else polling.")
    use_k8s_informer: _On = Field(default=True, description="List and watch Kubernetes objects; else list only.")
    poll_interval: _Interval = Field(default=30.0, description="Time between passes where polling is what is left.")
    runtime: Literal["auto", "containerd", "cri-o"] = Field(
        default="auto",
        description="Whose rule says which configuration is active; `auto`: CRI-O's where its socket is there and no "
        "other runtime's is.",
    )
    max_conf_num: Annotated[int, Whole(0, 1000)] = Field(
        default=1, description="What containerd has under the same name: how many configurations it uses; 0: all."
    )
    default_network: Annotated[str, Text("network", "kindnet")] | None = Field(
        default=None, description="What CRI-O has as `cni_default_network`; empty: the first."
    )


class Kernel(_Section):
    """The eBPF programs; `cni_config.use_ebpf` switches them."""

    syscalls: tuple[Annotated[int, Whole(0, 1023)], ...] = Field(
        default=(), description="Numbers of system calls that are reported as events; empty: none is traced."
    )
    run_statistics: _On = Field(
        default=True, description="Have the kernel measure the run time of BPF programs, which costs some 20 ns a run."
    )
    map_entries: Annotated[int, Whole(256, 1_048_576)] = Field(
        default=16_384, description="Entries of a counting map; a namespace takes some ten."
    )


class Web(_Section):
    """The HTTP server."""

    listen_address: Annotated[str, Address()] = Field(
        default=":10266", description="Where to listen; port 0: any free port."
    )
    config_file: _Path | None = Field(
        default=None, description="TLS and authentication, in the format of the Prometheus exporters."
    )
    max_connections: Annotated[int, Whole(1, 65_535)] = Field(
        default=512, description="Connections at a time; those above are closed and counted."
    )
    request_timeout: Annotated[float, Duration("100ms", "10m")] = Field(
        default=10.0, description="Time that a client has to send its request, and to take the answer."
    )
    scrape_timeout: Annotated[float, Duration("10ms", "1m")] = Field(
        default=5.0, description="Time that a scrape waits for fresh data at most."
    )

    @property
    def host(self) -> str:
        """The host to bind to, without brackets; empty for every address."""
        return self.listen_address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port to bind to."""
        return int(self.listen_address.rpartition(":")[2])


class Feed(_Section):
    """The live feed of events on a local socket, for `cni-exporter events`."""

    enabled: _On = Field(default=True, description="Offer the feed.")
    socket: _Path | None = Field(
        default=None,
        description="The socket, for the exporter's own user alone; empty: `/run/cni-exporter/events.sock`, for a user "
        "other than root `$XDG_RUNTIME_DIR/cni-exporter/events.sock`.",
    )


class Log(_Section):
    """The log, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="The least that is logged.")
    format: Literal["logfmt", "json"] = Field(default="logfmt", description="How a line looks.")


class Metrics(_Section):
    """The metric families."""

    series_limits: Mapping[Annotated[str, FamilyName()], Annotated[int, Whole(0, 10_000_000)]] = Field(
        default={}, description="Series at most, by family; in place of the limits of the catalogue."
    )
    identity_grace: Annotated[float, Duration("0s", "1m")] = Field(
        default=2.0, description="Time that a new series is held back until its container is known."
    )


class HostPaths(_Section):
    """Where the host's pseudo file systems are mounted."""

    procfs: _Path = Field(default=Path("/proc"), description="The host's procfs.")
    sysfs: _Path = Field(default=Path("/sys"), description="The host's sysfs.")


class Privacy(_Section):
    """What of a container's own data may leave. What looks like a secret never does."""

    container_labels: tuple[_Glob, ...] = Field(
        default=(
            "app.kubernetes.io/*",
            "com.docker.compose.project",
            "com.docker.compose.service",
            "org.opencontainers.image.version",
        ),
        description="Globs of the container labels that are exported.",
    )
    annotations: tuple[_Glob, ...] = Field(
        default=(), description="Globs of the annotations of pods and containers that are exported."
    )
    environment: tuple[_Glob, ...] = Field(
        default=(), description="Globs of the environment variables that are exported with their value."
    )
    environment_names: _On = Field(default=True, description="Export the names of the other environment variables.")
    deny_names: tuple[_Regex, ...] = Field(
        default=(), description="Further regular expressions: a label or variable with such a name is secret."
    )
    deny_values: tuple[_Regex, ...] = Field(
        default=(), description="Further regular expressions: a value that one is found in is redacted."
    )


class Audit(_Section):
    """The audit log: what was read about which container, by which monitor, and who scraped."""

    path: _Path | None = Field(default=None, description="The file, a JSON line per record; empty: no audit log.")
    max_size: Annotated[int, Size("4KiB", "1TiB")] = Field(
        default=10 * 2**20, description="Size at which the file is set aside and a new one begun."
    )
    keep: Annotated[int, Whole(1, 1000)] = Field(
        default=9, description="Files set aside that are kept, from `.1`, the youngest, on."
    )
    scrape_interval: Annotated[float, Duration("0s", "1h")] = Field(
        default=60.0, description="Time over which a client's requests are added up to one record; 0s: none are."
    )
    events: tuple[Literal["container", "netns", "veth", "cni_run"], ...] = Field(
        default=("container", "netns"), description="Classes of events that are recorded; empty: none."
    )
    max_records_per_second: Annotated[int, Whole(1, 100_000)] = Field(
        default=100,
        description="Records of reads and events per second, on average; 20 seconds' worth may come at once.",
    )


class Config(_Section):
    """The whole configuration."""

    preset: Preset | None = Field(default=None, description="Values to begin with, in place of the defaults.")
    general: General = Field(default=General(), description="What is on at all.")
    container_config: ContainerConfig = Field(default=ContainerConfig(), description="Containers and pods.")
    load_config: LoadConfig = Field(default=LoadConfig(), description="How many events are kept.")
    cni_config: CniConfig = Field(default=CniConfig(), description="CNI configuration and plugins.")
    kernel: Kernel = Field(default=Kernel(), description="The eBPF programs.")
    web: Web = Field(default=Web(), description="The HTTP server.")
    feed: Feed = Field(default=Feed(), description="The live feed of events.")
    log: Log = Field(default=Log(), description="The log.")
    metrics: Metrics = Field(default=Metrics(), description="The metric families.")
    paths: HostPaths = Field(default=HostPaths(), description="The host's pseudo file systems.")
    privacy: Privacy = Field(default=Privacy(), description="What may leave.")
    audit: Audit = Field(default=Audit(), description="The audit log.")

    @property
    def container_discovery(self) -> bool:
        """Whether containers are looked for: integration on, and discovery on in both sections."""
        discovery = self.general.enable_container_discovery and self.container_config.enable_container_discovery
        return self.general.enable_container_integration and discovery

    @property
    def kubernetes(self) -> bool:
        """Whether the Kubernetes API is observed: on in both sections."""
        general = self.general.enable_kubernetes_integration
        return general and self.container_config.enable_kubernetes_integration

    def runtime_enabled(self, name: str) -> bool:
        """Tell whether a runtime (docker, containerd, cri-o) is asked."""
        return self.container_discovery and name in self.container_config.container_runtimes

    @property
    def features(self) -> Mapping[str, bool]:
        """Each feature and whether the configuration switches it on; for `cni_exporter_feature_enabled`."""
        return {
            "container_integration": self.general.enable_container_integration,
            "container_discovery": self.container_discovery,
            "kubernetes": self.kubernetes,
            "namespace_isolation": self.container_config.enable_namespace_isolation,
            "service_mesh": self.container_config.enable_service_mesh_support,
            "metadata_collection": self.container_discovery and self.container_config.metadata_collection,
            "resource_monitoring": self.container_discovery and self.container_config.resource_monitoring,
            "load_management": self.general.enable_load_management,
            "ebpf": self.cni_config.use_ebpf,
            "inotify": self.cni_config.use_inotify,
            "k8s_informer": self.kubernetes and self.cni_config.use_k8s_informer,
        }


SHORT_FORMS = {
    "container_discovery_interval": ("container_config", "discovery_interval"),
    "max_events_per_second": ("load_config", "max_events_per_second"),
    "min_sampling_rate": ("load_config", "min_sampling_rate"),
    "max_sampling_rate": ("load_config", "max_sampling_rate"),
}
"""Keys of `general` that stand for a key of another section, where the same layer does not set that key itself."""
