"""The command `edgeloop`. One file per command; each imports what it needs when it runs, so that --help is quick.

Results go to stdout, everything else to stderr. Exit codes: 0, 1 for a failure, 2 for wrong usage, a wrong loop spec or
a file that is not a model, 130 for Ctrl-C.
"""

from __future__ import annotations

import os
import sys

import typer

from edgeloop import __version__
from edgeloop.cli import chat, config, doctor, env, inspect, models, recipes, run, rys, serve, tag
from edgeloop.cli.console import error
from edgeloop.errors import EdgeloopError

app = typer.Typer(
    name="edgeloop",
    help="Run GGUF models with a span of layers applied more than once.",
    epilog="A loop spec is FIRST-LASTxPASSES[:SOLVER,KEY=VALUE...], for example 12-20x3, or off.",
    invoke_without_command=True,
    rich_markup_mode=None,  # plain help is three times as quick
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("chat")(chat.chat)
app.command("run")(run.run)
app.command("inspect")(inspect.inspect)
app.command("env")(env.env)
app.command("config")(config.config)
app.command("doctor")(doctor.doctor)
app.command("serve")(serve.serve)
app.command("pull")(models.pull)
app.command("list")(models.list_)
app.command("rm")(models.rm)
app.command("recipes")(recipes.recipes)
app.command("tag")(tag.tag)
app.command("export")(tag.export)
app.command("rys")(rys.rys)


def _version(value: bool) -> None:
    if value:
        print(f"edgeloop {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process."""
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="edgeloop", standalone_mode=False)
    except EdgeloopError as problem:
        error(str(problem))
        code = problem.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # the reader has gone; python must not complain at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except MemoryError:
        error("out of memory; use a smaller context (-c) or a smaller model")
        code = 1
    except Exception as problem:
        # typer's usage errors, of whichever click it carries
        if hasattr(problem, "format_message"):
            message = problem.format_message().rstrip(".")
            if not message:
                code = 0  # help was shown
            else:
                context = getattr(problem, "ctx", None)
                error(f"{message}; see `{context.command_path if context else 'edgeloop'} --help`")
                code = getattr(problem, "exit_code", 2)
        elif type(problem).__name__ == "Abort":
            code = 130
        else:
            if os.environ.get("EDGELOOP_DEBUG"):
                raise
            error(f"{type(problem).__name__}: {problem} (EDGELOOP_DEBUG=1 shows where)")
            code = 1
    sys.exit(code or 0)
