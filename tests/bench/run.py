"""What the exporter costs on this machine, as a ratio to a reference that is measured in the same run.

Flows in: the names of cases (none: all). Flows out: a table, and build/bench.json. Each case opens two probes, ours and
the reference's; they are read in turn, in alternating order, so that both meet the same noise, and medians are shown.
"""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import throughput
from deciding import CASES as DECIDING
from watching import CASES as WATCHING

ROOT = Path(__file__).parents[2]
EXPORTER = Path(sys.executable).with_name("cni-exporter")
ROUNDS = 11
_START_SECONDS = 20.0
_SETTLED = 4.0  # seconds until 250 containers have their names
_ENCODED = "cni_veth_receive_bytes_total"
_STREAM = 3 << 30  # bytes: two seconds or so, which scrapes fall into
_STREAMS = 80  # pairs of them: what is looked for is less than the difference between two
_BETWEEN_SCRAPES = 1.2  # longer than any monitor's max_age, so that each scrape pays for its update

Probe = Callable[[], float]
"""One reading, in the case's unit."""
Pair = tuple[Probe, Probe]
"""Ours, the reference."""


@dataclass(frozen=True, slots=True)
class Result:
    """Medians of one case; ratio is the median of the rounds' ratios, below 1 where the exporter costs less.

    Half of the rounds' ratios lie between `lower` and `upper`.
    """

    case: str
    unit: str
    rounds: int
    ours: float
    reference: float
    ratio: float
    lower: float
    upper: float


class Absent(Exception):  # noqa: N818 - an answer, not a failure
    """The reference of a case is not installed."""


# What is measured


def cpu_seconds(pid: int) -> float:
    """CPU seconds that all threads of a running process have used, to the nanosecond (clock_getcpuclockid(3))."""
    return time.clock_gettime(_cpu_clock(pid))


def _cpu_clock(pid: int) -> int:
    clock = ctypes.c_int()
    error = ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise OSError(error, f"process {pid} has no CPU clock")
    return clock.value


def resident_bytes(pid: int) -> float:
    """Resident memory of a process (VmRSS, proc_pid_status(5))."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return float(line.split()[1]) * 1024
    raise ProcessLookupError(f"process {pid} is gone")


def command_cpu_seconds(*command: str) -> float:
    """CPU seconds of a command and its children from start to end; CalledProcessError where it fails."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_utime + usage.ru_stime


# What is run


@dataclass(frozen=True, slots=True)
class Server:
    """A running exporter of either make."""

    pid: int
    url: str

    def scrape(self) -> None:
        """Read one whole scrape as Prometheus would ask for it."""
        with urllib.request.urlopen(self.url, timeout=30) as answer:  # noqa: S310 - our own loopback address
            answer.read()

    def scrape_cpu_seconds(self) -> float:
        """CPU seconds that the server needs from one scrape's pause to its end."""
        time.sleep(_BETWEEN_SCRAPES)
        before = cpu_seconds(self.pid)
        self.scrape()
        return cpu_seconds(self.pid) - before


@contextlib.contextmanager
def serving(*command: str) -> Iterator[Server]:
    """Run a server on a free loopback port, put for `{address}` in the command. TimeoutError where it never answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = subprocess.Popen([part.format(address=address) for part in command], stderr=subprocess.DEVNULL)
    try:
        server = Server(process.pid, f"http://{address}/metrics")
        _await(server, process)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            server.scrape()
            return
        time.sleep(0.1)
    raise TimeoutError(f"{process.args!r} does not answer (exit status {process.returncode})")


def our_exporter() -> contextlib.AbstractContextManager[Server]:
    """The exporter of this tree, as a user runs it."""
    return serving(str(EXPORTER), "run", "--web.listen-address", "{address}")


def node_exporter() -> contextlib.AbstractContextManager[Server]:
    """Prometheus' node_exporter with the two collectors that read network devices."""
    program = shutil.which("prometheus-node-exporter") or shutil.which("node_exporter")
    if not program:
        raise Absent("prometheus-node-exporter is not installed; as root: tests/install bench")
    collectors = ("--collector.disable-defaults", "--collector.netclass", "--collector.netdev")
    return serving(program, *collectors, "--web.listen-address={address}")


# Cases


@contextlib.contextmanager
def scrape() -> Iterator[Pair]:
    """One full scrape (update and encoding), against node_exporter's netclass and netdev."""
    with node_exporter() as reference, our_exporter() as ours:
        yield ours.scrape_cpu_seconds, reference.scrape_cpu_seconds


@contextlib.contextmanager
def memory() -> Iterator[Pair]:
    """Resident memory after the first scrapes, against node_exporter's."""
    with node_exporter() as reference, our_exporter() as ours:
        for server in (ours, reference) * 3:
            server.scrape_cpu_seconds()
        yield lambda: resident_bytes(ours.pid), lambda: resident_bytes(reference.pid)


@contextlib.contextmanager
def crowded_scrape() -> Iterator[Pair]:
    """One full scrape with 1,000 veths of 250 containers on the host, against node_exporter's of the same host."""
    with crowd(), node_exporter() as reference, our_exporter() as ours:
        time.sleep(_SETTLED)
        yield ours.scrape_cpu_seconds, reference.scrape_cpu_seconds


@contextlib.contextmanager
def crowded_memory() -> Iterator[Pair]:
    """Resident memory with 1,000 veths of 250 containers, against node_exporter's."""
    with crowd(), node_exporter() as reference, our_exporter() as ours:
        time.sleep(_SETTLED)
        for server in (ours, reference) * 3:
            server.scrape_cpu_seconds()
        yield lambda: resident_bytes(ours.pid), lambda: resident_bytes(reference.pid)


