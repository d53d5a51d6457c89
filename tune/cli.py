"""Commands of whole runs: ``demo``, ``run``, ``tune`` and ``inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from engine.cli.console import Address, AudioRoot, ClassMap, Json, Out, RetryFailed, Set, connected, print_result


def demo(out: Out = "runs/demo", set_: Set = None, as_json: Json = False, address: Address = None) -> None:
    """Synthesise a corpus, train a seed on little of it, run two iterations and show what they gained."""
    from engine.settings import build, override
    from engine.storage.paths import is_s3
    from tune import tables as report
    from tune.config import RunConfig
    from tune.demo.corpus import demo_settings
    from tune.run import run

    if is_s3(out):
        raise ValueError("the demo makes its sounds on this machine; give it a local folder, or use `clearsep run`")
    settings = demo_settings(out)
    config = build(RunConfig, override(settings, set_ or []))
    with connected(address):
        summary = run(config, f"{out}/run")
    print_result(lambda: report.run_tables(summary), summary, as_json)


def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (laptop, clearsep) or a YAML file of settings.")],
    out: Out,
    retry_failed: RetryFailed = False,
    set_: Set = None,
    as_json: Json = False,
    address: Address = None,
) -> None:
    """Take a corpus through all iterations: separate, score, filter, distil, evaluate.

    Example: `clearsep run laptop -o runs/first --set corpus=natural.csv --set clean=clips.csv`
    """
    from tune import recipes
    from tune import tables as report
    from tune.run import run as run_loop

    config = recipes.run_config(recipe, set_ or [])
    with connected(address):
        summary = run_loop(config, out, retry_failed=retry_failed)
    print_result(lambda: report.run_tables(summary), summary, as_json)


def tune_(
    space: Annotated[str, typer.Argument(help="YAML file of what to search, and how; or: demo.")],
    out: Out,
    trials: Annotated[
        int | None, typer.Option(help="Schedules to try beside the baselines, other than SPACE's.")
    ] = None,
    max_hours: Annotated[float | None, typer.Option(help="After so long no trial begins another iteration.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the search in OUT, or say that there is none.")
    ] = False,
    set_: Set = None,
    as_json: Json = False,
    address: Address = None,
) -> None:
    """Search for the schedule of thresholds that gives the best separator; trials share all that they have in common.

    Example: `clearsep tune space.yaml -o runs/search --trials 16`, then `clearsep run runs/search/best.yaml -o best`
    """
    from engine.storage.paths import location
    from tune.demo.corpus import write_demo_space
    from tune.search.config import read_search
    from tune.search.report import search_tables
    from tune.search.run import search

    if space == "demo":
        space = str(write_demo_space(out))
    config = read_search(space, [*(set_ or []), *([f"trials={trials}"] if trials is not None else [])])
    if resume and not (location(out) / "search.yaml").is_file():
        raise ValueError(f"{out} holds no search to go on with; leave out --resume to begin one there")
    with connected(address):
        found = search(config, out, max_hours=max_hours)
    print_result(lambda: search_tables(found), found, as_json)


def inspect(
    path: Annotated[str, typer.Argument(help="A run, a pass, tracks, a stem shard, a checkpoint or a corpus.")],
    class_map: ClassMap = None,
    audio_root: AudioRoot = None,
    as_json: Json = False,
) -> None:
    """Say what is in a run, a pass, a selection of tracks, a shard, a checkpoint or a corpus."""
    from tune.tables import inspect as look

    tables, value = look(path, class_map=class_map, audio_root=audio_root)
    print_result(lambda: tables, value, as_json)


def register(app: typer.Typer) -> None:
    """Add this package's commands to the command line."""
    app.command()(demo)
    app.command()(run)
    app.command("tune")(tune_)
    app.command()(inspect)
