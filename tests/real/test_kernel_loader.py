"""The loader's ladder on the running kernel: it compiles what this kernel takes, and goes on where that is refused."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from recorder import Recorder

from exporter.contract import Unsupported
from exporter.host.btf import Btf
from exporter.monitors import kernel
from exporter.monitors.kernel import attach, compiler, ladder, loader, programs, shapes
from exporter.monitors.kernel.source import KernelSource

pytestmark = [pytest.mark.real("root"), pytest.mark.host]


def test_casts_are_tried_before_they_are_relied_on(
    monkeypatch: pytest.MonkeyPatch, lacking: Callable[[str], None]
) -> None:
    """The verifier takes a call of the kernel's own function, and refuses one of what is no such function."""
    with Btf() as types:
        if not types.function("bpf_rdonly_cast"):
            lacking("needs Linux 6.2")
        assert attach.takes_casts(types)
        wrong = types.function("kfree_skb")
        monkeypatch.setattr(types, "function", lambda _: wrong)
        assert not attach.takes_casts(types)


def test_only_the_functions_that_are_attached_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each program those of the rungs that this kernel takes, in one go."""
    rounds: list[list[str]] = []

    class Noted(compiler.Module):
        def add(self, functions: Mapping[str, bytes], asked: Iterable[str]) -> None:
            super().add(functions, asked)
            rounds.append(sorted(functions))
            (tmp_path / "rounds").write_text(json.dumps(rounds))

    monkeypatch.setattr(loader, "Module", Noted)
    found = kernel.load(kernel.Settings())
    try:
        rungs = {
            probe.name: [rung for rung in probe.rungs if rung.name == standing.rung]
            for program in programs.PROGRAMS
            for probe in program.probes
            for standing in found.standings
            if standing.program == probe.name and standing.attached
        }
        (compiled,) = json.loads((tmp_path / "rounds").read_text())
        possible = {hook.function for own in rungs.values() for rung in own for hook in rung.hooks}
        assert set(compiled) <= possible | {"proof_offsets", "proof_values", *compiler.SHARED}
        assert all(any({h.function for h in rung.hooks} <= set(compiled) for rung in own) for own in rungs.values())
    finally:
        found.close()


def _refuse(hook: shapes.Hook, code: bytes, types: Btf) -> attach.Attached:
    """Stand for attach.attach on a kernel that refuses some."""
    if hook.function in {"netns_capable", "netns_copied", "netns_loopback_probed", "drops_with_reason"}:
        raise Unsupported(f"{hook.function} is refused here", "wait")
    return attach.attach(hook, code, types)


def test_a_rung_that_is_refused_when_it_is_attached_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the verifier takes may still be refused: the next rung is compiled then, and counts."""
    monkeypatch.setattr(ladder, "attach", SimpleNamespace(attach=_refuse, try_out=attach.try_out))
    found = kernel.load(kernel.Settings(programs=("drops", "lifecycle")))
    try:
        standings = {standing.program: standing for standing in found.standings}
        assert standings["drops"].attached
        assert standings["drops"].fallback
        refusals = ("drops_with_reason is refused here", "this kernel has no skb_drop_reason")
        assert standings["drops"].reason in {f"tp_btf: {refusal}" for refusal in refusals}
        assert standings["drops"].cannot_see
        assert standings["netns"].attached
        assert "is refused here" in standings["netns"].reason
        source = KernelSource(found)
        source.open(recorder := Recorder())
        source.update()
        source.close()
        assert "cni_packet_drops_total" in recorder.families.snapshots
    finally:
        found.close()
