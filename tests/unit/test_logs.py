"""The log: its two forms, what it keeps to itself, and how it holds floods back."""

import io
import json
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter import logs
from exporter.logs import Lines, RepeatFilter, setup
from exporter.privacy import DEFAULT, REDACTED, Rules

TOKEN = "gh" + "p_16C7e42F292c6912E7710c838347Ae178B4a"


class Clock:
    """Time that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put Python's hooks for uncaught exceptions back after the test."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


@pytest.mark.usefixtures("hooks")
def test_uncaught_exceptions_pass_the_gate(capsys: pytest.CaptureFixture[str]) -> None:
    """Python prints what nobody caught, secrets included: in a thread, in a finaliser, at the end of the program."""

    class Careless:
        def __del__(self) -> None:
            raise ValueError(TOKEN)

    def fail() -> None:
        raise ValueError(TOKEN)

    stream = io.StringIO()
    setup("info", "logfmt", stream=stream)
    logs.take_the_uncaught()
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    Careless()
    sys.excepthook(ValueError, ValueError(TOKEN), None)
    assert stream.getvalue().count("nobody caught this") == 3
    assert TOKEN not in stream.getvalue() + "".join(capsys.readouterr())


def test_a_secret_at_the_cut_of_a_long_message_is_not_halved() -> None:
    """What is cut before it is judged takes its last word along, also where redaction has made room behind it."""
    stream = io.StringIO()
    setup("info", "logfmt", stream=stream)
    block = "-----BEGIN X" + "-----" + "A" * 15000 + "-----END X-----"
    logging.getLogger("exporter.test").warning("%s", block + " " + "x " * 650 + "a" * 20 + TOKEN)
    assert "ghp_" not in stream.getvalue()
    assert REDACTED in stream.getvalue()


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, put back afterwards."""
    found, ours = logging.getLogger(), logging.getLogger("exporter")
    before = (found.level, ours.level, list(found.handlers))
    yield found
    found.setLevel(before[0])
    ours.setLevel(before[1])
    for handler in list(found.handlers):
        if handler not in before[2]:
            found.removeHandler(handler)
    logging.captureWarnings(capture=False)


def record(text: str, *values: object, name: str = "exporter.links", level: int = logging.INFO) -> logging.LogRecord:
    """Make a record of a moment that is known."""
    made = logging.LogRecord(name, level, "file.py", 1, text, values, None)
    made.created = 1_700_000_000.25
    return made


def lines(*records: logging.LogRecord, form: str = "logfmt", rules: Rules = DEFAULT) -> list[str]:
    """Return what a handler writes for some records."""
    stream = io.StringIO()
    handler = Lines(form, rules, stream, Clock())
    for one in records:
        handler.handle(one)
    return stream.getvalue().splitlines()


def test_logfmt() -> None:
    """One line: moment in UTC, level, logger, and the message, quoted."""
    assert lines(record('found "%s"\nin %d ms', "eth0", 3)) == [
        r'ts=2023-11-14T22:13:20.250Z level=info logger=exporter.links msg="found \"eth0\"\nin 3 ms"',
    ]


def test_json() -> None:
    """One object per line, with the same parts."""
    (line,) = lines(record("größer %s", "x", level=logging.WARNING), form="json")
    assert json.loads(line) == {
        "ts": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "logger": "exporter.links",
        "msg": "größer x",
    }


@pytest.mark.parametrize("form", ["logfmt", "json"])
def test_no_secret_is_written(form: str) -> None:
    """Secrets in the template, the arguments, the traceback and the logger's name are redacted."""
    error = OSError(f"cannot reach https://user:hunter2@example.com with {TOKEN}")
    made = record("password=%s and %s", "hunter2", TOKEN, name=f"exporter.{TOKEN}")
    made.exc_info = (type(error), error, None)
    made.stack_info = f"Stack: {TOKEN}"
    (line,) = lines(made, form=form)
    assert "hunter2" not in line
    assert TOKEN not in line
    assert line.count(REDACTED) >= 5
    assert "@example.com" in line
    assert "OSError" in line


def test_own_rules_apply() -> None:
    """What the configuration calls secret is redacted in the log too."""
    (line,) = lines(record("project orion starts"), rules=Rules(deny_values=["orion"]))
    assert "orion" not in line


def test_long_messages_are_cut_and_no_secret_shows_at_the_cut() -> None:
    """A megabyte of message is one bounded line."""
    (line,) = lines(record("%s %s", "ab " * 2728, TOKEN * 10_000))
    assert len(line) < 9000
    assert line.endswith('…"')
    assert "p_16C7" not in line


def test_arguments_that_do_not_fit_are_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """The template is written, the arguments are not, and nothing goes past the redaction."""

    class Wild:
        def __str__(self) -> str:
            raise RuntimeError(TOKEN)

    found = lines(record("a %d", "x"), record("b %s %s", 1), record("c %s", Wild()))
    assert [re.sub(".*msg=", "", line) for line in found] == [
        '"a %d (its arguments do not fit: TypeError)"',
        '"b %s %s (its arguments do not fit: TypeError)"',
        '"c %s (its arguments do not fit: RuntimeError)"',
    ]
    assert capsys.readouterr() == ("", "")


