"""The side of a measuring process that survives it: starts workers, writes what they send, ends what hangs.

A worker that dies, or stays at one piece of work for too long, leaves the name of what it was doing. That piece is
recorded as failed, left out, and a new worker goes on behind it, until the job is done or its time is up.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Self

from rich.markup import escape

from reelforge.bench.record_files import RecordLog
from reelforge.bench.records import Record, Verdict, parse
from reelforge.bench.session import WHOLE
from reelforge.bench.worker import Job
from reelforge.engine.core.files import make_folder
from reelforge.engine.core.progress import say

# For one arm's check, or for all the times of a case; autotuning the products of compiled torch takes the longest.
STEP_LIMIT_S, COMPILING_STEP_S = 180.0, 420.0
_POLL_S = 0.5
_EXIT_S = 30.0  # for a worker to go after its last line; a memory checker sums up then
_TAIL_LINES = 15


class Folder:
    """Where a run's results go.

    Attributes:
        records: one JSON object a line.
        log: all that was said.
        errors: what workers wrote to standard error.
        pages: Markdown that belongs in the report behind the tables.
    """

    def __init__(self, path: Path, records: Path | None = None) -> None:
        self.path = make_folder(path)
        self.records = records or path / "records.jsonl"
        self.log, self.errors, self.pages = (self.records.with_suffix(end) for end in (".log", ".errors", ".pages.md"))
        self._lock = threading.Lock()
        self._records = RecordLog(self.records)

    def append(self, record: Record) -> None:
        """One line, on the disk when this returns."""
        with self._lock:
            self._records.append(record)

    def note(self, text: str) -> None:
        """To the terminal and to the log."""
        with self._lock:
            _append(self.log, text)
            say(escape(text))

    def page(self, text: str) -> None:
        """A section for the report."""
        with self._lock:
            _append(self.pages, text)
            say(escape(text))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._records.__exit__()


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        finished: all of it was done; False when it was cut off or could not start.
        records: written.
        failed: pieces of work that took their process with them.
    """

    finished: bool
    records: int
    failed: int


def run_all(jobs: Sequence[Job], folder: Folder, deadline: float, parallel: int, **options: Any) -> list[Outcome]:
    """:func:`run` each job, ``parallel`` at a time."""
    stop = threading.Event()
    with ThreadPoolExecutor(parallel) as pool:
        try:
            return list(pool.map(lambda job: run(job, folder, deadline, stop=stop, **options), jobs))
        finally:
            stop.set()  # when interrupted: the pool waits for its threads


def run(
    job: Job,
    folder: Folder,
    deadline: float,
    *,
    launcher: Sequence[str] = (),
    step_limit_s: float = STEP_LIMIT_S,
    stop: threading.Event | None = None,
) -> Outcome:
    """Do a job in workers until it is finished or ``deadline`` (of ``time.monotonic``) has come.

    Args:
        job: what to do.
        folder: where records and notes go.
        deadline: when the last worker is ended.
        launcher: command that starts Python, such as ``env NAME=VALUE`` or a memory checker.
        step_limit_s: longest time without an event.
        stop: ends it before the deadline.
    """
    records = failed = 0
    while True:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return Outcome(False, records, failed)
        with _worker(replace(job, budget_s=left_s), folder, launcher) as worker:
            done = worker.follow(folder, deadline, step_limit_s, stop or threading.Event())
        records += worker.records
        if not done or worker.pending is None:
            if done:
                folder.note(f"{job.kind} {job.family}: {done}; see {folder.errors}\n{_tail(folder.errors)}")
            return Outcome(done == "", records, failed)
        if job.kind != "sanitize":  # a checker's slowness or crash says nothing of the kernel
            folder.append(replace(worker.pending, verdict=Verdict(status=f"failed: {done}")))
        identity = worker.pending.identity
        folder.note(f"{identity.case_id}, {identity.arm}: {done}\n{_tail(folder.errors)}")
        failed += 1
        behind = ((case, WHOLE) for case in worker.finished)
        job = replace(job, skip=(*job.skip, *behind, (identity.case_id, identity.arm)))


