"""The loader: a short-lived child that makes headers, compiles with bcc, proves itself, attaches, hands over and exits.

Flows in: a socket (its descriptor is the only argument) and the settings on it. Flows out: a manifest and descriptors.
All that is heavy (LLVM, the kernel's types) ends with it. It writes below one private directory that it removes.
"""

import json
import os
import resource
import select
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from exporter import privileges
from exporter.contract import Unsupported
from exporter.host.bpf import Map
from exporter.host.btf import Btf, drop_reasons
from exporter.monitors.kernel import attach, headers, proof
from exporter.monitors.kernel.compiler import Job, Module
from exporter.monitors.kernel.handover import PREFIX, Manifest, Standing, send
from exporter.monitors.kernel.programs import COMMON, PROGRAMS, PROOF
from exporter.monitors.kernel.shapes import Hook, MapShape, Probe, Program, Settings

SOURCES = Path(__file__).parents[3] / "bpf"
_LARGEST = 1 << 20  # bytes of settings
_ONCE = ("-g0", "-Xclang", "-disable-llvm-passes")  # bcc optimises what clang gives it: that is enough
_PARTS = 2  # compilations side by side: each takes some 140 MB for a moment, and a third of a second at least
_T = TypeVar("_T")


class Loader:
    """One run. What it opens lives until it exits; what it hands over lives on in the exporter."""

    def __init__(self, settings: Settings, types: Btf, directory: Path) -> None:
        """Take the settings, the kernel's types and a private directory."""
        self._settings = settings
        self._types = types
        self._directory = directory
        self.manifest = Manifest()
        self.descriptors: list[int] = []
        self._maps: dict[str, int] = {}
        self._wanted = [
            p for p in PROGRAMS if p.wanted(settings) and (settings.programs is None or p.name in settings.programs)
        ]
        self._refused: dict[str, str] = {}
        """Programs that are not even compiled, with the reason."""
        self._wrong: dict[str, str] = {}
        """Members that are not read where they are, with the reason."""
        self._members = self._existing_members()

    def run(self) -> None:
        """Fill the manifest. Raises Unsupported or OSError where nothing at all can be loaded."""
        self.manifest.reasons = drop_reasons(self._types)
        self._timed("headers", self._write_headers)
        self._timed("maps", self._create_maps)
        module = self._timed("compile", self._compile)
        self._timed("proof", lambda: self._prove(module))
        self._timed("attach", lambda: self._attach_all(module))
        if not self.manifest.programs:
            return  # nothing to read, nothing to measure
        self._open_statistics()
        self.manifest.unprivileged = self._readable_without_capabilities()
        self.manifest.map_numbers = {name: number for number, name in enumerate(self._maps)}
        own = {shape.name for shape in PROOF.maps}
        self.manifest.maps = {name: self._hand(fd) for name, fd in self._maps.items() if name not in own}

    def _timed(self, part: str, work: Callable[[], _T]) -> _T:
        start = time.perf_counter()
        try:
            return work()
        finally:
            self.manifest.seconds[part] = round(time.perf_counter() - start, 4)

    def _hand(self, descriptor: int) -> int:
        self.descriptors.append(descriptor)
        return len(self.descriptors) - 1

    # What is compiled.

    def _existing_members(self) -> list[str]:
        """Find which members this kernel has; a program that lacks one it needs is refused."""
        paths = dict.fromkeys(
            path for program in (COMMON, PROOF, *self._wanted) for path in (*program.members, *program.optional)
        )
        existing = [path for path in paths if self._types.offset(path) is not None]
        for program in self._wanted:
            lacking = [path for path in (*COMMON.members, *program.members) if path not in existing]
            if lacking:
                self._refused[program.name] = f"this kernel has no {', '.join(lacking)}"
        return existing

    def _programs(self) -> list[Program]:
        return [program for program in self._wanted if program.name not in self._refused]

    def _write_headers(self) -> None:
        structs = dict.fromkeys(path.partition(".")[0] for path in self._members)
        headers.write(self._directory, self._types, structs, self._settings.types)

    def _create_maps(self) -> None:
        for program in (COMMON, *self._programs(), PROOF):
            for shape in program.maps:
                self._maps[shape.name] = attach.create_map(shape, self._settings)
        for program in self._programs():
            for name, key, value in program.contents(self._settings):
                Map(self._maps[name]).put(key, value)
        ratios = Map(self._maps["ratios"])
        for number in range(ratios.capacity):
            ratios.put(number.to_bytes(4, sys.byteorder), b"\xff" * 4)  # keep all until someone says otherwise

    def _compile(self) -> Module:
        """Compile in as many parts as there are processors, side by side.

        Where a part fails, each of its programs by itself: one that fails takes no other with it.
        """
        parts = self._parts()
        try:
            return self._compile_parts(parts)
        except Unsupported:
            for program in self._programs():
                self._try_alone(program)
            if not self._programs():
                raise
            return self._compile_parts(self._parts())

    def _parts(self) -> list[list[Program]]:
        """Share the programs out by the size of their text; the first part has the self-proof besides."""
        count = min(len(os.sched_getaffinity(0)), _PARTS)
        sizes = [_size(PROOF), *[0] * (count - 1)]
        parts: list[list[Program]] = [[] for _ in sizes]
        for program in sorted(self._programs(), key=_size, reverse=True):
            smallest = sizes.index(min(sizes))
            parts[smallest].append(program)
            sizes[smallest] += _size(program)
        return parts

    def _try_alone(self, program: Program) -> None:
        try:
            self._start([program]).wait()
        except Unsupported as error:
            self._refused[program.name] = f"it does not compile here: {error.reason}"

    def _compile_parts(self, parts: Iterable[list[Program]]) -> Module:
        jobs = [self._start(part, proven=not number) for number, part in enumerate(parts) if part or not number]
        functions: dict[str, bytes] = {}
        failures: list[Unsupported] = []
        for job in jobs:
            try:
                functions |= job.wait()
            except Unsupported as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return Module(functions)

    def _start(self, programs: Iterable[Program], *, proven: bool = False) -> Job:
        """Start compiling some programs, with the self-proof or without."""
        names = ["common.h", *_files([PROOF] if proven else []), *_files(programs)]
        texts = [f'#line 1 "{name}"\n{(SOURCES / name).read_text(encoding="utf-8")}' for name in names]
        if proven:
            texts.append(proof.offsets_source(self._members))
        return Job("\n".join(texts), self._flags(programs), self._directory)

    def _flags(self, programs: Iterable[Program]) -> list[str]:
        numbers = {name: number for number, name in self.manifest.reasons.items()}
        shapes: dict[str, MapShape] = {s.name: s for p in (COMMON, PROOF, *self._wanted) for s in p.maps}
        defines: dict[str, object] = {f"HAVE_{path.replace('.', '_')}": 1 for path in self._members}
        for number, (name, fd) in enumerate(self._maps.items()):
            defines |= {f"MAP_FD_{name}": fd, f"MAP_ID_{name}": number}
            defines |= {f"MAP_KEY_{name}": shapes[name].key, f"MAP_VALUE_{name}": shapes[name].value}
        for program in programs:
            defines |= program.constants(self._settings, numbers)
        return [
            *_ONCE,
            f"-I{SOURCES}",
            f"-I{self._directory}/include",
            *(f"-D{name}={text}" for name, text in defines.items()),
        ]

    # What is believed.

    def _prove(self, module: Module) -> None:
        with proof.Specimen() as specimen:
            attach.run_once("proof", module.code("proof_values"), specimen.receiver.fileno())
            wrong_values = proof.wrong_values(self._slots("proof"), specimen, self._members)
        attach.run_once("proof", module.code("proof_offsets"))
        compiled = dict(zip(self._members, self._slots("offsets"), strict=False))
        self._wrong = proof.wrong_offsets(compiled, self._types) | wrong_values

    def _slots(self, name: str) -> tuple[int, ...]:
        map_ = Map(self._maps[name])
        return tuple(
            int.from_bytes(map_.get(slot.to_bytes(4, sys.byteorder)) or b"", sys.byteorder)
            for slot in range(map_.capacity)
        )

    # What is attached.

    def _attach_all(self, module: Module) -> None:
        for program in self._wanted:
            refusal = self._refused.get(program.name) or self._disproof(program)
            for probe in program.probes:
                standing = Standing(probe.name, reason=refusal) if refusal else self._climb(probe, module)
                self.manifest.standings.append(standing)

    def _disproof(self, program: Program) -> str:
        reads = (*COMMON.members, *COMMON.optional, *program.members, *program.optional)
        return next((f"self-proof: {self._wrong[path]}" for path in reads if path in self._wrong), "")

    def _climb(self, probe: Probe, module: Module) -> Standing:
        """Attach on the best rung that holds."""
        refusals: list[str] = []
        remedies: list[str] = []
        for number, rung in enumerate(probe.rungs):
            try:
                if rung.needs and not self._types.knows(rung.needs):
                    raise Unsupported(f"this kernel has no {rung.needs}")  # noqa: TRY301 - as any other refusal
                attached = self._attach_rung(rung.hooks, module)
            except (OSError, Unsupported) as error:
                refusals.append(f"{rung.name}: {_reason(error)}")
                remedies += [error.remedy] if isinstance(error, Unsupported) and error.remedy else []
                continue
            self.manifest.programs[probe.name] = [self._hand(one.program) for one in attached]
            self.manifest.links += [self._hand(one.link) for one in attached]
            hook = ",".join(dict.fromkeys(one.symbol for one in attached))
            seen = {"cannot_see": rung.cannot_see, "reason": "; ".join(refusals)}
            return Standing(probe.name, hook, rung.name, attached=True, fallback=number > 0, **seen)
        return Standing(probe.name, reason="; ".join(refusals), remedy="; ".join(dict.fromkeys(remedies)))

    def _attach_rung(self, hooks: Iterable[Hook], module: Module) -> list[attach.Attached]:
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

    def _open_statistics(self) -> None:
        if self._settings.run_statistics:
            try:
                self.manifest.links.append(self._hand(attach.enable_statistics()))
                self.manifest.measured = True
            except OSError as error:
                self.manifest.unmeasured = _reason(error)

    def _readable_without_capabilities(self) -> bool:
        """Try a map from a thread that has given up its capabilities (they are a thread's own)."""
        answer: list[bool] = []

        def look() -> None:
            try:
                privileges.keep(frozenset())
                Map(self._maps["ratios"]).get(bytes(4))
                answer.append(True)
            except OSError:
                answer.append(False)

        thread = threading.Thread(target=look)
        thread.start()
        thread.join(5)
        return answer == [True]


