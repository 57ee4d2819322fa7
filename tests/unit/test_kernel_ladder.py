"""A probe's ladder without a kernel: what is compiled for it, where it ends up, what it says of the way."""

import errno
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter import privileges
from exporter.contract import Unsupported
from exporter.monitors.kernel import attach
from exporter.monitors.kernel.compiler import KERNEL_FUNCTION, OWN_FUNCTION, SHARED, Module
from exporter.monitors.kernel.ladder import Climb
from exporter.monitors.kernel.shapes import Hook, Probe, Program, Rung

FENTRY = Rung("fentry", (Hook("fexit", "by_return", ("made",)), Hook("fentry", "by_entry", ("gone",))))
KPROBE = Rung("kprobe", (Hook("kprobe", "probed", ("made",)),), "what fails late")
NEW = Rung("tp_btf", (Hook("tp_btf", "with_reason", ("dropped",)),), needs="reasons")
OLD = Rung("tp_btf", (Hook("tp_btf", "without_reason", ("dropped",)),), "the reason")

OPEN = Path("/proc/self/fd")
Refuse = Callable[..., None]


class Types:
    """A kernel that has no types at all."""

    def knows(self, _: str) -> bool:
        return False


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Have hooks refused, by function: when they are tried out, or when they are attached."""
    early: dict[str, Exception] = {}
    late: dict[str, Exception] = {}

    def try_out(hook: Hook, _: object) -> None:
        if hook.function in early:
            raise early[hook.function]

    def attach_at(hook: Hook, code: bytes, _: object) -> attach.Attached:
        assert code == _code(hook.function)
        if hook.function in late:
            raise late[hook.function]
        return attach.Attached(os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_RDONLY), hook.symbols[0])

    monkeypatch.setattr(attach, "try_out", try_out)
    monkeypatch.setattr(attach, "attach", attach_at)
    monkeypatch.setattr(privileges, "held", lambda: frozenset({privileges.SYS_ADMIN}))
    return lambda function, error, *, late_=False: (late if late_ else early).update({function: error})


def _climb(*rungs: Rung) -> Climb:
    probe = Probe("probe", rungs)
    return Climb(Program("program", (), (), (probe,)), probe, Types())  # type: ignore[arg-type] - has what is used


def _code(function: str) -> bytes:
    return function.encode().ljust(32, b"\0")  # four instructions


def _compiled(*functions: str) -> Module:
    module = Module()
    module.add({name: _code(name) for name in functions}, functions)
    return module


def _close(climb: Climb) -> None:
    for one in climb.attached:
        os.close(one.program)
        os.close(one.link)


@pytest.mark.usefixtures("refuse")
def test_the_best_rung_is_taken_where_nothing_is_refused() -> None:
    """Only its functions are asked for, and its standing has nothing to explain."""
    climb = _climb(FENTRY, KPROBE)
    climb.look()
    assert climb.functions == ("by_return", "by_entry")
    climb.hold(_compiled(*climb.functions))
    assert climb.standing
    assert (climb.standing.rung, climb.standing.hook, climb.standing.attached) == ("fentry", "made,gone", True)
    assert (climb.standing.fallback, climb.standing.reason) == (False, "")
    assert climb.functions == ()
    _close(climb)


def test_a_rung_that_is_known_to_be_refused_is_not_compiled(refuse: Refuse) -> None:
    """One hook that the kernel refuses beforehand is enough; the standing says which rung was passed over, and why."""
    refuse("by_entry", Unsupported("this kernel has no function gone"))
    climb = _climb(FENTRY, KPROBE)
    climb.look()
    assert climb.functions == ("probed",)
    climb.hold(_compiled("probed"))
    assert climb.standing
    assert (climb.standing.rung, climb.standing.fallback) == ("kprobe", True)
    assert climb.standing.reason == "fentry: this kernel has no function gone"
    assert climb.standing.cannot_see == "what fails late"
    _close(climb)


def test_a_rung_for_newer_kernels_is_not_tried(refuse: Refuse) -> None:
    """A type that the kernel lacks is the reason; the rung below is as good as it gets."""
    refuse("with_reason", AssertionError("it is not asked"))
    climb = _climb(NEW, OLD)
    climb.look()
    assert climb.functions == ("without_reason",)
    assert climb.standing is None


def test_a_refusal_at_the_last_moment_leads_to_the_next_rung(refuse: Refuse) -> None:
    """What was attached of the rung is let go; the next one's functions are asked for then."""
    refuse("by_entry", OSError(errno.EBUSY, "attaching at gone: busy"), late_=True)
    climb = _climb(FENTRY, KPROBE)
    climb.look()
    open_before = len(list(OPEN.iterdir()))
    climb.hold(_compiled(*climb.functions))
    assert len(list(OPEN.iterdir())) == open_before
    assert climb.standing is None
    climb.look()
    assert climb.functions == ("probed",)
    climb.hold(_compiled("probed"))
    assert climb.standing
    assert climb.standing.reason == "fentry: attaching at gone: busy"
    _close(climb)


