"""The composition root: the parts of the exporter put together, and the life of the process.

Flows in: a loaded configuration and signals. Flows out: a running exporter. Nothing else knows all the parts.
"""

import logging
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path

import psutil

from exporter import __version__, load_config, logs, page, privileges
from exporter.audit import Audit, Scrape
from exporter.audit import Settings as AuditSettings
from exporter.config import Config, ConfigError, Loaded
from exporter.contract import Families, Paths
from exporter.exposition import Exposition
from exporter.feed import Feed
from exporter.feed_protocol import default_socket
from exporter.http1 import Request, Response
from exporter.load.admission import Admission
from exporter.load.governor import Governor
from exporter.metrics import Policy, Store
from exporter.monitors import host_load, kernel
from exporter.monitors.kernel.controls import Controls
from exporter.selection import load_programs, monitors, privacy_rules
from exporter.steering import Kernel, Learned, Steering
from exporter.supervisor import Standing, Supervisor
from exporter.topology import as_json, build
from exporter.traffic import Rates
from exporter.web import Server

log = logging.getLogger(__name__)

_STOP = 10.0  # seconds that monitors and connections get to end
_LOOK = 5.0  # seconds between looks at our own CPU and memory
_CALM, _STRETCH = 1.0, 4.0  # factors of the monitors' intervals without and with our CPU over its limit
_FORGET = 0.9  # share of the memory limit below which series are admitted again


def _policy(config: Config) -> Policy:
    return Policy(
        limits=config.metrics.series_limits,
        grace=config.metrics.identity_grace,
        rules=privacy_rules(config),
        admits=config.container_config.namespace_filter,
    )


