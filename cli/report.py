"""The command `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cli.options import progress_bar, show


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True, help="The page."
)
@click.option(
    "--live", is_flag=True, help="Serve the page to this machine's browser while the runs go on; write nothing."
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8787, show_default=True, help="With --live; 0: any that is free."
)
@click.option("--json", "as_json", is_flag=True, help="Print the runs' state as one JSON object, too.")
def report(runs: tuple[Path, ...], output: Path, live: bool, port: int, as_json: bool) -> None:
    """Show training runs side by side in one self-contained page: losses, speed, memory, experts, configuration.

    RUN is a run's log (--log-file) or the folder that it saves to.

    Example: moeconv report runs/base runs/upcycled -o report.html
    """
    from runtime.report.build import make_page, write_page
    from runtime.report.data import report_data, summary
    from runtime.report.read import open_runs

    with progress_bar("read") as progress:
        opened = open_runs(runs, progress)
    if live:
        _serve(opened, port)
        return
    write_page(output, make_page(report_data(opened)))
    value = {"page": str(output), "runs": [{"name": run.name, "path": str(run.path)} | summary(run) for run in opened]}
    lines = [
        f"{run.path}: step {run.iteration} of {run.train_iters}"
        + (f", {run.bad_lines} damaged lines" if run.bad_lines else "")
        for run in opened
    ]
    show(value, as_json, [*lines, f"{output}: {output.stat().st_size / 1e6:.1f} MB, open it in a browser"])


def _serve(runs: list[Any], port: int) -> None:
    from runtime.report.serve import ReportServer

    server = ReportServer(runs, port)
    click.echo(f"{server.url} (this machine only; Ctrl-C ends it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        click.echo()
    finally:
        server.server_close()
