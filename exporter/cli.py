"""The command `cni-exporter`."""

import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from exporter import __version__, config, reference
from exporter.config import ConfigError, Loaded

_HELP = {
    "general.role": "What to observe: node or cluster [node].",
    "web.listen_address": "Address of the HTTP server [:10266].",
    "web.config_file": "TLS and authentication of the HTTP server.",
    "log.level": "debug, info, warning or error [info].",
    "log.format": "logfmt or json [logfmt].",
    "paths.procfs": "Where the host's /proc is mounted [/proc].",
    "paths.sysfs": "Where the host's /sys is mounted [/sys].",
}
"""Flags of the configuration's keys, as `config.FLAGS` names them."""

_NAMES = 5.0  # seconds that `topology` waits for names
_RATE = 1.0  # seconds between the two readings that make a rate


class _Problems(click.ClickException):
    """A configuration that cannot be used: every problem, one a line."""

    exit_code = 1

    def show(self, file: Any = None) -> None:  # noqa: ANN401 - click's signature
        click.echo(self.message, err=True, file=file)


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        (
            click.option("--config", "path", type=click.Path(path_type=Path), help="Configuration file, YAML or JSON."),
            click.option("--preset", help=f"Settings to start from: {', '.join(config.PRESETS)}."),
            *(
                click.option(flag, key.replace(".", "__"), help=_HELP[key])
                for key, flag in config.FLAGS.items()
                if key in _HELP
            ),
        )
    ):
        command = option(command)
    return command


def _loader(path: Path | None, preset: str | None, options: dict[str, Any]) -> Callable[[], Loaded]:
    flags = {name.replace("__", "."): value for name, value in options.items() if value is not None}
    return lambda: config.load(path, preset, os.environ, flags)


def _load(path: Path | None, preset: str | None, options: dict[str, Any]) -> Loaded:
    try:
        return _loader(path, preset, options)()
    except ConfigError as error:
        raise _Problems(str(error)) from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="cni-exporter %(version)s")
def main() -> None:
    """Prometheus exporter for container networking: whose veth it is, and what happens to its packets."""


@main.command()
@_options
def run(path: Path | None, preset: str | None, **options: str | None) -> None:
    """Observe this host and answer scrapes until SIGTERM; SIGHUP loads the configuration again."""
    from exporter import daemon, logs, selection  # noqa: PLC0415 - other commands need none of them

    loaded = _load(path, preset, options)
    logs.setup(loaded.config.log.level, loaded.config.log.format, selection.privacy_rules(loaded.config))
    logs.take_the_uncaught()
    try:
        status = daemon.run(loaded, _loader(path, preset, options))
    except OSError as error:
        raise click.ClickException(str(error)) from None
    sys.exit(status)


@main.command()
@_options
def check(path: Path | None, preset: str | None, **options: str | None) -> None:
    """Say, feature by feature, how this host can be observed; status 0 when `run` would work."""
    from exporter import probe  # noqa: PLC0415 - as above

    logging.disable(logging.CRITICAL)  # each finding stands in the table
    loaded = _load(path, preset, options)
    findings = probe.findings(loaded.config)
    click.echo(probe.as_text(findings))
    sys.exit(0 if all(finding.usable for finding in findings) else 1)


@main.command()
@_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def topology(path: Path | None, preset: str | None, *, as_json: bool, **options: str | None) -> None:
    """Draw node, bridges, veths and containers with their rates, as they are now."""
    from exporter import topology as drawing  # noqa: PLC0415 - as above
    from exporter.daemon import Exporter  # noqa: PLC0415
    from exporter.traffic import Rates  # noqa: PLC0415

    logging.disable(logging.CRITICAL)
    exporter = Exporter(_load(path, preset, options))
    exporter.start()
    try:
        deadline = time.monotonic() + _NAMES
        while time.monotonic() < deadline and not exporter.settled():
            time.sleep(0.05)
        rates = Rates()
        rates.update(exporter.store.read)
        time.sleep(_RATE)
        exporter.refresh()
        rates.update(exporter.store.read)
        tree = drawing.build(exporter.store.read, socket.gethostname(), rates)
    finally:
        exporter.stop()
    width = shutil.get_terminal_size((120, 24)).columns
    click.echo(json.dumps(drawing.as_json(tree), indent=2) if as_json else drawing.as_text(tree, width))


@main.command()
@click.option("--class", "classes", multiple=True, metavar="CLASS", help="Events of this class only; repeatable.")
@click.option("--pod", default="", metavar="NAMESPACE/NAME", help="Events of this pod only.")
@click.option("--container", default="", metavar="NAME", help="Events of this container only.")
@click.option("--json", "as_json", is_flag=True, help="Print the feed's own JSON lines.")
@click.option(
    "--socket",
    "path",
    type=click.Path(path_type=Path),
    envvar="CNI_EXPORTER_FEED_SOCKET",
    help="The feed's socket [/run/cni-exporter/events.sock].",
)
@click.option("--count", type=click.IntRange(min=1), help="End after so many events.")
@click.option("--for", "seconds", type=click.FloatRange(min=0.0), help="End after so many seconds.")
def events(  # noqa: PLR0913 - an argument per option
    classes: tuple[str, ...],
    pod: str,
    container: str,
    path: Path | None,
    count: int | None,
    seconds: float | None,
    *,
    as_json: bool,
) -> None:
    """Follow the live events of the exporter that runs here, until Ctrl-C."""
    from exporter import follow  # noqa: PLC0415 - as above

    request = {"class": list(classes), "pod": pod, "container": container}
    shown = 0
    try:
        for record in follow.follow(path or follow.find_socket(), request, seconds):
            if as_json and "following" not in record:
                click.echo(json.dumps(record, ensure_ascii=False))
            elif not as_json:
                click.echo(follow.as_text(record), err="lost" in record)
            shown += "class" in record
            if shown == count:
                break
    except follow.Ended as ended:
        raise click.ClickException(str(ended)) from None
    except KeyboardInterrupt:
        click.echo(err=True)


@main.command()
def metrics() -> None:
    """Print the reference of metric families."""
    click.echo(reference.metrics(), nl=False)


@main.group(name="config")
def config_() -> None:
    """Show the configuration in force, or what one may hold."""


@config_.command()
@_options
def show(path: Path | None, preset: str | None, **options: str | None) -> None:
    """Print the effective configuration, and where each value that is not a default came from."""
    click.echo(config.show(_load(path, preset, options)), nl=False)


@config_.command()
def schema() -> None:
    """Print the JSON schema of the configuration file."""
    click.echo(json.dumps(config.schema(), indent=2))
