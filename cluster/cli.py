"""Commands for clusters: ``submit``, ``jobs`` and ``preflight``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from cluster import jobs
from cluster.jobs import JobServer, JobState
from cluster.submit import COMMANDS, Command, JobConfig
from cluster.submit import submit as submit_job

if TYPE_CHECKING:
    from cluster.preflight import NodeReport

_LOGGER = logging.getLogger(__name__)
Server = Annotated[
    str | None,
    typer.Option("--address", help="The cluster's dashboard; default: RAY_API_SERVER_ADDRESS, else this machine's."),
]
Job = Annotated[str, typer.Argument(help="Id of a job, as `clearsep jobs list` shows it.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
Show = Callable[[Callable[[], list[Any]], object, bool], None]
"""Prints tables, or a value as JSON: ``show(tables, value, as_json)``."""
Write = Callable[[str], None]
"""Prints a part of a job's log."""
_NODES = ("node", "cpus", "gpus", "torch sees", "python", "ray", "torch", "disk GiB", "clock s", "out ms", "separator")


class ReportTable(NamedTuple):
    """Named columns of text, as the command line prints them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def register(app: typer.Typer, *, show: Show, write: Write) -> None:
    """Add this package's commands to the command line; ``show`` prints their results and ``write`` logs of jobs."""
    _add_submit(app, write)
    _add_preflight(app, show)
    app.add_typer(_jobs(show, write), name="jobs")


def _add_submit(app: typer.Typer, write: Write) -> None:
    @app.command(context_settings={"allow_interspersed_args": False})
    def submit(
        command: Annotated[str, typer.Argument(help=f"Command to run on the cluster: {', '.join(COMMANDS)}.")],
        arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments, as without `submit`.")] = None,
        address: Server = None,
        env: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME", help="Send this variable's value, which the cluster then shows; repeatable."),
        ] = None,
        env_file: Annotated[
            str | None,
            typer.Option(help="File on every node, such as a mounted secret, whose NAME=VALUE lines the job reads."),
        ] = None,
        install: Annotated[
            bool, typer.Option("--install", help="Install the dependencies, pinned as here, on nodes that lack them.")
        ] = False,
        preflight: Annotated[
            bool, typer.Option(help="Check every node first; start only if none has a problem.")
        ] = True,
        wait: Annotated[bool, typer.Option(help="Follow the job's log and exit with its exit code.")] = True,
        cpus: Annotated[float, typer.Option(help="CPUs to reserve for the command's own process.")] = 0.0,
        gpus: Annotated[float, typer.Option(help="GPUs to reserve for the command's own process.")] = 0.0,
        memory_gib: Annotated[float, typer.Option(help="Memory to reserve for the command's own process.")] = 0.0,
        metadata: Annotated[
            list[str] | None, typer.Option(metavar="KEY=VALUE", help="Stored with the job; repeatable.")
        ] = None,
    ) -> None:
        """Run a command as a job of a Ray cluster and follow its log.

        Run the same command again to re-attach to a running job, or to resume one that stopped, failed or was lost.

        Example: `clearsep submit --address http://head:8265 run laptop -o s3://bucket/runs/first --set corpus=…`

        With `RAY_AUTH_MODE=token`, the cluster receives the token of `RAY_AUTH_TOKEN` or `~/.ray/auth_token`. Ctrl-C
        leaves the job running.
        """
        parsed = parse_command(app, command, arguments or [])
        config = JobConfig(
            env=tuple(env or ()),
            env_file=env_file,
            install=install,
            preflight=preflight,
            num_cpus=cpus,
            num_gpus=gpus,
            memory_gib=memory_gib,
            metadata=tuple(_pair(word) for word in metadata or ()),
        )
        _submit(_server(address), parsed, config, write if wait else None)


def _submit(server: JobServer, command: Command, config: JobConfig, write: Write | None) -> None:
    """Submit a job, then print its id, or ``write`` its log as it grows and exit with its exit code."""
    job = submit_job(server, command, config)
    if write is None:
        sys.stdout.write(f"{job}\n")
        return
    _LOGGER.info(f"job {job} (Ctrl-C leaves it running; clearsep jobs stop {job} stops it)")
    with _detachable(job):
        code = jobs.follow(server, job, write)
    if code:
        state = jobs.job_state(server, job)
        _LOGGER.info(f"job {job} {state['status'].lower()}{': ' if state['message'] else ''}{state['message']}")
    raise typer.Exit(code)


def _add_preflight(app: typer.Typer, show: Show) -> None:
    @app.command()
    def preflight(
        out: Annotated[
            str | None, typer.Option("-o", "--out", help="Folder or s3:// address that every node must reach.")
        ] = None,
        separator: Annotated[
            str | None, typer.Option(help="Separator that every node must run: folder or package.module:factory.")
        ] = None,
        min_disk_gib: Annotated[float, typer.Option(help="Free space that every node must have.")] = 5.0,
        as_json: Json = False,
        address: Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else Ray here.")] = None,
    ) -> None:
        """Check every node of a cluster before a long job; exit code 1 if a node has a problem."""
        from cluster.session import connect

        with redirect_stdout(sys.stderr), connect(address):
            from cluster.preflight import PreflightConfig, preflight

            nodes = preflight(PreflightConfig(out=out, separator=separator, min_disk_gib=min_disk_gib))
        show(lambda: _node_tables(nodes), nodes, as_json)
        if any(node["problems"] for node in nodes):
            _LOGGER.error("the cluster is not ready; solve the problems in the table, then start again")
            raise typer.Exit(1)


