"""The command `parity`. Its process imports no framework: JAX takes most of a GPU's memory on first use."""

from __future__ import annotations

import contextlib
import json
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from parity import backends, grids, report
from parity.backends import gpu, nccl
from parity.backends.base import Backend, Options, cores
from parity.backends.gpu import why_no_gpu
from parity.case import Case, CaseError
from parity.cluster.head import Head
from parity.cluster.place import PlaceError
from parity.launch import InfrastructureError, Pool
from parity.records import Folder, Outcome, OutError, counts, exit_code, package_version
from parity.runner import Harness, session
from parity.runner import run as run_cases
from parity.signals import handled

PASSED, FAILED, USAGE, BROKEN = 0, 1, 2, 3
INTERRUPTED = 130

app = typer.Typer(
    name="parity",
    help="Does the JAX layer compute what the PyTorch layer computes, on this mesh, with this format?\n\n"
    "Exit status: 0 all passed, 1 a parity failure, 2 wrong usage, 3 broken infrastructure (a rank that died, hung "
    "or raised; no room; a missing package), 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Platform(StrEnum):
    cpu = "cpu"
    gpu = "gpu"


def _positive(value: float) -> float:
    if not value > 0:
        raise typer.BadParameter(f"{value:g} seconds; it must be more than 0")
    return value


Cases = Annotated[list[str] | None, typer.Argument(metavar="[CASE]...", help="Case ids; 'parity list' shows some.")]
Grid = Annotated[
    str | None, typer.Option("--grid", help="smoke (the default), vllm, transports, huggingface, or a .toml file.")
]
Match = Annotated[str | None, typer.Option("-k", metavar="TEXT", help="Only cases whose id holds every word of TEXT.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Platforms = Annotated[Platform, typer.Option("--platform", help="Where the layers run.")]
Timeout = Annotated[
    float, typer.Option("--timeout", callback=_positive, help="Seconds a case may take in the frameworks.")
]
Repeat = Annotated[
    int, typer.Option("--repeat", metavar="N", min=2, help="Runs of a layer whose outputs must be equal bit for bit.")
]
Frameworks = Annotated[
    str | None, typer.Option("--frameworks", metavar="NAME,...", help="Which to run; jax,torch by default.")
]
JaxProcesses = Annotated[bool, typer.Option("--jax-processes", help="JAX as one process a rank.")]
RanksPerGpu = Annotated[int, typer.Option("--ranks-per-gpu", min=1, metavar="N", help="N ranks share each GPU.")]
NcclLibrary = Annotated[
    str | None,
    typer.Option("--nccl-library", metavar="PATH", help="NCCL 2.30 or newer, which lets ranks share a GPU."),
]


OutFolder = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for results.")]
Resume = Annotated[bool, typer.Option("--resume", help="Skip cases that DIR already has (errors run again).")]
FailFast = Annotated[bool, typer.Option("--fail-fast", help="Stop at the first case that does not pass.")]
NoStages = Annotated[bool, typer.Option("--no-stages", help="Do not compare stage by stage.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="List every case in the final table.")]
Junit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Also write JUnit XML.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"parity {package_version()}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_command(
    grid: Grid = None,
    match: Match = None,
    as_json: AsJson = False,
    capabilities: Annotated[bool, typer.Option("--capabilities", help="Print which transport serves what.")] = False,
    flags: Annotated[bool, typer.Option("--flags", help="Print the flags of a case id.")] = False,
    promises: Annotated[
        bool, typer.Option("--determinism", help="Print what leaves a token's result the same, bit for bit.")
    ] = False,
) -> None:
    """Print the case ids of a grid."""
    with _messages():
        if promises:
            _print_promises(as_json)
            return
        if capabilities:
            _print_capabilities(as_json)
            return
        if flags:
            print("\n".join(report.flag_lines()))
            return
        cases = grids.select(grids.load(grid or "smoke"), match)
        if as_json:
            print(json.dumps([_case_json(case) for case in cases], indent=2))
        else:
            print("\n".join(map(str, cases)))


def _print_capabilities(as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.capabilities(), indent=2))
    else:
        _console().print(report.capability_table())


def _print_promises(as_json: bool) -> None:
    from parity import determinism

    if as_json:
        print(json.dumps(determinism.promises(), indent=2))
        return
    for table in determinism.promise_tables():
        _console().print(table)
    print(determinism.legend())


def _case_json(case: Case) -> dict:
    return {"case": str(case), "mode": case.mode, "world": case.world, "format": case.format, "tokens": case.tokens}


@app.command("run")
def run_command(
    ids: Cases = None,
    grid: Grid = None,
    match: Match = None,
    out: OutFolder = Path("parity-out"),
    resume: Resume = False,
    fail_fast: FailFast = False,
    where: Platforms = Platform.cpu,
    timeout: Timeout = 180.0,
    jax_processes: JaxProcesses = False,
    repeat: Repeat = 2,
    ranks_per_gpu: RanksPerGpu = 1,
    nccl_library: NcclLibrary = None,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="The I-th of N parts of the cases; see 'merge'.")
    ] = None,
    frameworks: Frameworks = None,
    no_stages: NoStages = False,
    verbose: Verbose = False,
    junit: Junit = None,
) -> None:
    """Run cases in every framework and judge them.

    Results go to DIR/results.jsonl as they come, one JSON object a case, and to DIR/summary.json.
    """
    with _messages():
        cases = _chosen(ids, grid, match)
        if shard is not None:
            cases = grids.shard(cases, shard)
        options = Options(
            platform=where.value,
            jax_processes=jax_processes,
            ranks_per_gpu=ranks_per_gpu,
            nccl_library=nccl_library,
            repeat=repeat,
        )
        chosen = _backends(frameworks, options)
        raise typer.Exit(_run(cases, chosen, out, resume, fail_fast, timeout, verbose, junit, stages=not no_stages))


@app.command("explain")
def explain_command(
    case: Annotated[str, typer.Argument(metavar="CASE", help="A case id.")],
    frameworks: Frameworks = None,
    plant: Annotated[str | None, typer.Option("--plant", metavar="BUG", help="Plant a known bug first.")] = None,
    planted_in: Annotated[
        str | None, typer.Option("--in", metavar="NAME", help="The framework to plant it in.")
    ] = None,
    as_json: AsJson = False,
    where: Platforms = Platform.cpu,
    timeout: Timeout = 180.0,
    jax_processes: JaxProcesses = False,
    ranks_per_gpu: RanksPerGpu = 1,
    nccl_library: NcclLibrary = None,
) -> None:
    """Run one case and show it stage by stage: what each makes of the oracle's inputs, and where an error is born."""
    from parity import explain

    with _messages():
        parsed = Case.parse(case)
        options = Options(
            platform=where.value,
            jax_processes=jax_processes,
            ranks_per_gpu=ranks_per_gpu,
            nccl_library=nccl_library,
        )
        chosen = _backends(frameworks, options)
        planted = explain.check((plant, planted_in), chosen)
        raise typer.Exit(explain.main(parsed, chosen, timeout, planted, as_json, _console(stderr=as_json)))


def _chosen(ids: Sequence[str] | None, grid: str | None, match: str | None) -> list[Case]:
    cases = [Case.parse(text) for text in ids or ()]
    if grid is not None or not cases:
        cases += grids.load(grid or "smoke")
    return grids.select(grids.order(cases), match)


def _backends(names: str | None, options: Options) -> list[Backend]:
    """Construct the backends, and find out before anything is launched whether they can run."""
    if options.ranks_per_gpu > 1 and options.platform != "gpu":
        raise typer.BadParameter("--ranks-per-gpu is for --platform gpu; on CPUs ranks share the cores anyway")
    if options.platform == "gpu" and (reason := why_no_gpu()):
        raise InfrastructureError(reason)
    if options.platform == "gpu" and (options.ranks_per_gpu > 1 or options.nccl_library):
        try:
            options = replace(options, nccl_library=str(nccl.find(options.nccl_library)))
        except nccl.NcclError as error:
            raise InfrastructureError(str(error)) from None
    chosen = [backends.load(name, options) for name in backends.chosen(names)]
    for backend in chosen:
        if reason := backend.missing():
            raise InfrastructureError(reason)
    return chosen


def _run(
    cases: Sequence[Case],
    chosen: Sequence[Backend],
    out: Path,
    resume: bool,
    fail_fast: bool,
    timeout: float,
    verbose: bool,
    junit: Path | None,
    stages: bool,
    make_pool: Callable[..., Pool] = Pool,
    extra: dict | None = None,
) -> int:
    console, began = _console(), time.monotonic()
    if junit:
        report.check_junit(junit)
    status, interrupted, trouble = PASSED, False, ""
    with Folder(out, resume, {str(case) for case in cases}) as folder:
        earlier = len(folder.done)
        if earlier:
            console.print(f"{earlier} of {len(cases)} cases are in {out} already")
        versions: dict[str, str] = {}
        try:
            harness = Harness.default(stages)
            with _terminable(), session(chosen, timeout, out / "logs", harness, make_pool) as live:
                try:
                    with _progress(console, len(cases), earlier) as watch:
                        run_cases(cases, live, folder, fail_fast=fail_fast, watch=watch)
                finally:
                    versions = live.pools.all_versions()
        except KeyboardInterrupt:
            interrupted, status = True, INTERRUPTED
        except InfrastructureError as error:
            trouble, status = str(error), BROKEN
        if status == PASSED:
            status = exit_code(folder.done.values())
        summary = _summary(cases, folder.done, time.monotonic() - began, versions, status, interrupted, trouble)
        summary["platform"] |= gpu.describe(chosen[0].options) | (extra or {})
        try:
            folder.summarize(summary)
            if junit:
                report.write_junit(junit, list(map(str, cases)), folder.done, summary)
        except InfrastructureError as error:
            trouble, status = trouble or str(error), BROKEN
        report.final_table(console, list(map(str, cases)), folder.done, verbose)
    console.print(f"{report.duration(time.monotonic() - began)}, results in {out}", highlight=False)
    if interrupted:
        _say(f"interrupted; what is done is in {out}, go on with --resume")
    if trouble:
        _say(f"error: {trouble}")
    return status


def _summary(
    cases: Sequence[Case],
    outcomes: dict[str, Outcome],
    seconds: float,
    versions: dict[str, str],
    status: int,
    interrupted: bool,
    trouble: str,
) -> dict:
    return {
        "counts": counts(outcomes.values()),
        "notes": report.notes(outcomes.values()),
        "cases": len(cases),
        "not_run": len(cases) - len(outcomes),
        "cases_not_run": [str(case) for case in cases if str(case) not in outcomes],
        "exit_status": status,
        "interrupted": interrupted,
        "trouble": trouble,
        "seconds": round(seconds, 3),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"parity": package_version(), "python": platform.python_version(), **versions},
        "platform": {"system": platform.platform(), "machine": platform.machine(), "cores": cores()},
        "command": ["parity", *sys.argv[1:]],
        "worst_margins": report.worst_margins(outcomes.values()),
    }


