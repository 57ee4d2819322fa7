"""What a user sees, word for word: a full scrape of a host made of fixtures, and the generated pages.

A change of any metric shows up as a difference here; `make golden` takes it over.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import ITEM, A, Daemon
from hosts import NET_DEV, Host

from exporter import config, reference
from exporter.contract import Context, EventSink, Families, Source
from exporter.exposition import lines
from exporter.load.admission import Admission
from exporter.metrics import Policy, Store
from exporter.monitors.namespaces import ProcSource
from exporter.monitors.runtimes.cgroup import CgroupScan
from exporter.monitors.runtimes.containers import Containers
from exporter.monitors.runtimes.docker import DockerEvents
from exporter.monitors.runtimes.record import Metadata

INODE = re.compile(r'\b(netns|inode)="(?:nsid-|proc-)?(\d+)"')
DOCS = Path(__file__).parents[2] / "docs"
MACVLAN = "  mv0: 100 2 0 1 0 0 0 0 300 4 0 0 0 0 0 0\n"
CGROUP = {
    "cpu.stat": "usage_usec 2500000\n",
    "cpu.max": "150000 100000\n",
    "memory.current": "3000\n",
    "memory.stat": "inactive_file 1000\n",
    "memory.max": "9000\n",
    "io.stat": "8:0 rbytes=4096 wbytes=8192 rios=1 wios=2\n",
    "pids.current": "5\n",
}


class Trial:
    """A source's context with a real store behind it."""

    def __init__(self, host: Host, families: Families) -> None:
        self.paths, self.families = host.recorder.paths, families
        self.events: EventSink = Admission()

    def error(self, kind: str, message: str) -> None:
        pytest.fail(f"{kind}: {message}")

    def dropped(self, count: int = 1) -> None:
        pytest.fail(f"{count} dropped")

    def wake(self) -> None:
        """Updates are made by the test."""


@pytest.fixture
def store(host: Host, daemon: Daemon) -> Store:
    """A host with a container on a bridge, an orphan, a pair of its own and a macvlan, as three monitors see it."""
    host.network("web")
    host.process(50, "web", A)
    host.process(51, "web", A)
    host.veth(7, "web", nsid=1)
    host.network("gone")
    host.veth(8, "gone", nsid=2)
    host.veth(9, None, peer=10)
    host.network("direct")
    host.process(60, "direct")
    (host.networks / "direct" / "dev").write_text(NET_DEV + MACVLAN)
    cgroup = host.recorder.paths.sysfs / "fs" / "cgroup" / "docker" / A
    cgroup.mkdir(parents=True)
    (cgroup.parents[1] / "cgroup.controllers").write_text("cpu memory io pids\n")
    for name, content in CGROUP.items():
        (cgroup / name).write_text(content)
    store = Store(Policy(grace=0.0))
    table = Containers(["docker"])
    metadata = Metadata(labels=("app.name",), environment=("LANG",), environment_names=True)
    links = host.open(context=Trial(host, store.owned("links", "lifecycle")))
    sources: list[tuple[str, Source]] = [
        ("namespaces", ProcSource()),
        ("runtimes", CgroupScan(table, resources=True)),
        ("runtimes", DockerEvents(table, metadata, [daemon.path], {})),
    ]
    for owner, source in sources:
        context: Context = Trial(host, store.owned(owner))
        source.open(context)
        source.update()
    links.update()
    host.now += 6
    links.update()
    collected = store.collect()
    sources[2][1].close()
    store.collect = lambda: collected  # type: ignore[method-assign]
    return store


@pytest.mark.parametrize("openmetrics", [False, True], ids=["text", "openmetrics"])
def test_a_full_scrape(store: Store, golden: Callable[[str, str], None], openmetrics: bool) -> None:  # noqa: FBT001
    """Every family of links, runtimes and namespaces, its labels, its values."""
    text = "".join(lines(store.collect(), openmetrics=openmetrics))
    golden("scrape.om" if openmetrics else "scrape.prom", stable(text))


def stable(text: str) -> str:
    """Order the series, and number inodes in the order in which they appear: both differ from run to run."""
    known: dict[str, str] = {}

    def number(found: re.Match[str]) -> str:
        return f'{found[1]}="inode-{known.setdefault(found[2], str(len(known) + 1))}"'

    nameless = ordered(text.splitlines(), lambda line: INODE.sub("", line))
    return "\n".join(ordered([INODE.sub(number, line) for line in nameless], str)) + "\n"


def ordered(written: list[str], key: Callable[[str], str]) -> list[str]:
    """Order the series of each family; families and their heads stay where they are."""
    family, ranked = 0, []
    for line in written:
        family += line.startswith("# HELP")
        ranked.append((family, not line.startswith("#"), "" if line.startswith("#") else key(line), line))
    return [line for *_, line in sorted(ranked, key=lambda row: row[:3])]


@pytest.mark.real("promtool")
def test_promtool_has_nothing_to_say(store: Store, need: Callable[[str], str]) -> None:
    """The names, types and help texts of the golden scrape are as Prometheus wants them."""
    text = "".join(lines(store.collect(), openmetrics=False))
    command = [need("promtool"), "check", "metrics"]
    said = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30, check=False)
    assert (said.returncode, said.stdout + said.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "text"),
    [("metrics.md", reference.metrics()), ("configuration.md", config.reference())],
    ids=["metrics", "configuration"],
)
def test_generated_pages_are_current(name: str, text: str, renew_golden: bool) -> None:  # noqa: FBT001
    """Pages of the documentation that are written from the code say what the code says."""
    if renew_golden:
        (DOCS / name).write_text(text)
    assert (DOCS / name).read_text() == text, "make golden renews it"


def test_the_example_is_of_use() -> None:
    """The container of the fixture carries a secret that must not be in any golden file."""
    assert ITEM["Labels"]["token"] == "s3cret"  # noqa: S105 - it is bait
    for path in Path(__file__).parent.glob("scrape.*"):
        assert "s3cret" not in path.read_text()
        assert "hunter2" not in path.read_text()
