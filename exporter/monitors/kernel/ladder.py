"""A probe's way down its ladder: from the best rung to the first that this kernel takes.

Flows in: a probe, the kernel's types, compiled functions. Flows out: descriptors of what is attached, and a standing
with every refusal on the way. What a kernel refuses is mostly known before anything is compiled: only the functions of
a rung that may hold are.
"""

import errno
import os
from collections.abc import Iterable

from exporter import privileges
from exporter.contract import Unsupported
from exporter.host.btf import Btf
from exporter.monitors.kernel import attach
from exporter.monitors.kernel.compiler import Module
from exporter.monitors.kernel.handover import Standing
from exporter.monitors.kernel.shapes import Hook, Probe, Program, Rung


class Climb:
    """One probe; `standing` is None as long as a rung is left to be tried."""

    def __init__(self, program: Program, probe: Probe, types: Btf) -> None:
        """Begin at the best rung."""
        self.program = program
        self.probe = probe
        self.standing: Standing | None = None
        self.attached: list[attach.Attached] = []
        self._types = types
        self._rungs = list(enumerate(probe.rungs))
        self._refusals: list[str] = []
        self._remedies: list[str] = []

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions that the rung at hand needs; none once it is settled."""
        return () if self.standing else tuple(dict.fromkeys(hook.function for hook in self._rung.hooks))

    @property
    def _rung(self) -> Rung:
        return self._rungs[0][1]

    def look(self) -> None:
        """Pass over the rungs that the kernel refuses whatever the program is."""
        while not self.standing:
            try:
                self._try_out(self._rung)
            except (OSError, Unsupported) as error:
                self._refuse(error)
            else:
                return

    def _try_out(self, rung: Rung) -> None:
        if rung.needs and not self._types.knows(rung.needs):
            raise Unsupported(f"this kernel has no {rung.needs}")
        for hook in rung.hooks:
            attach.try_out(hook, self._types)

    def settle(self, reason: str, remedy: str = "") -> None:
        """End it without a program."""
        self.standing = Standing(self.probe.name, reason=reason, remedy=remedy)

    def hold(self, module: Module) -> None:
        """Attach at the rung at hand, or leave it for the next."""
        if self.standing:
            return
        number, rung = self._rungs[0]
        try:
            self.attached = self._attach_all(rung.hooks, module)
        except (OSError, Unsupported) as error:
            self._refuse(error)
            return
        hook = ",".join(dict.fromkeys(one.symbol for one in self.attached))
        seen = {"cannot_see": rung.cannot_see, "reason": _listed(self._refusals)}
        self.standing = Standing(self.probe.name, hook, rung.name, attached=True, fallback=number > 0, **seen)

    def _attach_all(self, hooks: Iterable[Hook], module: Module) -> list[attach.Attached]:
        attached: list[attach.Attached] = []
        try:
            for hook in hooks:
                attached.append(attach.attach(hook, module.code(hook.function), self._types))  # noqa: PERF401 - closed
        except (OSError, Unsupported):
            for one in attached:
                os.close(one.link)
                os.close(one.program)
            raise
        return attached

    def _refuse(self, error: OSError | Unsupported) -> None:
        """Note why the rung at hand does not hold, and step down."""
        self._refusals.append(f"{self._rung.name}: {reason(error)}")
        self._remedies.append(_remedy(error))
        del self._rungs[0]
        if not self._rungs:
            self.settle(_listed(self._refusals), _listed(self._remedies))


def _remedy(error: OSError | Unsupported) -> str:
    """Say what helps. Root, too, is refused with EPERM: for what a locked-down kernel keeps to itself."""
    if isinstance(error, Unsupported):
        return error.remedy
    allowed = privileges.held() & {privileges.PERFMON, privileges.SYS_ADMIN}
    return "" if allowed or error.errno != errno.EPERM else "run as root, or with CAP_PERFMON beside CAP_BPF"


def _listed(texts: Iterable[str]) -> str:
    return "; ".join(filter(None, dict.fromkeys(texts)))


def reason(error: Exception) -> str:
    """Say an error as people read it."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