@settings(deadline=None)
@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=80), st.sampled_from(["logfmt", "json"]))
def test_any_text_is_one_line(text: str, form: str) -> None:
    """Control characters, line ends and lone surrogates cannot break a line or its encoding."""
    found = lines(record("%s", text), form=form)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    handler = Lines(form, DEFAULT, stream, Clock())
    handler.handle(record("%s", text))
    written = stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert handler.lost == 0
    assert written.count("\n") == 1
    assert found


def test_a_repeated_message_is_held_back_and_counted() -> None:
    """Five a minute pass, whatever their arguments; when the minute is over, the next line says how many did not."""
    stream, clock = io.StringIO(), Clock()
    handler = Lines("logfmt", DEFAULT, stream, clock)
    for number in range(17):
        handler.handle(record("link %d is gone", number))
    handler.handle(record("another"))
    assert stream.getvalue().count("is gone") == 5
    clock.now += logs.WINDOW
    handler.handle(record("third"))
    told, last = stream.getvalue().splitlines()[-2:]
    assert (
        'level=info logger=exporter.links msg="suppressed 12 more of this message within 60 s: link %d is gone"' in told
    )
    assert 'msg="third"' in last
    for number in range(9):
        handler.handle(record("link %d is gone", number))
    assert stream.getvalue().count('is gone"') == 5 + 1 + 5


def test_messages_of_other_loggers_and_templates_count_apart() -> None:
    """A flood of one message hides no other."""
    repeats = RepeatFilter(Clock())
    assert [repeats.filter(record("a")) for _ in range(7)] == [True] * 5 + [False] * 2
    assert repeats.filter(record("b"))
    assert repeats.filter(record("a", name="exporter.runtimes"))


def test_what_was_held_back_is_told_at_the_end() -> None:
    """Closing the log says what is still to be said."""
    stream = io.StringIO()
    handler = Lines("logfmt", DEFAULT, stream, Clock())
    for _ in range(8):
        handler.handle(record("again"))
    handler.close()
    assert "suppressed 3 more" in stream.getvalue().splitlines()[-1]


def test_known_messages_are_bounded_and_none_is_forgotten_untold() -> None:
    """Ten thousand different messages keep a thousand counts; a count that is dropped is told."""
    repeats = RepeatFilter(Clock())
    for _ in range(6):
        repeats.filter(record("first"))
    for number in range(10_000):
        repeats.filter(record(f"message {number}"))
    assert len(repeats._counts) == 1000
    (told,) = repeats.told()
    assert told.getMessage() == "suppressed 1 more of this message within 60 s: first"
    assert repeats.told() == []


def test_threads_do_not_lose_count() -> None:
    """What passes and what is held back add up, whoever logs."""
    repeats, passed = RepeatFilter(Clock()), []

    def work() -> None:
        passed.extend(repeats.filter(record("same")) for _ in range(500))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sum(passed) == 5
    assert "suppressed 1995 more" in repeats.told(everything=True)[0].getMessage()


def test_a_stream_that_is_gone_is_no_failure() -> None:
    """The log must never stop the exporter: the line is counted as lost."""
    stream = io.StringIO()
    handler = Lines("logfmt", DEFAULT, stream, Clock())
    stream.close()
    handler.handle(record("x"))
    assert handler.lost == 1


def test_setup_follows_the_level_for_our_loggers_alone(root: logging.Logger) -> None:
    """At debug, our own modules speak; client libraries only warn, for they would print whole requests."""
    stream = io.StringIO()
    setup("debug", "logfmt", stream=stream)
    logging.getLogger("exporter.links").debug("ours")
    logging.getLogger("kubernetes.client.rest").debug("response body")
    logging.getLogger("docker").warning("theirs")
    assert [line.split("logger=")[1] for line in stream.getvalue().splitlines()] == [
        'exporter.links msg="ours"',
        'docker msg="theirs"',
    ]


def test_setup_again_replaces_what_was(root: logging.Logger) -> None:
    """A reload changes level and form, and doubles no line."""
    first, second = io.StringIO(), io.StringIO()
    setup("info", "logfmt", stream=first)
    setup("error", "json", stream=second)
    logging.getLogger("exporter").warning("less")
    logging.getLogger("exporter").error("more")
    assert first.getvalue() == ""
    assert [json.loads(line)["msg"] for line in second.getvalue().splitlines()] == ["more"]


def test_warnings_of_python_go_to_the_log(root: logging.Logger) -> None:
    """They do not go past the redaction to standard error."""
    stream = io.StringIO()
    setup("info", "logfmt", stream=stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn(f"token={TOKEN}", stacklevel=1)
    assert "logger=py.warnings" in stream.getvalue()
    assert TOKEN not in stream.getvalue()
