"""Run cases: arrays from the id, the oracle's answer, each framework's results, a verdict."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from parity.arrays import ArrayRef
from parity.backends.base import Backend
from parity.case import Case
from parity.grids import cost
from parity.launch import InfrastructureError, Pool, Pools, RankError
from parity.records import STORAGE_ERRORS, Folder, Outcome
from parity.results import RankResult

ANSWERS_KEPT = 4
ANSWERS_BYTES = 1 << 30
SCRATCH_PREFIX = "moe-parity-"
FRESH_SECONDS = 20.0


@dataclass(frozen=True)
class Harness:
    """The steps around the frameworks, each replaceable in tests."""

    build: Callable[[Case, Path], dict[str, ArrayRef]]
    reference: Callable[[Case, Mapping[str, ArrayRef]], Any]
    judge: Callable[[Case, Any, Mapping[str, list[RankResult]]], Any]
    teach: Callable[[Case, Mapping[str, ArrayRef], Path], tuple[Any, dict[str, ArrayRef]]] | None = None
    """Takes the place of `reference` and gives lessons too; None: stages are not compared."""

    @classmethod
    def default(cls, stages: bool = True) -> Harness:
        from parity import fixtures, oracle, verdict

        return cls(fixtures.build, oracle.reference, verdict.judge, oracle.teach if stages else None)


@dataclass
class _Prepared:
    """What the oracle has to say on cases that share its answer."""

    reference: Any
    lessons: dict[str, ArrayRef] | None = None
    folder: Path | None = None
    """Where the lessons lie."""

    @property
    def nbytes(self) -> int:
        # what is taught is as large, and is made later
        return 2 * getattr(self.reference, "nbytes", 0)


@dataclass
class Session:
    """Everything that lives as long as a run: scratch space, workers, the oracle's last answers."""

    backends: Sequence[Backend]
    scratch: Path
    pools: Pools
    harness: Harness
    timeout: float
    _answers: OrderedDict[str, _Prepared] = field(default_factory=OrderedDict)
    _lessons_written: int = 0
    _failed_starts: int = 0

    def outcome(self, case: Case, then: Case | None = None, planted: tuple[str, str] | None = None) -> Outcome:
        """Run and judge one case; see `ran`."""
        return self.ran(case, then, planted)()

    def ran(
        self, case: Case, then: Case | None = None, planted: tuple[str, str] | None = None
    ) -> Callable[[], Outcome]:
        """Run one case. A rank's trouble is the case's error, never the run's.

        Args:
          case: which.
          then: the next one, if it is known: the oracle gets to it while the frameworks are busy with this one.
          planted: a bug (`parity.mutations`) and the framework to plant it in.

        Returns:
          What judges it. It may be called while the next case runs.

        Raises:
          InfrastructureError: no case can run.
        """
        began = time.monotonic()
        skipped: dict[str, str] = {}

        def ended(verdict: str, reason: str, metrics: dict, seconds: float) -> Outcome:
            if skipped:
                metrics = {**metrics, "skipped": skipped}
            return Outcome(case=str(case), verdict=verdict, reason=reason, metrics=metrics, seconds=seconds)

        def raised(error: Exception, seconds: float) -> Outcome:
            return ended("error", f"the harness raised {type(error).__name__}: {error}", {}, seconds)

        try:
            skipped = {b.name: reason for b in self.backends if (reason := b.unsupported(case))}
            taking = [backend for backend in self.backends if backend.name not in skipped]
            if not taking:
                return lambda: ended("skip", _refusals(skipped), {}, 0.0)
            results, reference = self.execute(case, taking, *(planted or ()), then=then)
        except RankError as error:
            metrics = {"ranks": error.ranks, "kind": error.kind, "log": str(error.log), "log_tail": error.tail}
            return functools.partial(ended, "error", error.reason, metrics, time.monotonic() - began)
        except InfrastructureError:
            raise
        except Exception as error:
            return functools.partial(raised, error, time.monotonic() - began)
        running = time.monotonic() - began

        def judged() -> Outcome:
            began = time.monotonic()
            try:
                judgement = self.harness.judge(case, reference, results)
            except Exception as error:
                return raised(error, running + time.monotonic() - began)
            failed = [asdict(gate) for gate in judgement.gates if not gate.passed]
            reason = judgement.reason
            if judgement.verdict == "pass" and len(taking) == 1 < len(self.backends):
                reason = f"only {taking[0].name} took the case, held to the oracle alone; {_refusals(skipped)}"
            metrics = {**judgement.metrics, "failed_gates": failed}
            return ended(judgement.verdict, reason, metrics, running + time.monotonic() - began)

        return judged

    def execute(
        self,
        case: Case,
        backends: Sequence[Backend],
        mutation: str | None = None,
        planted_in: str | None = None,
        then: Case | None = None,
    ) -> tuple[dict[str, list[RankResult]], Any]:
        """Run a case on some backends, with a bug planted in one, in all of them or in none; meanwhile ask the oracle.

        Where stages are compared the oracle comes first, since the frameworks need its lessons.

        Returns:
          Each backend's results in rank order, and the oracle's answer.

        Raises:
          RankError: a rank died, hung or raised.
          InfrastructureError: workers cannot start, or there is no room.
        """
        arrays = self.arrays(case)
        lessons = None if self.harness.teach is None else self._ask(case, arrays).lessons

        def meanwhile() -> Any:
            reference = self._ask(case, arrays).reference
            self._look_ahead(reference, then)
            return reference

        return self.answers(
            case, arrays, backends, mutation=mutation, planted_in=planted_in, lessons=lessons, meanwhile=meanwhile
        )

    def answers(
        self,
        case: Case,
        arrays: Mapping[str, ArrayRef],
        backends: Sequence[Backend],
        *,
        mutation: str | None = None,
        planted_in: str | None = None,
        lessons: Mapping[str, ArrayRef] | None = None,
        meanwhile: Callable[[], Any] = lambda: None,
    ) -> tuple[dict[str, list[RankResult]], Any]:
        """Run given arrays on some backends.

        Returns:
          Each backend's results in rank order, and what `meanwhile` gave, which is called while they run.

        Raises:
          RankError: a rank died, hung or raised.
          InfrastructureError: workers cannot start, or there is no room.
        """
        pools: list[tuple[Backend, Pool, Path]] = []
        try:
            for backend in backends:
                pools.append((backend, self.pools.get(backend, case), self._folder(backend)))
            # All are up before any is asked, or one's start would count against the other's time.
            for index, (backend, pool, out) in enumerate(pools):
                pools[index] = (backend, self._started(backend, pool, case), out)
            for backend, pool, out in pools:
                bug = mutation if planted_in in (None, backend.name) else None
                pool.submit(case, arrays, out, bug, lessons)
            done = meanwhile()
            results = {}
            for backend, pool, out in pools:
                pool.collect(self.timeout)
                results[backend.name] = [RankResult.load(out, rank) for rank in range(case.world)]
        except BaseException as error:
            self._settle([pool for _, pool, _ in pools], wait=isinstance(error, RankError))
            raise
        return results, done

    def _started(self, backend: Backend, pool: Pool, case: Case) -> Pool:
        """Wait for a pool to be up; one that never gets going is infrastructure, not a case's error."""
        try:
            pool.wait_ready()
        except InfrastructureError:
            # Processes that must find each other may lose a race for a port: once more, then it is broken.
            if pool.processes == 1:
                raise
            self.pools.drop(pool)
            pool = self.pools.get(backend, case)
            pool.wait_ready()
        except RankError as error:
            self._failed_starts += 1
            if self._failed_starts > 1:
                raise InfrastructureError(
                    f"workers do not start: {error.reason}, the second time in a row\n"
                    f"end of the log {error.log}:\n{error.tail}"
                ) from error
            raise
        self._failed_starts = 0
        return pool

    def _settle(self, pools: Sequence[Pool], wait: bool) -> None:
        """After trouble: keep the pools that still finish in time, kill the others."""
        for pool in pools:
            if wait and pool.ready and not pool.troubled:
                with contextlib.suppress(RankError, InfrastructureError):
                    pool.collect(self.timeout)
                    continue
            self.pools.drop(pool)

    def _folder(self, backend: Backend) -> Path:
        """An empty folder for a backend's results."""
        out = self.scratch / "results" / backend.name
        shutil.rmtree(out, ignore_errors=True)
        with _room(self.scratch):
            out.mkdir(parents=True)
        return out

    def arrays(self, case: Case) -> dict[str, ArrayRef]:
        """The case's arrays on disk."""
        with _room(self.scratch):
            return self.harness.build(case, self.scratch / "arrays")

    def _ask(self, case: Case, arrays: Mapping[str, ArrayRef]) -> _Prepared:
        """The oracle's answer, kept for cases that share it."""
        key, answers = case.logical_id, self._answers
        if key not in answers:
            if self.harness.teach is None:
                answers[key] = _Prepared(self.harness.reference(case, arrays))
            else:
                self._lessons_written += 1
                folder = self.scratch / "lessons" / str(self._lessons_written)
                with _room(self.scratch):
                    answers[key] = _Prepared(*self.harness.teach(case, arrays, folder), folder)
            # never less than this answer and the two before, of the case that runs and of the one that is being judged
            while len(answers) > 3 and (
                len(answers) > ANSWERS_KEPT or sum(answer.nbytes for answer in answers.values()) > ANSWERS_BYTES
            ):
                _, dropped = answers.popitem(last=False)
                if dropped.folder is not None:
                    shutil.rmtree(dropped.folder, ignore_errors=True)
        answers.move_to_end(key)
        return answers[key]

    def _look_ahead(self, reference: Any, then: Case | None) -> None:
        """What the oracle can do while the frameworks run: finish this answer, begin the next."""
        if getattr(reference, "taught", None) is not None:
            reference.taught()
        if then is not None and self.harness.teach is not None:
            # what goes wrong here goes wrong again when its turn comes, and is told then
            with contextlib.suppress(Exception):
                self._ask(then, self.arrays(then))