def crowd() -> contextlib.AbstractContextManager[object]:
    """Make the veths and containers. Raises Absent for who may not."""
    if os.geteuid() != 0:
        raise Absent("namespaces, veths and control groups are made by root alone")
    sys.path.insert(0, str(ROOT / "tests" / "real"))
    from scale import crowded  # noqa: PLC0415 - the tests' own

    return crowded()


@contextlib.contextmanager
def encoding() -> Iterator[Pair]:
    """10,000 samples with four labels as text, against prometheus_client's encoder."""
    from prometheus_client import generate_latest  # noqa: PLC0415 - the reference
    from prometheus_client.core import CounterMetricFamily  # noqa: PLC0415

    from exporter.exposition import lines  # noqa: PLC0415
    from exporter.metrics import Policy, Store  # noqa: PLC0415

    store = Store(Policy(limits={_ENCODED: 20_000}, grace=0.0))
    store.owned("links").replace({"cni_netns_info": {("1:1", "(host)", "1", "false"): 1.0}})
    store.owned("links").replace({_ENCODED: {("1:1", f"veth{i:08x}"): 1e6 + i for i in range(10_000)}})
    family = CounterMetricFamily(_ENCODED, "Bytes.", labels=("device", "namespace", "pod", "container"))
    for i in range(10_000):
        family.add_metric((f"veth{i:08x}", "", "", "(host)"), 1e6 + i)
    reference = type("Registry", (), {"collect": lambda _: [family]})()

    def ours() -> float:
        began = time.process_time()
        "".join(lines(store.collect(), openmetrics=False)).encode()
        return time.process_time() - began

    def library() -> float:
        began = time.process_time()
        generate_latest(reference)
        return time.process_time() - began

    yield ours, library


@contextlib.contextmanager
def start() -> Iterator[Pair]:
    """The command line up to its help text, against a bare Python."""
    yield (
        lambda: command_cpu_seconds(str(EXPORTER), "run", "--help"),
        lambda: command_cpu_seconds(sys.executable, "-c", "pass"),
    )


@contextlib.contextmanager
def transfer() -> Iterator[Pair]:
    """How long a TCP stream over loopback takes beside an exporter that is scraped each second, against without."""

    def alone() -> float:
        return throughput.transfer_time(_STREAM)

    def watched() -> float:
        with at_work():
            return alone()

    yield watched, alone


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """Run the exporter, and scrape it each second."""
    over = threading.Event()

    def scrape_on(server: Server) -> None:
        while not over.wait(1):
            server.scrape()

    with our_exporter() as server:
        thread = threading.Thread(target=scrape_on, args=(server,))
        thread.start()
        try:
            time.sleep(_BETWEEN_SCRAPES)
            yield
        finally:
            over.set()
            thread.join()


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured, and how often unless the caller says otherwise."""

    unit: str
    opened: Callable[[], contextlib.AbstractContextManager[Pair]]
    """Raises Absent where the reference is not installed."""
    rounds: int = ROUNDS


CASES = {
    "scrape": Case("cpu seconds", scrape),
    "memory": Case("bytes", memory),
    "crowded-scrape": Case("cpu seconds", crowded_scrape),
    "crowded-memory": Case("bytes", crowded_memory),
    "encoding": Case("cpu seconds", encoding),
    "start": Case("cpu seconds", start),
    "transfer": Case("seconds/s", transfer, _STREAMS),
    **{name: Case(unit, opened) for name, (unit, opened) in (DECIDING | WATCHING).items()},
}


# The harness


def measure(name: str, rounds: int = 0) -> Result:
    """Read both probes `rounds` times (0: the case's own) in alternating order, after one that does not count."""
    case = CASES[name]
    rounds = rounds or case.rounds
    ours: list[float] = []
    reference: list[float] = []
    with case.opened() as (probe, reference_probe):
        readings = [(ours, probe), (reference, reference_probe)]
        for index in range(rounds + 1):
            for figures, read in readings if index % 2 else reversed(readings):
                figures.append(read())
    pairs = list(zip(ours[1:], reference[1:], strict=True))
    ratios = [mine / other for mine, other in pairs]
    lower, ratio, upper = statistics.quantiles(ratios * 2, n=4)
    return Result(
        case=name,
        unit=case.unit,
        rounds=rounds,
        ours=statistics.median(mine for mine, _ in pairs),
        reference=statistics.median(other for _, other in pairs),
        ratio=ratio,
        lower=lower,
        upper=upper,
    )


def table(results: list[Result]) -> str:
    """Lay the results out for a terminal."""
    lines = [f"{'case':<16}{'unit':<14}{'ours':>14}{'reference':>14}{'ratio':>9}   half of the rounds"]
    for r in results:
        figures = f"{r.ours:>14.6g}{r.reference:>14.6g}{r.ratio:>9.3f}   {r.lower:.3f} to {r.upper:.3f}"
        lines.append(f"{r.case:<16}{r.unit:<14}{figures}")
    return "\n".join(lines)


def main() -> int:
    """Run the cases that are named; exit status 1 where one failed; a reference that is not installed is no failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; none: all")
    parser.add_argument("--rounds", type=int, default=0, help="readings of each probe [the case's own]")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    results: list[Result] = []
    not_measured: dict[str, str] = {}
    failed = False
    for case in options.cases or CASES:
        try:
            results.append(measure(case, options.rounds))
        except (Absent, OSError, subprocess.CalledProcessError) as reason:
            not_measured[case] = str(reason)
            failed |= not isinstance(reason, Absent)
            print(f"{case}: not measured: {reason}", file=sys.stderr)
    print(table(results))
    machine = {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    target = ROOT / "build" / "bench.json"
    target.parent.mkdir(exist_ok=True)
    figures = {"machine": machine, "results": [asdict(result) for result in results], "not_measured": not_measured}
    target.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
