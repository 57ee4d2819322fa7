"""Which monitors run under a configuration, and with what settings each.

Flows in: the configuration, the kernel programs that could be attached. Flows out: monitors, with the families of each.
"""

from collections.abc import Iterable
from pathlib import Path

from exporter.config import Config
from exporter.contract import Monitor
from exporter.monitors import cni_config, host_load, kernel, links, namespaces, plugins, runtimes
from exporter.privacy import Rules

_EVENTS = 0.5  # share of our CPU limit that reading events may use, critical ones aside

Owners = tuple[str, ...]
"""Whose families a monitor writes."""


def monitors(config: Config, programs: kernel.Programs | None = None) -> list[tuple[Monitor, Owners]]:
    """List what runs under this configuration, each with the owners of its families.

    What the kernel programs count, the link monitor and the watch over plugin processes leave to them.
    """
    served = {probe for probe in ("netns", "veth", "cni") if programs and programs.serves(probe)}
    selected: list[tuple[Monitor, Owners]] = [
        (links.monitor(counts_netns="netns" not in served, counts_veths="veth" not in served), ("links", "lifecycle")),
    ]
    if config.general.enable_load_management:
        selected.append((host_load.monitor(config.load_config.memory_threshold), ("host_load",)))
    if config.container_config.namespace_monitoring:
        selected.append((namespaces.monitor(), ("namespaces",)))
    if programs:
        events = kernel.monitor(programs, share=config.general.own_cpu_limit / 100 * _EVENTS)
        selected.append((events, ("kernel", "lifecycle", "plugins", "load")))
    if "cni" not in served and config.cni_config.bin_paths:
        selected.append((plugins.monitor(tuple(map(str, config.cni_config.bin_paths))), ("plugins",)))
    if config.cni_config.config_paths:
        watch = cni_config.monitor(_cni_settings(config), use_inotify=config.cni_config.use_inotify)
        selected.append((watch, ("cni_config",)))
    if config.container_discovery:
        selected += [(monitor, ("runtimes",)) for monitor in runtimes.monitors(_runtime_settings(config))]
    return selected


def load_programs(config: Config) -> kernel.Programs | None:
    """Load the kernel programs, where the configuration wants them. Call it before capabilities are given up."""
    if not config.cni_config.use_ebpf:
        return None
    return kernel.load(
        kernel.Settings(
            plugin_directories=tuple(map(str, config.cni_config.bin_paths)),
            syscalls=config.kernel.syscalls,
            run_statistics=config.kernel.run_statistics,
            entries=config.kernel.map_entries,
        )
    )


def _runtime_settings(config: Config) -> runtimes.Settings:
    section, privacy = config.container_config, config.privacy
    return runtimes.Settings(
        runtimes=section.container_runtimes,
        interval=section.discovery_interval,
        metadata=runtimes.Metadata(
            enabled=section.metadata_collection,
            labels=privacy.container_labels,
            annotations=privacy.annotations,
            environment=privacy.environment,
            environment_names=privacy.environment_names,
        ),
        resources=section.resource_monitoring,
        docker_sockets=tuple(map(str, section.docker_socket)),
        cri_sockets=_by_runtime(section.cri_sockets),
    )


def _cni_settings(config: Config) -> cni_config.Settings:
    section = config.cni_config
    return cni_config.Settings(
        directories=tuple(map(str, section.config_paths)),
        bin_directories=tuple(map(str, section.bin_paths)),
        poll_interval=section.poll_interval,
        runtime=section.runtime,
        max_conf_num=section.max_conf_num,
        default_network=section.default_network or "",
        sockets={**runtimes.SOCKETS, **_by_runtime(config.container_config.cri_sockets)},
    )


def privacy_rules(config: Config) -> Rules:
    """Give the rules of what is secret, the user's own included."""
    return Rules(config.privacy.deny_names, config.privacy.deny_values)


def _by_runtime(paths: Iterable[Path]) -> dict[str, tuple[str, ...]]:
    """Tell whose sockets these are: CRI-O's carry its name, all others are containerd's."""
    sockets: dict[str, tuple[str, ...]] = {}
    for path in map(str, paths):
        runtime = "cri-o" if "crio" in path else "containerd"
        sockets[runtime] = (*sockets.get(runtime, ()), path)
    return sockets
