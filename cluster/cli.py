"""The commands of a cluster: ``submit``, ``jobs`` and ``preflight``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated, Any, NamedTuple

import typer

from cluster.submit import COMMANDS, Command, JobConfig

_LOGGER = logging.getLogger(__name__)
Server = Annotated[
    str | None,
    typer.Option("--address", help="The cluster's dashboard; default: RAY_API_SERVER_ADDRESS, else this machine's."),
]
Job = Annotated[str, typer.Argument(help="A job's id, as `clearsep jobs list` shows it.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
Show = Callable[[Callable[[], list[Any]], object, bool], None]
Connected = Callable[[str | None], AbstractContextManager[None]]
_NODES = ("node", "cpus", "gpus", "torch sees", "python", "ray", "torch", "disk GiB", "clock s", "out ms", "separator")


class ReportTable(NamedTuple):
    """What the command line prints a table of."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def register(
    app: typer.Typer,
    *,
    show: Show,
    connected: Connected,
) -> None:
    """Add the commands to the command line, whose ways of speaking, printing and connecting they use."""
    _add_submit(app)
    _add_preflight(app, show, connected)
    app.add_typer(_jobs(show), name="jobs")


def _add_submit(app: typer.Typer) -> None:
    @app.command(context_settings={"allow_interspersed_args": False})
    def submit(
        command: Annotated[str, typer.Argument(help=f"What to run there: {', '.join(COMMANDS)}.")],
        arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments, as without `submit`.")] = None,
        address: Server = None,
        env: Annotated[
            list[str] | None, typer.Option(metavar="NAME", help="Give the job this variable's value; repeatable.")
        ] = None,
        install: Annotated[
            bool, typer.Option("--install", help="Install our dependencies, as pinned here, on nodes that lack them.")
        ] = False,
        preflight: Annotated[bool, typer.Option(help="Look at every node first; begin only where all are fit.")] = True,
        wait: Annotated[bool, typer.Option(help="Follow the job's log and exit as it does.")] = True,
        cpus: Annotated[float, typer.Option(help="CPUs to hold for the command itself.")] = 0.0,
        gpus: Annotated[float, typer.Option(help="GPUs to hold for the command itself.")] = 0.0,
        memory_gib: Annotated[float, typer.Option(help="Memory to hold for the command itself.")] = 0.0,
        metadata: Annotated[
            list[str] | None, typer.Option(metavar="KEY=VALUE", help="Kept with the job; repeatable.")
        ] = None,
    ) -> None:
        """Run a command as a job of a Ray cluster. The same line again goes on: with the job, or where it stopped.

        Example: `clearsep submit --address http://head:8265 run laptop -o s3://bucket/runs/first --set corpus=…`

        With `RAY_AUTH_MODE=token`, the token of `RAY_AUTH_TOKEN` or `~/.ray/auth_token` is shown to the cluster. Ctrl-C
        leaves the job running.
        """
        from cluster import jobs
        from cluster.submit import submit as submit_job

        asked = _parsed(app, command, arguments or [])
        config = JobConfig(
            env=tuple(env or ()),
            install=install,
            preflight=preflight,
            num_cpus=cpus,
            num_gpus=gpus,
            memory_gib=memory_gib,
            metadata=tuple(_pair(word) for word in metadata or ()),
        )
        client = _client(address)
        job = submit_job(client, asked, config)
        if not wait:
            sys.stdout.write(f"{job}\n")
            return
        _LOGGER.info(f"job {job} (Ctrl-C leaves it running; clearsep jobs stop {job} ends it)")
        with _leaving(job):
            code = jobs.follow(client, job, _write)
        if code:
            told = jobs.status(client, job)
            _LOGGER.info(f"job {job} {told['status'].lower()}{': ' if told['message'] else ''}{told['message']}")
        raise typer.Exit(code)


def _add_preflight(app: typer.Typer, show: Show, connected: Connected) -> None:
    @app.command()
    def preflight(
        out: Annotated[
            str | None, typer.Option("-o", "--out", help="Where results will go; all must reach it.")
        ] = None,
        separator: Annotated[str | None, typer.Option(help="A separator's folder; all must be able to run it.")] = None,
        min_disk_gib: Annotated[float, typer.Option(help="Room that all must have for temporary files.")] = 5.0,
        as_json: Json = False,
        address: Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, else Ray here.")] = None,
    ) -> None:
        """Look at every node of a cluster before a long job; exit code 1 where there is a reason not to begin."""
        with connected(address):
            from cluster.preflight import PreflightConfig, preflight

            rows = preflight(PreflightConfig(out=out, separator=separator, min_disk_gib=min_disk_gib))
        show(lambda: _node_tables(rows), rows, as_json)
        if any(row["problems"] for row in rows):
            _LOGGER.info("do not begin like this; what is wrong is in the table of problems")
            raise typer.Exit(1)


