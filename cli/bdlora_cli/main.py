"""The ``bdlora`` command. Each subcommand parses, calls the library and renders; what it does stands in the library."""

import sys

import typer

from bdlora_cli.convert import app as convert_app
from bdlora_cli.demo import demo
from bdlora_cli.launch import launch
from bdlora_cli.perf import app as perf_app
from bdlora_sglang.errors import BDLoRAError

app = typer.Typer(
    name="bdlora",
    help="BD-LoRA: LoRA serving under tensor parallelism without communication, on SGLang.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

# Flags that are not ours are SGLang's.
app.command("launch", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(launch)
app.command("demo")(demo)
app.add_typer(convert_app)
app.add_typer(perf_app)


def main() -> None:
    """Run the command line; an error that the user can mend becomes its message and exit code 1."""
    try:
        app()
    except BDLoRAError as error:
        typer.secho(f"bdlora: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