@contextlib.contextmanager
def _progress(console: Console, total: int, done: int) -> Iterator:
    """What to call after each case. A bar on a terminal, lines elsewhere."""
    count = done

    def lines(outcome: Outcome, seconds: float) -> None:
        nonlocal count
        count += 1
        # a terminal has the bar for passing cases; a log keeps every line
        if outcome.verdict != "pass" or not console.is_terminal:
            console.print(report.progress_line(outcome, count, total, seconds), highlight=False, soft_wrap=True)
        if outcome.reason:
            console.print(report.explain(outcome), highlight=False, soft_wrap=True)

    if not console.is_terminal:
        yield lambda outcome, left, seconds: lines(outcome, seconds)
        return
    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[left]}"), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, completed=done, left="")

        def watch(outcome: Outcome, left: int, seconds: float) -> None:
            lines(outcome, seconds)
            bar.update(task, advance=1, left=f"{report.duration(seconds)} left", description=outcome.case)

        yield watch


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a run the way Ctrl-C does: workers killed, results whole."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with handled((signal.SIGTERM, signal.SIGHUP), interrupt):
        yield


@app.command("worker")
def worker_command(
    ids: Cases = None,
    grid: Grid = None,
    match: Match = None,
    out: OutFolder = Path("parity-out"),
    resume: Resume = False,
    fail_fast: FailFast = False,
    where: Platforms = Platform.cpu,
    timeout: Timeout = 180.0,
    repeat: Repeat = 2,
    ranks_per_gpu: RanksPerGpu = 1,
    nccl_library: NcclLibrary = None,
    frameworks: Frameworks = None,
    no_stages: NoStages = False,
    verbose: Verbose = False,
    junit: Junit = None,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="In place of RANK and the like.")] = None,
    ranks: Annotated[int | None, typer.Option("--ranks", min=1, help="In place of WORLD_SIZE and the like.")] = None,
    local_rank: Annotated[
        int | None, typer.Option("--local-rank", min=0, help="In place of LOCAL_RANK and the like.")
    ] = None,
    master: Annotated[
        str | None, typer.Option("--master-addr", metavar="HOST", help="Rank 0's host, in place of MASTER_ADDR.")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="Where rank 0 listens; MASTER_PORT and 1 if not given.")
    ] = None,
    bind: Annotated[
        str | None, typer.Option("--bind", metavar="ADDRESS", help="What rank 0 listens on, if not on HOST.")
    ] = None,
    wait: Annotated[
        float, typer.Option("--wait", callback=_positive, help="Seconds in which all ranks must have come.")
    ] = 300.0,
) -> None:
    """Be one rank of a run that a cluster's launcher has started: torchrun, srun, Kubernetes.

    Start the same command for every rank. Rank 0 judges and writes DIR; all end with its exit status.
    """
    from parity.cluster import command

    with _messages():
        here = command.find(rank, ranks, local_rank, master, port)
        cases = _chosen(ids, grid, match)
        options = Options(
            platform=where.value,
            jax_processes=True,
            ranks_per_gpu=ranks_per_gpu,
            nccl_library=nccl_library,
            repeat=repeat,
            launched=here.ranks,
        )
        console = _console()

        def run(head: Head) -> int:
            chosen = _backends(frameworks, options)
            extra = {"launched": {"ranks": here.ranks, "by": here.source, "hosts": head.hosts()}}
            return _run(cases, chosen, out, resume, fail_fast, timeout, verbose, junit, not no_stages, head.pool, extra)

        def say(text: str) -> None:
            console.print(text, highlight=False, soft_wrap=True)

        raise typer.Exit(command.main(here, bind, wait, say, run))