def _jobs(show: Show) -> typer.Typer:
    group = typer.Typer(no_args_is_help=True, help="The jobs that `clearsep submit` sent to a Ray cluster.")

    @group.command("list")
    def list_(address: Server = None, as_json: Json = False) -> None:
        """All that the cluster remembers, the newest first."""
        from cluster import jobs

        found = jobs.listed(_client(address))
        show(lambda: [_job_table(found)], found, as_json)

    @group.command()
    def status(job: Job, address: Server = None, as_json: Json = False) -> None:
        """How a job stands."""
        from cluster import jobs

        found = jobs.status(_client(address), job)
        show(lambda: [_job_table([found])], found, as_json)

    @group.command()
    def logs(
        job: Job,
        address: Server = None,
        follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends; exit as it does.")] = False,
    ) -> None:
        """What a job has said."""
        from cluster import jobs

        client = _client(address)
        jobs.status(client, job)
        if not follow:
            _write(client.get_job_logs(job))
            return
        with _leaving(job):
            raise typer.Exit(jobs.follow(client, job, _write))

    @group.command()
    def stop(job: Job, address: Server = None, as_json: Json = False) -> None:
        """End a job; what it has done stays, and the same `clearsep submit` goes on with it."""
        from cluster import jobs

        found = jobs.stop(_client(address), job)
        show(lambda: [_job_table([found])], found, as_json)

    return group


def _parsed(app: typer.Typer, name: str, arguments: Sequence[str]) -> Command:
    """A command line of ours, checked here so that a misspelt option is not found out on the cluster."""
    if name not in COMMANDS:
        raise ValueError(f"{name} is not submitted; those that are: {', '.join(COMMANDS)}")
    group: Any = typer.main.get_command(app)
    given = group.commands[name].make_context(f"clearsep {name}", list(arguments)).params
    if given.get("address"):
        raise ValueError("a job uses the cluster that it runs on; give --address before the command's name")
    separator = given.get("separator") or given.get("from_")
    return Command(
        name=name,
        arguments=tuple(arguments),
        out=given["out"],
        separator=separator if separator != "scratch" else None,
    )


def _pair(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not key or not equals:
        raise ValueError(f"--metadata {word} is not KEY=VALUE")
    return key, value


def _client(named: str | None) -> Any:  # noqa: ANN401 - Ray's client
    from cluster import jobs

    address = jobs.address_of(named)
    if (told := jobs.exposure(address)) is not None:
        _LOGGER.info(told)
    return jobs.client(address)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def _leaving(job: str) -> Iterator[None]:
    """Ctrl-C ends the watching alone."""
    try:
        yield
    except KeyboardInterrupt:
        _LOGGER.info(
            f"the job goes on; clearsep jobs logs --follow {job} watches it again, clearsep jobs stop {job} ends it"
        )
        raise typer.Exit(130) from None


def _job_table(found: Sequence[dict[str, Any]]) -> ReportTable:
    columns = ("job", "status", "command", "out", "started", "wall_s", "exit_code")
    rows = [["" if job[name] is None else str(job[name]) for name in columns] for job in found]
    return ReportTable(title="Jobs", columns=columns, rows=rows)


def _node_tables(nodes: Sequence[dict[str, Any]]) -> list[ReportTable]:
    tables = [ReportTable(title="Nodes", columns=_NODES, rows=[_node_row(node) for node in nodes])]
    for name in ("problems", "notes"):
        rows = [[node["node"], told] for node in nodes for told in node[name]]
        if rows:
            tables.append(ReportTable(title=name.capitalize(), columns=("node", "what"), rows=rows))
    return tables


def _node_row(node: dict[str, Any]) -> list[str]:
    versions = node.get("versions", {})
    seen = ", ".join(f"{gpu['name']} {gpu['memory_gib']:.0f} GiB" for gpu in node.get("gpus_seen", []))
    speed = node.get("separator_rtf")

    def number(name: str, digits: int) -> str:
        return "" if node.get(name) is None else f"{node[name]:.{digits}f}"

    return [
        node["node"],
        f"{node['cpus']:g}",
        f"{node['gpus']:g}",
        seen,
        *(str(versions.get(name) or "") for name in ("python", "ray", "torch")),
        number("disk_gib", 0),
        number("clock_offset_s", 2),
        number("out_ms", 0),
        "" if speed is None else f"{1 / speed:.0f} × real time",
    ]