def _jobs(show: Show, write: Write) -> typer.Typer:
    group = typer.Typer(no_args_is_help=True, help="List, follow and stop the jobs that `clearsep submit` started.")

    @group.command("list")
    def list_(address: Server = None, as_json: Json = False) -> None:
        """List all jobs that the cluster remembers, newest first."""
        states = jobs.list_jobs(_server(address))
        show(lambda: [_job_table(states)], states, as_json)

    @group.command()
    def status(job: Job, address: Server = None, as_json: Json = False) -> None:
        """Show the state of a job."""
        state = jobs.job_state(_server(address), job)
        show(lambda: [_job_table([state])], state, as_json)

    @group.command()
    def logs(
        job: Job,
        address: Server = None,
        follow: Annotated[
            bool, typer.Option("--follow", help="Follow until the job ends; exit with its exit code.")
        ] = False,
    ) -> None:
        """Print the log of a job."""
        server = _server(address)
        jobs.job_state(server, job)
        if not follow:
            write(server.get_job_logs(job))
            return
        with _detachable(job):
            raise typer.Exit(jobs.follow(server, job, write))

    @group.command()
    def stop(job: Job, address: Server = None, as_json: Json = False) -> None:
        """Stop a job. Its results stay; the same `clearsep submit` resumes it."""
        state = jobs.stop(_server(address), job)
        show(lambda: [_job_table([state])], state, as_json)

    return group


def parse_command(app: typer.Typer, name: str, arguments: Sequence[str]) -> Command:
    """A command line of this project, checked before it is sent; exits with code 2 for a wrong one."""
    if name not in COMMANDS:
        raise ValueError(f"a submitted command must be one of {', '.join(COMMANDS)}, got {name}; run others locally")
    group: Any = typer.main.get_command(app)
    options = group.commands[name].make_context(f"clearsep {name}", list(arguments)).params
    if options.get("address"):
        raise ValueError(
            "--address must come before the command's name, got it among its options; a job uses its own cluster"
        )
    separators = [options.get("separator") or options.get("from_")]
    separators += [text.partition("=")[2] for text in options.get("set_") or [] if text.startswith("separator=")]
    return Command(
        name=name,
        arguments=tuple(arguments),
        out=options["out"],
        separator=separators[-1] if separators[-1] != "scratch" else None,
    )


def _pair(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not key or not equals:
        raise ValueError(f"--metadata must be KEY=VALUE, got {word!r}; write it like team=birds")
    return key, value


def _server(given: str | None) -> JobServer:
    address = jobs.server_address(given)
    if (warning := jobs.exposure_warning(address)) is not None:
        _LOGGER.warning(warning)
    return jobs.connect_to_server(address)


@contextmanager
def _detachable(job: str) -> Iterator[None]:
    """Let Ctrl-C end the following and leave the job running."""
    try:
        yield
    except KeyboardInterrupt:
        _LOGGER.info(
            f"the job keeps running; clearsep jobs logs --follow {job} follows it again, clearsep jobs stop {job} "
            "stops it"
        )
        raise typer.Exit(130) from None


def _job_table(states: Sequence[JobState]) -> ReportTable:
    columns = ("job", "status", "command", "out", "started", "wall_s", "exit_code")
    rows = [["" if job[name] is None else str(job[name]) for name in columns] for job in map(dict, states)]
    return ReportTable(title="Jobs", columns=columns, rows=rows)


def _node_tables(nodes: Sequence[NodeReport]) -> list[ReportTable]:
    tables = [ReportTable(title="Nodes", columns=_NODES, rows=[_node_row(node) for node in nodes])]
    for title, rows in (
        ("Problems", [[node["node"], text] for node in nodes for text in node["problems"]]),
        ("Notes", [[node["node"], text] for node in nodes for text in node["notes"]]),
    ):
        if rows:
            tables.append(ReportTable(title=title, columns=("node", "what"), rows=rows))
    return tables


def _node_row(node: NodeReport) -> list[str]:
    versions = node.get("versions", {})
    speed = node.get("separator_rtf")

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return [
        node["node"],
        f"{node['cpus']:g}",
        f"{node['gpus']:g}",
        ", ".join(f"{gpu['name']} {gpu['memory_gib']:.0f} GiB" for gpu in node.get("gpus_seen", [])),
        *(str(versions.get(name) or "") for name in ("python", "ray", "torch")),
        number(node.get("disk_gib"), 0),
        number(node["clock_offset_s"], 2),
        number(node.get("out_ms"), 0),
        "" if speed is None else f"{1 / speed:.0f} × real time",
    ]
