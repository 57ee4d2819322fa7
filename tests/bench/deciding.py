"""What one decision of the admission costs, against logging's on the same text by the same patterns.

Flows in: how many patterns the user has. Flows out: nanoseconds of a call, the median and the 99th percentile. None of
the patterns is found, so that all are looked for; there is a limit, and half is kept. logging's way to say no is a
filter that searches a record's message: it makes a record of each event, the admission a text and an account.
"""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator

from exporter.load.admission import Admission
from exporter.load.filters import Rule, described

_CALLS = 20_000
"""Calls of one reading: two hundred of them are beyond the 99th percentile."""
_EVENT = {"kind": "start", "container_id": "0123456789abcdef" * 4, "runtime": "docker"}
"""What the runtimes' monitor tells of a container."""
_TEXT = described("container", _EVENT)


def _patterns(count: int) -> list[re.Pattern[str]]:
    return [re.compile(rf"kind (die|oom), container_id {number:02x}") for number in range(count)]


def _admission(patterns: list[re.Pattern[str]]) -> Callable[[], object]:
    admission = Admission()
    admission.configure((Rule(pattern.pattern, "info", [pattern]) for pattern in patterns), 10_000)
    admission.steer({"container": 0.5})
    return lambda: admission.should_sample("container", _EVENT)


def _logging(patterns: list[re.Pattern[str]]) -> Callable[[], object]:
    def unwanted(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return any(pattern.search(text) for pattern in patterns)

    logger = logging.Logger("bench")  # noqa: LOG001 - this case alone has its filter
    logger.addHandler(logging.NullHandler())
    logger.addFilter(unwanted)
    return lambda: logger.info(_TEXT)


def _nanoseconds(call: Callable[[], object], share: float) -> float:
    """Time each of many calls; return what `share` of them is below. The clock's own 0.1 us is in it."""
    clock, costs = time.perf_counter_ns, []
    for _ in range(_CALLS):
        began = clock()
        call()
        costs.append(clock() - began)
    return float(sorted(costs)[int(share * _CALLS)])


def _case(count: int, share: float) -> Callable[[], contextlib.AbstractContextManager[tuple[Callable[[], float], ...]]]:
    @contextlib.contextmanager
    def opened() -> Iterator[tuple[Callable[[], float], ...]]:
        ours, reference = _admission(_patterns(count)), _logging(_patterns(count))
        yield lambda: _nanoseconds(ours, share), lambda: _nanoseconds(reference, share)

    return opened


CASES = {f"decide-{count}-p{share}": ("ns", _case(count, share / 100)) for count in (0, 3, 20) for share in (50, 99)}
"""For tests/bench/run.py: by the number of patterns and the percentile."""