@app.command("merge")
def merge_command(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the joined results.")],
) -> None:
    """Join the results of several runs, of the parts that --shard makes for instance, into one folder."""
    from parity import merge

    with _messages():
        raise typer.Exit(merge.main(folders, out, _console()))


@app.command("doctor")
def doctor_command(
    as_json: AsJson = False,
    timeout: Annotated[
        float, typer.Option("--timeout", callback=_positive, help="Seconds a framework may take to be imported.")
    ] = 120.0,
) -> None:
    """Tell what this machine can run, what is missing for the rest, and how to get it. Exit status: always 0."""
    from parity import doctor

    doctor.main(as_json, _console(), package_version(), timeout)


@app.command("determinism")
def determinism_command(
    ids: Cases = None,
    grid: Grid = None,
    match: Match = None,
    as_json: AsJson = False,
    where: Platforms = Platform.cpu,
    timeout: Timeout = 180.0,
    jax_processes: JaxProcesses = False,
    repeat: Repeat = 2,
    ranks_per_gpu: RanksPerGpu = 1,
    nccl_library: NcclLibrary = None,
    frameworks: Frameworks = None,
) -> None:
    """Compare a token's result bit for bit when its case runs again, and when the batch around it is another one.

    Without cases and a grid it is the grid 'determinism'. 'parity list --determinism' prints what must be equal.
    """
    from parity import determinism

    with _messages():
        cases = _chosen(ids, grid or (None if ids else "determinism"), match)
        options = Options(
            platform=where.value,
            jax_processes=jax_processes,
            ranks_per_gpu=ranks_per_gpu,
            nccl_library=nccl_library,
            repeat=repeat,
        )
        chosen = _backends(frameworks, options)
        with _terminable():
            status = determinism.main(cases, chosen, timeout, as_json, _console(stderr=as_json))
        raise typer.Exit(status)


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder of results.")] = Path("parity-out"),
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The page; DIR/report.html if not given.")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the grid instead.")] = False,
) -> None:
    """Explain the results in DIR: one HTML page, self-contained."""
    with _messages():
        raise typer.Exit(report.main(folder, out, text, _console()))


