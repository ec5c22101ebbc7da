"""The command line: one file per verb, wired together here.

A verb is a thin shell over a public function. Its file imports torch and transformers only inside the
function that needs them, so that ``undercroft --help`` answers at once. Results go to stdout, progress and
errors to stderr. Exit codes: 0 done, 1 failed with a typed message, 2 wrong usage, 130 interrupted.
"""

import sys
from typing import Annotated

import typer

from undercroft.cli.bench import bench
from undercroft.cli.demo import demo
from undercroft.cli.doctor import doctor
from undercroft.cli.pack import pack
from undercroft.cli.run import run
from undercroft.cli.train import train
from undercroft.errors import UndercroftError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help, without the time it takes to import Rich
    context_settings={"help_option_names": ["-h", "--help"]},
)

for verb in (demo, doctor, pack, run, train):
    shown = (verb.__doc__ or "").replace(r"\b", "\b")  # which tells click to leave lines as they are
    app.command(help=shown)(verb)
app.add_typer(bench, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        from undercroft import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def undercroft(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train and run language models that do not fit in memory: tensors move between GPU, RAM and SSD."""


def main() -> None:
    """Run the command line and exit; the console script."""
    try:
        app()
    except UndercroftError as error:
        print(f"undercroft: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == 130:
            print("undercroft: interrupted", file=sys.stderr)
        raise
