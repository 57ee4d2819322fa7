"""What all tests share: real components on demand, golden files, repeatable properties, a host left as it was found.

Flows in: the machine (commands, identity, links, namespaces, processes) and CI / REQUIRE_REAL. Flows out: fixtures
`need` and `golden`, the order of the tests, and a failed run where something was left behind.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
_ADMINISTRATION = "/usr/local/sbin:/usr/sbin:/sbin"
_ALTERNATIVES = {
    "alertmanager": ("prometheus-alertmanager", "alertmanager"),
    "chromium": ("chromium", "chromium-browser", "google-chrome"),
    "node_exporter": ("prometheus-node-exporter", "node_exporter"),
    "vim": ("vim", "vim.tiny"),
}
_PLUGIN_DIRECTORIES = (Path("/opt/cni/bin"), Path("/usr/lib/cni"))

# Every process that a test starts inherits this, also one that has left its parent.
_SESSION = f"TEST_SESSION_OF_CNI_EXPORTER={os.getpid()}"
_GRACE_SECONDS = 5.0

_RAN_REAL = pytest.StashKey[bool]()
_BEFORE: pytest.StashKey[set[str]] = pytest.StashKey()
_LEFT: pytest.StashKey[list[str]] = pytest.StashKey()

settings.register_profile(
    "repeatable",  # the same examples on each run and machine: a failure is a finding, never chance
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("search", parent=settings.get_profile("repeatable"), derandomize=False, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


# Real components


def required() -> bool:
    """Whether a real component that is missing is a failure (CI=true or REQUIRE_REAL=1) rather than a skip."""
    return os.environ.get("CI") == "true" or os.environ.get("REQUIRE_REAL") == "1"


def lacking(reason: str) -> NoReturn:
    """End the test because the machine lacks something: a failure where it is required, else a skip with the reason."""
    if required():
        pytest.fail(f"{reason} (required by CI=true or REQUIRE_REAL=1)", pytrace=False)
    pytest.skip(reason)


def need(component: str) -> str:
    """Path of a real component, or the end of the test.

    `component` is a command; `alertmanager`, `chromium`, `node_exporter` and `vim` under any of their usual names;
    `busybox` that runs without a loader; `cni-plugins`, answered with their directory; `root`, answered with the empty
    string.
    """
    if component == "root":
        return "" if os.geteuid() == 0 else lacking("needs root")
    if component == "cni-plugins":
        found = next((str(place) for place in _PLUGIN_DIRECTORIES if (place / "bridge").exists()), None)
    else:
        path = f"{os.environ.get('PATH', '')}:{_ADMINISTRATION}"
        names = _ALTERNATIVES.get(component, (component,))
        found = next((where for name in names if (where := shutil.which(name, path=path))), None)
        if component == "busybox" and found and not _is_static(found):
            found = None
    return found or lacking(f"needs {component}; as root: tests/install")


def _is_static(program: str) -> bool:
    listing = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=10, check=False)
    return "=>" not in listing.stdout


@pytest.fixture(name="need", scope="session")
def _need() -> Callable[[str], str]:
    """Give tests and fixtures the function `need`."""
    return need


@pytest.fixture(name="lacking", scope="session")
def _lacking() -> Callable[[str], NoReturn]:
    """Give tests and fixtures the function `lacking`, for what only a probe can tell."""
    return lacking


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Look for what `@pytest.mark.real("dockerd", "root")` names before any fixture starts something."""
    for mark in item.iter_markers("real"):
        for component in mark.args:
            need(component)
        item.config.stash[_RAN_REAL] = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in tests/real, and run it last: what is cheap and exact fails first."""
    order = {"unit": 0, "golden": 1, "real": 2}
    for item in items:
        if item.path.is_relative_to(TESTS / "real"):
            item.add_marker("real")
    items.sort(key=lambda item: next((rank for name, rank in order.items() if TESTS / name in item.path.parents), 0))


# Golden files


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option behind `make golden`."""
    parser.addoption(
        "--renew-golden", action="store_true", help="write the golden files instead of comparing with them"
    )


@pytest.fixture
def renew_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written instead of compared with."""
    return bool(request.config.getoption("--renew-golden"))


@pytest.fixture
def golden(renew_golden: bool) -> Callable[[str, str], None]:  # noqa: FBT001 - a fixture is asked for by name
    """Compare a text with tests/golden/NAME, or write it there under --renew-golden."""

    def compare(name: str, text: str) -> None:
        path = TESTS / "golden" / name
        if renew_golden:
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{name} does not exist yet: make golden"
        assert text.splitlines() == path.read_text(encoding="utf-8").splitlines(), (
            f"{name} differs: make golden renews it"
        )

    return compare


# The host is left as it was found


def _links() -> set[str]:
    return {f"link {path.name}" for path in Path("/sys/class/net").iterdir() if path.is_symlink()}


def _named_namespaces() -> set[str]:
    directory = Path("/run/netns")
    return {f"network namespace {path.name}" for path in directory.iterdir()} if directory.is_dir() else set()


def _processes() -> set[str]:
    """Describe the live processes that this session started: its descendants, and those that found another parent."""
    own = psutil.Process()
    found = own.children(recursive=True)
    found += [process for process in psutil.process_iter() if process != own and _is_signed(process.pid)]
    lines = set()
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            lines.add(f"process {process.pid} {' '.join(process.cmdline())[:120]}")
    return lines


def _is_signed(pid: int) -> bool:
    try:
        return _SESSION.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone in between, or another user's
        return False


def _traces(config: pytest.Config) -> set[str]:
    """Give the links and namespaces that are new since the start, where real tests ran, which alone make them."""
    if not config.stash[_RAN_REAL]:
        return set()
    before: set[str] = config.stash[_BEFORE]
    return (_links() | _named_namespaces()) - before


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remember links and namespaces, and sign what this session starts."""
    name, _, value = _SESSION.partition("=")
    os.environ[name] = value
    before: set[str] = _links() | _named_namespaces()
    session.config.stash[_BEFORE] = before
    session.config.stash[_RAN_REAL] = False
    session.config.stash[_LEFT] = []


@pytest.hookimpl(trylast=True)  # after the last fixtures are torn down
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run that leaves a process behind or, where real components are required, a link or network namespace.

    The kernel frees some of them a moment after their owner is gone, hence the grace.
    """
    config = session.config
    deadline = time.monotonic() + _GRACE_SECONDS
    while ((processes := _processes()) or _traces(config)) and time.monotonic() < deadline:
        time.sleep(0.1)
    traces = _traces(config)
    config.stash[_LEFT] = sorted(processes | traces)
    # Elsewhere than on a machine of the tests' own, somebody else's containers come and go.
    if (processes or (traces and required())) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name what was left behind."""
    for what in config.stash[_LEFT]:
        severity = "ERROR" if required() or what.startswith("process") else "warning"
        terminalreporter.write_line(f"{severity}: left behind by the tests, or made by somebody else meanwhile: {what}")