def _files(programs: Iterable[Program]) -> list[str]:
    return [f"{program.name}.c" for program in programs]


def _size(program: Program) -> int:
    return (SOURCES / f"{program.name}.c").stat().st_size


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _leave_when_alone(link: socket.socket, directory: str) -> None:
    """End this process, and its directory, as soon as the exporter has closed its end: also amid the compiler."""
    waiting = select.poll()
    waiting.register(link, select.POLLRDHUP)
    waiting.poll()
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)


def _load(settings: Settings, place: str, link: socket.socket) -> tuple[Manifest, list[int]]:
    prefix = f"{PREFIX}{os.getpid()}-"
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as directory, Btf() as types:
            threading.Thread(target=_leave_when_alone, args=(link, directory), daemon=True).start()
            os.chdir(directory)  # the compiler looks for headers where it stands, too
            loader = Loader(settings, types, Path(directory))
            loader.run()
            os.chdir("/")
            return loader.manifest, loader.descriptors
    except Unsupported as error:
        return Manifest(reason=error.reason, remedy=error.remedy), []
    except PermissionError as error:
        remedy = "run as root, or with CAP_BPF and CAP_PERFMON (seccomp must allow bpf(2))"
        return Manifest(reason=f"no permission: {_reason(error)}", remedy=remedy), []
    except OSError as error:
        return Manifest(reason=_reason(error)), []


def main(descriptor: int) -> None:
    """Serve the exporter at the other end of the socket, once."""
    with socket.socket(fileno=descriptor) as link:
        size = int.from_bytes(link.recv(4, socket.MSG_WAITALL), sys.byteorder)
        if not 0 < size <= _LARGEST:
            raise SystemExit(2)
        order = json.loads(link.recv(size, socket.MSG_WAITALL))
        manifest, descriptors = _load(Settings(**order["settings"]), order["place"], link)
        peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        manifest.peak_bytes = max(peaks) * 1024
        send(link, manifest, descriptors)


if __name__ == "__main__":
    main(int(sys.argv[1]))