class Exporter:
    """A running exporter: store, monitors and, once `serve` is called, HTTP."""

    def __init__(self, loaded: Loaded, programs: kernel.Programs | None = None) -> None:
        """Build everything; nothing runs yet. `programs` are the exporter's from now on."""
        self._loaded = loaded
        self._programs = programs
        config = loaded.config
        self.store = Store(_policy(config))
        self.admission = Admission()
        """Every event passes here; the feed and the audit log tap it."""
        self._rules = privacy_rules(config)
        self._audit = self._make_audit(config)
        self._kernel = _controls(config, programs)
        self.supervisor = self._supervise(config)
        self.steering = self._steer(config)
        self.exposition = Exposition(
            self.store.collect,
            self.refresh,
            self.store.owned("metrics"),
            procfs=str(config.paths.procfs),
        )
        self._own = self.store.owned("exporter")
        self._server: Server | None = None
        self._feed: Feed | None = None
        self._started = time.time()
        self._node = socket.gethostname()
        self._rates = Rates()
        self._process = psutil.Process()
        self._publish(reloaded=True)

    def start(self) -> None:
        """Start the monitors, and what steers events."""
        self.supervisor.start()
        self.steering.start()

    def serve(self) -> Server:
        """Answer HTTP. Raises OSError where the address cannot be had."""
        web = self._loaded.config.web
        dropped = self.store.owned("web")
        for reason in ("idle", "limit", "slow", "error"):
            dropped.add("cni_exporter_http_connections_dropped_total", (reason,), 0)
        self._server = Server(
            web.listen_address,
            self,
            dropped=lambda reason: dropped.add("cni_exporter_http_connections_dropped_total", (reason,)),
            max_connections=web.max_connections,
            request_timeout=web.request_timeout,
            topology=self.topology,
            answered=self._answered if self._audit else None,
        )
        self._server.start()
        if self._audit:
            self._audit.start(self._identity())
            if self._audit.settings.events:
                self.admission.tap(self._audit.tap, self._audit.settings.events)
        self._feed = self._offer_feed()
        return self._server

    def _make_audit(self, config: Config) -> Audit | None:
        section = config.audit
        if section.path is None:
            return None
        settings = AuditSettings(
            *(section.path, section.max_size, section.keep, section.scrape_interval),
            *(frozenset(section.events), section.max_records_per_second),
        )
        # A reload brings new rules.
        return Audit(
            settings, self.store.owned("audit"), self.store.names_of, lambda text: self._rules.safe_label(text)
        )

    def _identity(self) -> Mapping[str, object]:
        """Say who writes the audit log, under which configuration."""
        who = {"node": self._node, "version": __version__, "pid": os.getpid(), "uid": os.geteuid()}
        return {**who, "config_sha256": self._loaded.sha256, "preset": self._loaded.preset}

    def _answered(self, client: str, request: Request, response: Response) -> None:
        """Tell the audit log who was told what. Probes that are well tell nothing of a container."""
        if self._audit is None or (request.path.startswith("/-/") and response.status is HTTPStatus.OK):
            return
        known = response.status is not HTTPStatus.NOT_FOUND
        scraped = request.path == "/metrics" and response.status is HTTPStatus.OK
        series = self.exposition.series if scraped else 0
        path = request.path if known else "(unknown)"
        size = len(response.body)
        self._audit.served(Scrape(time.time(), client, "", path, int(response.status), series, size))

    def _offer_feed(self) -> Feed | None:
        """Start the live feed; the exporter does without where it cannot be had."""
        section = self._loaded.config.feed
        if not section.enabled:
            return None
        try:
            path = section.socket or default_socket()
        except OSError as error:
            log.warning("no live feed: %s", error.strerror)
            self.store.owned("feed").replace({"cni_exporter_feed_up": {(): 0.0}})
            return None
        feed = Feed(
            path,
            self.admission,
            self.store.owned("feed"),
            names=self.store.names_of,
            clean=lambda text: self._rules.safe_label(text),  # a reload brings new rules, and a new filter
            shows=lambda namespace: self._loaded.config.container_config.admits_namespace(namespace),
        )
        feed.start()
        return feed

    def refresh(self) -> None:
        """Bring the monitors up to date, waiting as long as a scrape would."""
        self.supervisor.refresh(self._loaded.config.web.scrape_timeout)
        self.steering.refresh()

    def settled(self) -> bool:
        """Whether every monitor has passed once and no series waits for its name."""
        if not all(standing.seen for standing in self.supervisor.standings()):
            return False
        self.refresh()
        self.store.collect()
        return self.store.held == 0

    def stop(self) -> None:
        """End HTTP, the feed and the monitors, within a bound."""
        if self._server:
            self._server.stop()
        if self._feed:
            self._feed.stop()
        hung = self._halt()
        if hung:
            log.warning("left behind, not ending within %s s: %s", _STOP, ", ".join(hung))
        if self._programs:
            self._programs.close()
        if self._audit:
            self._audit.stop()

    def _halt(self) -> list[str]:
        """End steering and monitors; the answer names what hangs."""
        steered = self.steering.stop(_STOP)
        return self.supervisor.stop(_STOP) + ([] if steered else ["steering"])

    def reload(self, load: Callable[[], Loaded]) -> None:
        """Take a new configuration over, or keep the old one where the new one has errors."""
        try:
            loaded = load()
        except (ConfigError, OSError) as error:
            log.error("configuration not reloaded, the old one stays in force: %s", error)  # noqa: TRY400 - for people
            self._publish(reloaded=False)
            self._note_reload(successful=False)
            return
        for name in ("web", "feed", "kernel", "cni_config", "audit"):
            if getattr(loaded.config, name) != getattr(self._loaded.config, name):
                log.warning("a change of section %s takes a restart", name)
        before = {owners for _, owners in monitors(self._loaded.config, self._programs)}
        self._halt()
        self._loaded = loaded
        after = {owners for _, owners in monitors(loaded.config, self._programs)}
        for owners in (before - after) | {("load",)}:
            self.store.clear(*owners)
        self.store.apply(_policy(loaded.config))
        self._rules = privacy_rules(loaded.config)
        logs.setup(loaded.config.log.level, loaded.config.log.format, self._rules)
        self.supervisor = self._supervise(loaded.config)
        self.steering = self._steer(loaded.config)
        self.start()
        self._publish(reloaded=True)
        self._note_reload(successful=True)
        log.info("configuration reloaded")

    def _note_reload(self, *, successful: bool) -> None:
        if self._audit:
            self._audit.note("reload", {"successful": successful, **self._identity()})

    def look_at_ourselves(self) -> None:
        """Do less while we cost more than we may: longer intervals over the CPU limit, no new series over memory's.

        And take the reading that rates on the page are made of.
        """
        config = self._loaded.config
        busy = self._process.cpu_percent() > config.general.own_cpu_limit
        self.supervisor.slow_down(_STRETCH if busy else _CALM)
        used, limit = self._process.memory_info().rss, config.load_config.memory_threshold
        if self.store.admitting and used > limit:
            log.warning("memory over load_config.memory_threshold (%d of %d bytes): no new series for now", used, limit)
            self.store.admitting = False
        elif used < limit * _FORGET:
            self.store.admitting = True
        self._rates.update(self.store.read)

    # What web serves.

    def metrics(self, accept: str, accept_encoding: str) -> tuple[dict[str, str], bytes]:
        """Answer a scrape."""
        return self.exposition.scrape(accept, accept_encoding)

    def healthy(self) -> tuple[bool, str]:
        """Say whether every monitor's thread is alive."""
        standings = self.supervisor.standings()
        hung = "steering: hung\n" if self.steering.hung else ""
        return not any(standing.hung for standing in standings) and not hung, self._report(standings) + hung

    def ready(self) -> tuple[bool, str]:
        """Say whether the first pass of every monitor is over."""
        standings = self.supervisor.standings()
        return all(standing.seen for standing in standings), self._report(standings)

    def topology(self) -> Mapping[str, object]:
        """Give the tree of node, bridges, veths and workloads."""
        self.refresh()
        return as_json(build(self.store.read, self._node, self._rates))

    def page(self) -> str:
        """Draw the landing page."""
        self.refresh()
        status = page.Status(self._node, __version__, revision(), self._started, time.time())
        learned = [_named(rule, self.store) for rule in self.steering.learned()]
        return page.render(self.store.read, status, self._rates, learned)

    def _steer(self, config: Config) -> Steering:
        section, managed = config.load_config, config.general.enable_load_management
        self.admission.configure(
            load_config.patterns(section) if managed else (), section.max_events_per_second if managed else None
        )
        filters = section.kernel_filters if managed and section.enable_kernel_filtering else ()
        return Steering(
            Governor(load_config.settings(section)) if managed else None,
            self.admission,
            self.store.owned("load"),
            self._kernel,
            load_config.KernelFilters(filters, self.store.namespaces),
            lambda: {name: share for (name,), share in self.store.latest(host_load.FAMILY).items()},
        )

    def _report(self, standings: list[Standing]) -> str:
        """Write a line per monitor."""
        return "".join(
            f"{s.monitor}: {'hung' if s.hung else 'starting' if not s.seen else s.mode}"
            f"{f' ({self._rules.safe_label(s.reason)})' if s.reason else ''}\n"
            for s in standings
        )

    def _supervise(self, config: Config) -> Supervisor:
        supervisor = Supervisor(self.store.owned("supervisor"), self.admission)
        for monitor, owners in monitors(config, self._programs):
            families: Families = self.store.owned(*owners)
            if self._audit:
                families = self._audit.witness(families)
            supervisor.add(monitor, families, Paths(config.paths.procfs, config.paths.sysfs))
        return supervisor

    def _publish(self, *, reloaded: bool) -> None:
        loaded = self._loaded
        self._own.replace(
            {
                "cni_exporter_build_info": {(__version__, revision(), platform.python_version()): 1.0},
                "cni_exporter_config_info": {(loaded.sha256, loaded.preset): 1.0},
                "cni_exporter_config_last_reload_successful": {(): float(reloaded)},
                "cni_exporter_feature_enabled": {(n,): float(on) for n, on in loaded.config.features.items()},
                "cni_exporter_capability": {
                    (f"cap_{privileges.NAMES[number]}",): 1.0
                    for number in privileges.held()
                    if number < len(privileges.NAMES)
                },
            }
        )


