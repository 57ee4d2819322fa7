"""The loader: a short-lived child that makes headers, compiles with bcc, proves itself, attaches, hands over and exits.

Flows in: a socket (its descriptor is the only argument) and the settings on it. Flows out: a manifest and descriptors.
All that is heavy (LLVM, the kernel's types) ends with it. It writes below one private directory that it removes.
"""

import errno
import json
import os
import resource
import select
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from exporter import privileges
from exporter.contract import Unsupported
from exporter.host.bpf import Map
from exporter.host.btf import Btf, drop_reasons
from exporter.monitors.kernel import attach, headers, proof
from exporter.monitors.kernel.compiler import KERNEL_FUNCTION, OWN_FUNCTION, SHARED, Job, Module
from exporter.monitors.kernel.handover import PREFIX, Manifest, send
from exporter.monitors.kernel.ladder import Climb, reason
from exporter.monitors.kernel.programs import COMMON, PATH, PROGRAMS, PROOF
from exporter.monitors.kernel.shapes import MapShape, Program, Settings

SOURCES = Path(__file__).parents[3] / "bpf"
_LARGEST = 1 << 20  # bytes of settings
_ONCE = ("-g0", "-Xclang", "-disable-llvm-passes")  # bcc optimises what clang gives it: that is enough
_FIRST = (*PATH, "proof.c")  # compiled once
_PARTS = 2  # compilations side by side: each takes some 140 MB for a moment, and a third of a second at least