@contextlib.contextmanager
def _worker(job: Job, folder: Folder, launcher: Sequence[str]) -> Iterator["_Worker"]:
    command = [*launcher, sys.executable, "-m", "reelforge.bench.worker", job.text()]
    with folder.errors.open("ab") as errors:
        # A process group of its own, so that its compile workers end with it; the same session, so that a machine
        # that ends the session ends them all.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", errors="replace", process_group=0
        )
    worker = _Worker(process, f"{job.kind} {job.family}".strip())
    try:
        yield worker
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class _Worker:
    """A running worker and what it is at.

    Attributes:
        records: it sent.
        finished: cases that it has left behind, or of which all but what compiles is recorded.
        pending: the record to write should it die now.
    """

    pending: Record | None

    def __init__(self, process: "subprocess.Popen[str]", name: str) -> None:
        self.records, self.pending = 0, None
        self.finished: list[str] = []
        self._process, self._name = process, name
        self._lines: queue.Queue[str | None] = queue.Queue()
        assert process.stdout is not None, "its output is a pipe"
        threading.Thread(target=_read, args=(process.stdout, self._lines), daemon=True).start()

    def follow(self, folder: Folder, deadline: float, step_limit_s: float, stop: threading.Event) -> str | None:
        """Take its events until it ends. ``""`` when it finished, a reason when it failed, None at the deadline."""
        step_end = time.monotonic() + step_limit_s
        while True:
            if time.monotonic() >= deadline or stop.is_set():
                folder.note(f"{self._name}: cut off, its time is up")
                return None
            try:
                line = self._lines.get(timeout=_POLL_S)
            except queue.Empty:
                if time.monotonic() >= step_end:
                    return f"no progress for {step_limit_s:.0f} s"
                if self._process.poll() is None:
                    continue
                line = None  # it ended; a process that it left behind holds the pipe
            if line is None:
                code = self._process.wait()
                return "" if code == 0 else f"its process ended with {_exit(code)}"
            step_end = time.monotonic() + step_limit_s
            if _event(line)[0] == "end":  # what it may still die of is not its work
                self._leave(deadline)
                return ""
            self._take(line, folder, deadline)

    def _leave(self, deadline: float) -> None:
        """Let it go; whoever waits for it ends it if it does not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(min(_EXIT_S, max(0.0, deadline - time.monotonic())))

    def _take(self, line: str, folder: Folder, deadline: float) -> None:
        match _event(line):
            case "record", record:
                self._record(_record(record), folder)
            case "begin", record:
                self._begin(_record(record), folder, deadline)
            case "page", text:
                folder.page(text)
            case "note", text:
                folder.note(text)

    def _record(self, record: Record, folder: Folder) -> None:
        folder.append(record)
        self.records += 1
        if record.timing is not None and record.timing.l2 == "warm":  # only arms that compile come after these
            self.finished.append(record.identity.case_id)

    def _begin(self, coming: Record, folder: Folder, deadline: float) -> None:
        before, name = self.pending and self.pending.identity.case_id, coming.identity.case_id
        if before != name:
            self.finished += [before] if before else []
            folder.note(f"{self._name}: {name} ({deadline - time.monotonic():.0f} s left)")
        self.pending = coming


def _event(line: str) -> tuple[str, Any]:
    """Kind and content of a line; what a library prints is a note."""
    try:
        ((kind, content),) = json.loads(line).items()
    except (ValueError, AttributeError):
        return "note", line.rstrip()
    return kind, content


def _record(table: Any) -> Record:
    record = parse(table)
    assert isinstance(record, Record), f"a worker sent what is no record: {record}"
    return record


def _read(stream: IO[str], lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _exit(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    return "\n".join(f"    {line}" for line in lines)