def _named(rule: Learned, store: Store) -> page.LearnedRule:
    """Name the container of a rule."""
    names = store.names_of(rule.subject) if rule.kind == "container" else (rule.subject,)
    name = "/".join(filter(None, names)) or rule.subject
    return page.LearnedRule(rule.kind, name, rule.class_, rule.ratio, rule.expires_in)


def _controls(config: Config, programs: kernel.Programs | None) -> Kernel | None:
    """Open what steers the kernel programs; what is counted by key is settled here for good."""
    if not programs or not programs.attached:
        return None
    counted = load_config.counted(config.load_config) if config.general.enable_load_management else ()
    try:
        return Kernel(programs, Controls(programs.manifest.maps, counted))
    except OSError as error:
        log.warning("no load management in the kernel: its maps cannot be written: %s", error.strerror)
        return None


def revision() -> str:
    """Give the source revision that the build noted, or an empty text."""
    noted = Path(__file__).with_name("REVISION")
    return noted.read_text().strip() if noted.is_file() else ""


def run(loaded: Loaded, load: Callable[[], Loaded]) -> int:
    """Run until SIGTERM or SIGINT; SIGHUP loads the configuration again. The answer is the exit status."""
    stop, reload_ = threading.Event(), threading.Event()
    wake = threading.Event()
    noted = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: reload_}

    def note(number: int, _frame: object) -> None:
        noted[signal.Signals(number)].set()
        wake.set()

    for number in noted:
        signal.signal(number, note)
    programs = load_programs(loaded.config)
    kept = {privileges.NAMES.index(name) for name in loaded.config.general.keep_capabilities}
    if programs and programs.attached and not programs.manifest.unprivileged:
        kept.add(privileges.BPF)  # before 5.19 a map's descriptor is not enough to read it
    left = privileges.keep(frozenset(kept))
    log.info("capabilities kept: %s", ", ".join(privileges.NAMES[number] for number in sorted(left)) or "none")
    exporter = Exporter(loaded, programs)
    server = exporter.serve()
    exporter.start()
    log.info("cni-exporter %s listens on %s, port %d", __version__, *server.address)
    while not stop.is_set():
        wake.wait(_LOOK)
        wake.clear()
        if reload_.is_set():
            reload_.clear()
            exporter.reload(load)
        exporter.look_at_ourselves()
    exporter.stop()
    return 0