class Loader:
    """One run. What it opens lives until it exits; what it hands over lives on in the exporter."""

    def __init__(self, settings: Settings, types: Btf, directory: Path, jobs: list[Job]) -> None:
        """Take the settings, the kernel's types, a private directory and compilers that wait for their texts."""
        self._settings = settings
        self._types = types
        self._directory = directory
        self._jobs = jobs
        self.manifest = Manifest()
        self.descriptors: list[int] = []
        self._maps: dict[str, int] = {}
        self._module = Module()
        self._proven = False
        self._wanted = [
            p for p in PROGRAMS if p.wanted(settings) and (settings.programs is None or p.name in settings.programs)
        ]
        self._climbs = [Climb(program, probe, types) for program in self._wanted for probe in program.probes]
        self._members = self._existing_members()
        self._numbers = self._existing_types()

    def run(self) -> None:
        """Fill the manifest. Raises Unsupported or OSError where nothing at all can be loaded."""
        self.manifest.reasons = drop_reasons(self._types)
        self._timed("headers", self._write_headers)
        self._timed("maps", self._create_maps)
        while True:
            self._timed("ladder", self._look)
            if not self._waiting():
                break
            self._timed("compile", self._compile)
            self._timed("proof", self._prove)
            self._timed("attach", self._attach)
        for climb in self._climbs:
            self._hand_over(climb)
        if not self.manifest.programs:
            return  # nothing to read, nothing to measure
        self._open_statistics()
        self.manifest.unprivileged = self._readable_without_capabilities()
        self.manifest.map_numbers = {name: number for number, name in enumerate(self._maps)}
        own = {shape.name for shape in PROOF.maps}
        self.manifest.maps = {name: self._hand(fd) for name, fd in self._maps.items() if name not in own}

    def _timed(self, part: str, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        try:
            work()
        finally:
            spent = self.manifest.seconds.get(part, 0.0) + time.perf_counter() - start
            self.manifest.seconds[part] = round(spent, 4)

    def _hand(self, descriptor: int) -> int:
        self.descriptors.append(descriptor)
        return len(self.descriptors) - 1

    def _waiting(self) -> list[Climb]:
        return [climb for climb in self._climbs if not climb.standing]

    def _settle(self, program: Program, reason: str) -> None:
        for climb in self._waiting():
            if climb.program is program:
                climb.settle(reason)

    # What there is to compile for.

    def _existing_members(self) -> list[str]:
        """Find which members this kernel has; a program that lacks one it needs is refused."""
        paths = dict.fromkeys(
            path for program in (COMMON, PROOF, *self._wanted) for path in (*program.members, *program.optional)
        )
        existing = [path for path in paths if self._types.offset(path) is not None]
        for program in self._wanted:
            lacking = [path for path in (*COMMON.members, *program.members) if path not in existing]
            if lacking:
                self._settle(program, f"this kernel has no {', '.join(lacking)}")
        return existing

    def _existing_types(self) -> dict[str, int]:
        """Number the structs and functions that programs use where they can."""
        names = {name for program in (COMMON, *self._wanted) for name in program.types}
        numbers = {name: self._types.find(name) or self._types.function(name) for name in names}
        if not attach.takes_casts(self._types):
            numbers.pop("bpf_rdonly_cast", None)
        return {name: number for name, number in numbers.items() if number}

    def _programs(self) -> list[Program]:
        """Those of which something is to be compiled."""
        missing = [climb for climb in self._waiting() if not all(map(self._module.knows, climb.functions))]
        return [program for program in self._wanted if any(climb.program is program for climb in missing)]

    def _write_headers(self) -> None:
        structs = dict.fromkeys(path.partition(".")[0] for path in self._members)
        headers.write(self._directory, self._types, structs, self._settings.types)
        for own in SOURCES.glob("*.h"):
            shutil.copy(own, self._directory / "include")

    def _create_maps(self) -> None:
        programs = list(dict.fromkeys(climb.program for climb in self._waiting()))
        for program in (COMMON, *programs, PROOF):
            for shape in program.maps:
                self._maps[shape.name] = attach.create_map(shape, self._settings)
        for program in programs:
            for name, key, value in program.contents(self._settings):
                Map(self._maps[name]).put(key, value)
        ratios = Map(self._maps["ratios"])
        for number in range(ratios.capacity):
            ratios.put(number.to_bytes(4, sys.byteorder), b"\xff" * 4)  # keep all until someone says otherwise

    def _look(self) -> None:
        for climb in self._waiting():
            climb.look()

    # What is compiled: the functions of the rungs at hand.

    def _compile(self) -> None:
        """Compile in as many parts as there are processors, side by side.

        Where a part fails, each of its programs by itself: one that fails takes no other with it.
        """
        if not self._programs():
            return  # this rung has the same functions as the one above
        try:
            self._compile_parts(self._parts())
        except Unsupported:
            for program in self._programs():
                self._try_alone(program)
            if not self._programs() and not self._proven:
                raise
            self._compile_parts(self._parts())

    def _parts(self) -> list[list[Program]]:
        """Share out by the size of the text that is needed; the first part has what all call, and the self-proof."""
        weights = {program.name: self._weight(program) for program in self._programs()}
        loads = [0.0 if self._proven else _size(_FIRST), *[0.0] * (_parts() - 1)]
        parts: list[list[Program]] = [[] for _ in loads]
        for program in sorted(self._programs(), key=lambda program: weights[program.name], reverse=True):
            lightest = loads.index(min(loads))
            parts[lightest].append(program)
            loads[lightest] += weights[program.name]
        return parts

    def _try_alone(self, program: Program) -> None:
        try:
            self._start([program]).wait()
        except Unsupported as error:
            self._settle(program, f"it does not compile here: {error.reason}")

    def _compile_parts(self, parts: Iterable[list[Program]]) -> None:
        first = [not number and not self._proven for number, _ in enumerate(parts)]
        jobs = [self._start(part, proven=proven) for part, proven in zip(parts, first, strict=True) if part or proven]
        functions: dict[str, bytes] = {}
        failures: list[Unsupported] = []
        for job in jobs:
            try:
                functions |= job.wait()
            except Unsupported as error:
                failures.append(error)
        if failures:
            raise failures[0]
        self._module.add(functions, [name for climb in self._waiting() for name in climb.functions])

    def _start(self, programs: Iterable[Program], *, proven: bool = False) -> Job:
        """Start compiling some programs, with the self-proof or without."""
        names = ["common.h", *(_FIRST if proven else ()), *_files(programs)]
        texts = [f'#line 1 "{name}"\n{(SOURCES / name).read_text(encoding="utf-8")}' for name in names]
        if proven:
            texts.append(proof.offsets_source(self._members))
        job = self._jobs.pop() if self._jobs else Job(self._directory)
        job.begin("\n".join(texts), self._flags(programs))
        return job

    def _flags(self, programs: Iterable[Program]) -> list[str]:
        numbers = {name: number for number, name in self.manifest.reasons.items()}
        shapes: dict[str, MapShape] = {s.name: s for p in (COMMON, PROOF, *self._wanted) for s in p.maps}
        defines: dict[str, object] = {f"HAVE_{path.replace('.', '_')}": 1 for path in self._members}
        defines |= {f"CALL_{name}": OWN_FUNCTION + number for number, name in enumerate(SHARED)}
        defines["KERNEL_FUNCTION"] = KERNEL_FUNCTION
        defines |= {f"BTF_ID_{name}": number for name, number in self._numbers.items()}
        for number, (name, fd) in enumerate(self._maps.items()):
            defines |= {f"MAP_FD_{name}": fd, f"MAP_ID_{name}": number}
            defines[f"MAP_ENTRIES_{name}"] = f"{shapes[name].capacity(self._settings)}U"
            defines |= {f"MAP_KEY_{name}": shapes[name].key, f"MAP_VALUE_{name}": shapes[name].value}
        for program in programs:
            defines |= program.constants(self._settings, numbers)
            defines |= {f"{name}(context)": f"static {name}(context)" for name in self._unused(program)}
        return [*_ONCE, "-Iinclude", *(f"-D{name}={text}" for name, text in defines.items())]

    def _needed(self, program: Program) -> set[str]:
        """Functions of the rungs at hand that are not compiled yet."""
        names = {name for climb in self._waiting() if climb.program is program for name in climb.functions}
        return {name for name in names if not self._module.knows(name)}

    def _unused(self, program: Program) -> set[str]:
        """Functions that no rung at hand needs: made static, they are left out, and most of their cost with them."""
        return _functions(program) - self._needed(program)

    def _weight(self, program: Program) -> float:
        return _size(_files([program])) * len(self._needed(program)) / len(_functions(program))

    # What is believed.

    def _prove(self) -> None:
        """Take out, once, the programs that read what is not where they were compiled for."""
        if self._proven:
            return
        with proof.Specimen() as specimen:
            attach.run_once("proof", self._module.code("proof_values"), specimen.receiver.fileno())
            wrong_values = proof.wrong_values(self._slots("proof"), specimen, self._members)
        attach.run_once("proof", self._module.code("proof_offsets"))
        compiled = dict(zip(self._members, self._slots("offsets"), strict=False))
        wrong = proof.wrong_offsets(compiled, self._types) | wrong_values
        for program in self._wanted:
            reads = (*COMMON.members, *COMMON.optional, *program.members, *program.optional)
            found = next((wrong[path] for path in reads if path in wrong), "")
            if found:
                self._settle(program, f"self-proof: {found}")
        self._proven = True

    def _slots(self, name: str) -> tuple[int, ...]:
        """Give all that an array of u64s holds."""
        map_ = Map(self._maps[name])
        entries = (map_.get(slot.to_bytes(4, sys.byteorder)) or b"" for slot in range(map_.capacity))
        return tuple(memoryview(b"".join(entries)).cast("Q"))

    # What is attached.

    def _attach(self) -> None:
        """Attach side by side (verifying takes most of it), what is longest first."""
        climbs = sorted(self._waiting(), key=self._length, reverse=True)
        with ThreadPoolExecutor(_PARTS) as pool:
            for attempt in [pool.submit(climb.hold, self._module) for climb in climbs]:
                attempt.result()

    def _length(self, climb: Climb) -> int:
        return sum(self._module.size(name) for name in climb.functions)

    def _hand_over(self, climb: Climb) -> None:
        self.manifest.standings += [climb.standing] if climb.standing else []
        if climb.attached:
            self.manifest.programs[climb.probe.name] = [self._hand(one.program) for one in climb.attached]
            self.manifest.links += [self._hand(one.link) for one in climb.attached]

    def _open_statistics(self) -> None:
        if self._settings.run_statistics:
            try:
                self.manifest.links.append(self._hand(attach.enable_statistics()))
                self.manifest.measured = True
            except OSError as error:
                self.manifest.unmeasured = reason(error)

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


def _parts() -> int:
    """Say how many compilations run side by side."""
    return min(len(os.sched_getaffinity(0)), _PARTS)


def _functions(program: Program) -> set[str]:
    return {hook.function for probe in program.probes for rung in probe.rungs for hook in rung.hooks}


def _files(programs: Iterable[Program]) -> list[str]:
    return [f"{program.name}.c" for program in programs]


def _size(files: Iterable[str]) -> int:
    return sum((SOURCES / name).stat().st_size for name in files)


class _Room:
    """The private directory, which is gone when the loader is, and the loader when its exporter is."""

    def __init__(self, link: socket.socket) -> None:
        """Watch over the other end of the link from now on: also amid the compiler."""
        self._lock = threading.Lock()
        self._path: Path | None = None
        threading.Thread(target=self._leave_when_alone, args=(link,), daemon=True).start()

    def enter(self, place: Path) -> None:
        """Make it, and stand in it. The compiler is nobody, and may read what it knows the name of. Raises OSError."""
        with self._lock:
            path = place / f"{PREFIX}{os.getpid()}-{os.urandom(8).hex()}"
            path.mkdir(0o711)
            self._path = path
        os.chdir(path)

    def leave(self) -> None:
        """Remove it. What is still being written there is written by a relative path: it does not come back."""
        with self._lock:
            while self._path and self._path.exists():
                shutil.rmtree(self._path, ignore_errors=True)

    def _leave_when_alone(self, link: socket.socket) -> None:
        waiting = select.poll()
        waiting.register(link, select.POLLRDHUP)
        waiting.poll()
        self.leave()
        os._exit(1)


def _load(settings: Settings, place: Path, room: _Room) -> tuple[Manifest, list[int]]:
    jobs: list[Job] = []
    try:
        room.enter(place)
        start = time.perf_counter()
        jobs += [Job(Path()) for _ in range(_parts())]
        with Btf() as types:
            loader = Loader(settings, types, Path(), jobs)
            loader.manifest.seconds["types"] = round(time.perf_counter() - start, 4)
            loader.run()
            return loader.manifest, loader.descriptors
    except Unsupported as error:
        return Manifest(reason=error.reason, remedy=error.remedy), []
    except PermissionError as error:
        remedy = "run as root, or with CAP_BPF and CAP_PERFMON (seccomp must allow bpf(2))"
        return Manifest(reason=f"no permission: {reason(error)}", remedy=remedy), []
    except OSError as error:
        if error.errno == errno.ENOSYS:
            hidden = f"the system call bpf is hidden from it (seccomp) or not in this kernel: {reason(error)}"
            return Manifest(reason=hidden, remedy="allow bpf(2) in the seccomp profile"), []
        return Manifest(reason=reason(error)), []
    finally:
        for job in jobs:
            job.end()
        os.chdir("/")
        room.leave()


def main(link: socket.socket) -> None:
    """Serve the exporter at the other end of the socket, once."""
    os.umask(0o022)
    with link:
        room = _Room(link)
        size = int.from_bytes(link.recv(4, socket.MSG_WAITALL), sys.byteorder)
        if not 0 < size <= _LARGEST:
            raise SystemExit(2)
        order = json.loads(link.recv(size, socket.MSG_WAITALL))
        start = round(time.monotonic() - order["asked"], 4)
        manifest, descriptors = _load(Settings(**order["settings"]), Path(order["place"]), room)
        manifest.seconds["start"] = start
        peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        manifest.peak_bytes = max(peaks) * 1024
        send(link, manifest, descriptors)