@pytest.mark.usefixtures("refuse")
def test_a_function_that_was_compiled_out_is_a_refusal() -> None:
    """A kernel for which a rung has no code takes the next."""
    climb = _climb(KPROBE, OLD)
    climb.look()
    climb.hold(_compiled())
    climb.look()
    assert climb.functions == ("without_reason",)


def _call(number: int, source: int = 0) -> bytes:
    """Write struct bpf_insn of a call: code, registers, offset, immediate."""
    return struct.pack("=BBhi", 0x85, source << 4 if sys.byteorder == "little" else source, 0, number)


EXIT = struct.pack("=BBhi", 0x95, 0, 0, 0)


def test_calls_of_other_functions_are_linked() -> None:
    """A helper's stays, the kernel's gets its BTF id, ours the distance to the one copy behind."""
    module = Module()
    decide = OWN_FUNCTION + SHARED.index("rules_decide")
    program = _call(5) + _call(decide) + _call(KERNEL_FUNCTION + 77) + _call(decide) + EXIT
    shared = _call(KERNEL_FUNCTION + 78) + EXIT
    module.add({"drops": program, "rules_decide": shared}, ["drops"])
    linked = _call(5) + _call(3, 1) + _call(77, 2) + _call(1, 1) + EXIT + _call(78, 2) + EXIT
    assert module.code("drops") == linked
    module.add({"tcp_state": _call(decide + 1) + EXIT}, ["tcp_state"])
    with pytest.raises(Unsupported, match=f"{SHARED[SHARED.index('rules_decide') + 1]} does not fit this kernel"):
        module.code("tcp_state")


def test_a_probe_without_a_rung_has_every_reason_once(refuse: Refuse) -> None:
    """All refusals in order, what two rungs say alike once; remedies behind; nothing is to be compiled."""
    refuse("by_return", OSError(errno.EPERM, "the kernel refuses to load it"))
    refuse("probed", Unsupported("no kprobes", "another kernel"))
    refuse("without_reason", Unsupported("no tracepoint", "another kernel"))
    climb = _climb(FENTRY, KPROBE, OLD, OLD)
    climb.look()
    assert climb.standing
    assert not climb.standing.attached
    assert climb.standing.reason == "fentry: the kernel refuses to load it; kprobe: no kprobes; tp_btf: no tracepoint"
    assert climb.standing.remedy == "another kernel"
    assert climb.functions == ()


@pytest.mark.parametrize(("held", "helps"), [({privileges.BPF}, True), ({privileges.PERFMON}, False)])
def test_a_missing_capability_is_named(
    held: set[int],
    helps: bool,  # noqa: FBT001 - a column of the table
    refuse: Refuse,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """EPERM is a matter of rights only where they are missing: root, too, is refused by a locked-down kernel."""
    monkeypatch.setattr(privileges, "held", lambda: frozenset(held))
    refuse("probed", OSError(errno.EPERM, "the kernel refuses to load it"))
    climb = _climb(KPROBE)
    climb.look()
    assert climb.standing
    assert ("CAP_PERFMON" in climb.standing.remedy) == helps
