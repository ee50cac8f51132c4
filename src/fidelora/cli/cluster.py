"""`fidelora worker`, `fidelora workers` and `fidelora db`: several machines on one database."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fidelora.cli.console import fail, warn
from fidelora.cli.options import OPTION_OF_SETTING, Debug

if TYPE_CHECKING:
    from fidelora.settings import Settings

_RAY_PANEL = "Ray"

db = typer.Typer(help="Manage the job database.", no_args_is_help=True)

_INSTALL = (
    "This command needs more packages; install them in the folder of Fidelora's repository with: "
    "pip install '.[server]' (for PostgreSQL: '.[postgres]')"
)

Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="Job database, such as postgresql://HOST/fidelora; by default FIDELORA_STORE_URL.",
    ),
]


def worker(
    store: Store = None,
    device: Annotated[
        str | None,
        typer.Option(help="Devices, separated by commas: auto, cpu, cuda, cuda:N or mps."),
    ] = None,
    outputs: Annotated[
        Path | None,
        typer.Option(
            help="Shared folder for images; by default OUTPUT_BASE_PATH. The servers need it "
            "under the same path."
        ),
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(
            help="Shared cache folder of the servers for LoRAs; by default LORA_DOWNLOAD_CACHE_DIR."
        ),
    ] = None,
    base_model: Annotated[
        list[str] | None,
        typer.Option(
            "--base-model",
            "--base",
            metavar="[MODEL=]BASE",
            help="Base model to load at the start, as for `fidelora serve`.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run the workers in the Ray cluster at this address (`auto`: the one of this "
            "machine), one for each GPU that the queue needs.",
            rich_help_panel=_RAY_PANEL,
        ),
    ] = None,
    min_workers: Annotated[
        int,
        typer.Option(
            min=0, help="Minimum number of workers in the cluster.", rich_help_panel=_RAY_PANEL
        ),
    ] = 1,
    max_workers: Annotated[
        int,
        typer.Option(
            min=0, help="Maximum number of workers in the cluster.", rich_help_panel=_RAY_PANEL
        ),
    ] = 8,
    cpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Run each worker on this number of CPUs instead of on a GPU.",
            rich_help_panel=_RAY_PANEL,
        ),
    ] = None,
    idle_seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds without a request after which a worker that is not needed ends.",
            rich_help_panel=_RAY_PANEL,
        ),
    ] = 300.0,
    debug: Debug = False,
) -> None:
    """Make the images of requests that servers have stored in a shared database.

    Stops on SIGTERM or Ctrl-C: running requests finish within FIDELORA_STOP_GRACE seconds or return
    to the queue. A second signal ends the wait (without --ray).
    """
    try:
        from fidelora.server.worker_host import run_workers
        from fidelora.settings import read_settings, setting_warnings
    except ModuleNotFoundError as error:
        fail(f"{_INSTALL} ({error.name} is missing)", 1)
    for sentence in setting_warnings():
        warn(sentence)
    settings = read_settings(
        OPTION_OF_SETTING,
        store_url=store,
        device=device,
        output_base_path=outputs,
        lora_cache_dir=adapters,
        base_model=",".join(base_model) if base_model else None,
        debug=debug or None,
    )
    if ray is None:
        run_workers(settings)
        return
    try:
        from fidelora.server.ray_cluster import Scale, run_on_ray
    except ModuleNotFoundError as error:
        fail(
            "--ray needs Ray; install it in the folder of Fidelora's repository with: "
            f"pip install '.[postgres,ray]' ({error.name} is missing)",
            1,
        )
    run_on_ray(settings, ray, Scale(min_workers, max_workers, idle_seconds), cpus)


def workers(store: Store = None) -> None:
    """List the live workers of the job database, one per line."""
    try:
        from fidelora.jobs.sql import SqlStore
    except ModuleNotFoundError as error:
        fail(f"{_INSTALL} ({error.name} is missing)", 1)
    opened = SqlStore(_settings(store).database)
    try:
        for state in opened.workers():
            activity = "busy"
            if state.idle_since is not None:
                activity = (
                    f"idle for {(datetime.now(UTC) - state.idle_since).total_seconds():.0f} s"
                )
            typer.echo(
                f"{state.name}  {state.device}  {state.version}  {activity}  "
                f"{','.join(state.models) or 'no base model'}  {len(state.loaded)} adapters"
            )
    finally:
        opened.close()


@db.command("upgrade")
def upgrade(store: Store = None) -> None:
    """Create or migrate the tables of the job database.

    Servers and workers also do this when they start. To migrate at a time of your choice, run this
    command of the new version before you start its servers and workers. Several processes can run
    it at the same time.
    """
    try:
        from fidelora.jobs.database import database_revisions
        from fidelora.jobs.sql import SqlStore
    except ModuleNotFoundError as error:
        fail(f"{_INSTALL} ({error.name} is missing)", 1)
    url = _settings(store).database
    before, newest = database_revisions(url)
    SqlStore(url).close()
    if before == newest:
        typer.echo(f"The job database is up to date (revision {newest}).")
    else:
        typer.echo(f"The job database was migrated from revision {before or 'none'} to {newest}.")


def _settings(store: str | None) -> Settings:
    from fidelora.settings import read_settings

    return read_settings(OPTION_OF_SETTING, store_url=store)