def _refusals(skipped: Mapping[str, str]) -> str:
    """Which backends refused a case and why; those with one reason together."""
    reasons = dict.fromkeys(skipped.values())
    return "; ".join(f"{', '.join(n for n, r in skipped.items() if r == reason)}: {reason}" for reason in reasons)


@contextlib.contextmanager
def session(
    backends: Sequence[Backend],
    timeout: float,
    log_dir: Path | None = None,
    harness: Harness | None = None,
    make_pool: Callable[..., Pool] = Pool,
) -> Iterator[Session]:
    """A session; leaving it kills its workers and removes its scratch space."""
    with scratch_folder() as scratch, Pools(log_dir or scratch / "logs", make_pool) as pools:
        yield Session(backends, scratch, pools, harness or Harness.default(), timeout)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in the system's temporary space, removed afterwards, with those that killed runs left behind."""
    base = Path(tempfile.gettempdir())
    for stale in base.glob(f"{SCRATCH_PREFIX}*"):
        with contextlib.suppress(OSError), open(stale / ".lock", "r+") as lock:
            if time.time() - stale.stat().st_mtime < FRESH_SECONDS:
                continue  # ranks of a launch begin together: its owner may not have locked it yet
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its owner holds it for as long as it lives
            shutil.rmtree(stale, ignore_errors=True)
    with _room(base):
        path = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX))
        lock = open(path / ".lock", "w")  # noqa: SIM115 - held for as long as the folder lives
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        lock.close()