@app.command("selftest")
def selftest_command(
    as_json: AsJson = False,
    timeout: Timeout = 180.0,
    match: Match = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Also write DIR/selftest.json.")] = None,
) -> None:
    """Plant bugs in the JAX layer and in the PyTorch layer, and show which gate catches each."""
    from parity import selftest

    with _messages():
        chosen = _backends(None, Options())
        raise typer.Exit(selftest.main(chosen, timeout, match, as_json, _console(stderr=as_json), out=out))


@app.command("bench")
def bench_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SHAPE]...", help="prefill_mixtral, mixtral, t64.d128.f96/e8.k2, a case id, ..."),
    ] = None,
    tokens: Annotated[str | None, typer.Option("--tokens", metavar="N,N", help="Instead of the shapes' own.")] = None,
    what: Annotated[str | None, typer.Option("--what", metavar="WHAT,WHAT", help="Kinds of work: layer, ...")] = None,
    candidates: Annotated[str | None, typer.Option("--candidates", metavar="NAME,NAME", help="Default: all.")] = None,
    where: Platforms = Platform.cpu,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Calls that the median is taken of.")] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="Three calls; the shape 'tiny' where none is named.")] = False,
    limit: Annotated[
        float, typer.Option("--limit", callback=_positive, help="Seconds that one measurement may take.")
    ] = 120.0,
    budget: Annotated[
        float, typer.Option("--budget", callback=_positive, help="Seconds after which none is begun.")
    ] = float("inf"),
    peers: Annotated[
        list[Path] | None, typer.Option("--peers", metavar="DIR", help="Folder with candidates' modules; repeat it.")
    ] = None,
    parallel: Annotated[
        list[str] | None,
        typer.Option("--parallel", metavar="SPREAD", help="Over a mesh: dp4.tp1.ep/padded, all, ... Repeat it."),
    ] = None,
    ranks: Annotated[str | None, typer.Option("--ranks", metavar="N,N", help="--parallel over these, scaled.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the rows.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw time against tokens (SVG).")] = None,
    log: Annotated[Path, typer.Option("--log", metavar="FILE", help="What the candidates print.")] = Path(
        "parity-out/bench.log"
    ),
) -> None:
    """Time layers and single operations of several implementations side by side, against what the device could do.

    Exit status: 0, 1 if a timed result was wrong, 2 wrong usage, 3 if nothing could be timed.
    """
    from parity.bench import catalog, command, driver, shapes

    with _messages():
        if where is Platform.gpu and (reason := why_no_gpu()):
            raise InfrastructureError(reason)
        request = command.Request(
            names=tuple(names or ()),
            tokens=command.numbers(tokens, "--tokens"),
            whats=command.words(what, shapes.WHATS, "--what"),
            candidates=command.words(candidates, catalog.NAMES, "--candidates"),
            parallel=tuple(parallel or ()),
            ranks=command.numbers(ranks, "--ranks"),
            quick=quick,
            options=driver.Options(
                platform=where.value, repeat=repeat, limit=limit, budget=budget, peers=tuple(peers or ())
            ),
            json=json_file,
            plot=plot,
            log=log,
        )
        raise typer.Exit(command.run(request, _console(), package_version(), _terminable))


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    """Turn what is wrong with the usage, or with the machine, into one message and an exit status."""
    try:
        yield
    except (CaseError, grids.GridError, backends.BackendError, OutError, PlaceError) as error:
        _say(f"error: {error}")
        raise typer.Exit(USAGE) from None
    except InfrastructureError as error:
        _say(f"error: {error}")
        raise typer.Exit(BROKEN) from None
    except KeyboardInterrupt:
        _say("interrupted")
        raise typer.Exit(INTERRUPTED) from None


def _console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    # Ids are long, and a log has no width: never wrap there.
    return console if console.is_terminal else Console(stderr=stderr, width=200)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> None:
    """Entry point of the command `parity`."""
    app()