@contextlib.contextmanager
def _room(path: Path) -> Iterator[None]:
    """Turn a full disk into a message that says which, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        raise InfrastructureError(
            f"no room for arrays in {str(path)!r}: {error.strerror}; free some space or point TMPDIR elsewhere"
        ) from error


def run(
    cases: Sequence[Case],
    live: Session,
    folder: Folder,
    *,
    fail_fast: bool = False,
    watch: Callable[[Outcome, int, float], None] = lambda *_: None,
) -> list[Outcome]:
    """Run the cases that the folder does not have yet.

    Args:
      cases: in the order they run.
      live: a session.
      folder: where outcomes go as they come.
      fail_fast: stop at the first that neither passes nor is skipped.
      watch: called with each outcome, how many cases are left, and about how many seconds they take.

    Returns:
      The outcomes of this run.
    """
    todo = [case for case in cases if str(case) not in folder.done]
    left = sum(map(cost, todo))
    began, spent, out = time.monotonic(), 0.0, []

    def finish(case: Case, judge: Callable[[], Outcome]) -> Outcome:
        nonlocal spent, left
        outcome = judge()
        folder.add(outcome)
        out.append(outcome)
        spent, left = spent + cost(case), left - cost(case)
        watch(outcome, len(todo) - len(out), (time.monotonic() - began) / spent * left)
        return outcome

    # A case is judged while the next one runs; so they are all told by this one thread, in order.
    with ThreadPoolExecutor(max_workers=1) as judging:
        before: Future[Outcome] | None = None
        for index, case in enumerate(todo):
            judge = live.ran(case, todo[index + 1] if index + 1 < len(todo) else None)
            if before is not None:
                before.result()
            before = judging.submit(finish, case, judge)
            if fail_fast and before.result().verdict in ("fail", "error"):
                break
        if before is not None:
            before.result()
    return out
