"""The `sas-megatron` command: imports and runs a subcommand, and exits with status 2 after a user error.

A subcommand is imported only when it runs, so that `--help` stays fast.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import time

import click

from sas_megatron import __version__
from sas_megatron.cli.suggested_command import suggest_command
from sas_megatron.config.errors import UserError

# Delay of the error message on the first process of every other node, so that rank 0 prints first.
SECONDS_AFTER_RANK0 = 3.0

# name -> (module:attribute, one line of help); the help is here so that `--help` imports no subcommand.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": (
        "sas_megatron.cli.quickstart:quickstart",
        "Train MHA and SAS on the same text and compare them.",
    ),
    "tokenizer": ("sas_megatron.cli.tokenizer:tokenizer", "Train a tokenizer."),
    "data": ("sas_megatron.cli.data:data", "Encode documents as token files, and inspect token files."),
    "train": ("sas_megatron.cli.train:train", "Train one model from a config."),
    "evaluate": (
        "sas_megatron.cli.evaluate:evaluate",
        "Evaluate a trained model: held-out loss and tasks of lm-evaluation-harness.",
    ),
    "generate": ("sas_megatron.cli.generate:generate", "Generate text with a trained model."),
    "checkpoint": (
        "sas_megatron.cli.checkpoint:checkpoint",
        "Verify checkpoints; export and import transformers models.",
    ),
    "costs": ("sas_megatron.cli.costs:costs", "Count parameters and FLOPs of configs."),
    "match": (
        "sas_megatron.cli.match:match",
        "Find dimensions of attention variants that match the cost of a base config.",
    ),
    "study": ("sas_megatron.cli.study:study", "Plan, run and compare the runs that a study file describes."),
    "estimate": (
        "sas_megatron.cli.estimate:estimate",
        "Estimate memory, communication and step time of a run on any number of ranks.",
    ),
    "fit": ("sas_megatron.cli.fit:fit", "Fit a scaling law to a table of runs."),
    "doctor": (
        "sas_megatron.cli.doctor:doctor",
        "Check a node or an allocation for problems that would make training fail.",
    ),
    "runs": ("sas_megatron.cli.runs:runs", "Send the records of runs to W&B or MLflow."),
    "bench": ("sas_megatron.cli.bench:bench", "Measure speed and memory on this machine."),
}

# Commands that join the process group of a launcher. All others are independent in each process.
COLLECTIVE_COMMANDS = ("train", "evaluate", "generate", "doctor")

# old name -> present name
RENAMED_COMMANDS = {"simulate": "estimate"}


class LazyGroup(click.Group):
    """A click group whose subcommands are imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command of that name, or return None if there is no such command.

        Raises:
            UserError: The command has been renamed.
        """
        if cmd_name in RENAMED_COMMANDS:
            new_name = RENAMED_COMMANDS[cmd_name]
            raise UserError(f"command {cmd_name}: has been renamed; use sas-megatron {new_name}")
        if cmd_name not in COMMANDS:
            return None
        module_name, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module_name), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sas-megatron")
def cli() -> None:
    """Train and compare attention variants (SAS, MHA, GQA, MQA, MLA, MFA, TPA) on Megatron-core."""


def main() -> None:
    """Run the command line; after a user error print its message without traceback and exit with status 2."""
    _escape_unencodable_output()
    try:
        cli.main(standalone_mode=True)
    except UserError as error:
        # Under a launcher only rank 0 prints the message. If other ranks may have raised another error, the
        # first process of each node prints its own as well.
        if _is_launched_rank_above_0():
            if os.environ["LOCAL_RANK"] != "0" or error.raised_on_all_ranks:
                sys.exit(2)
            # A launcher that ends all processes when one ends (srun --kill-on-bad-exit) then shows it once.
            time.sleep(SECONDS_AFTER_RANK0)
        print(f"sas-megatron: error: {error}", file=sys.stderr, flush=True)
        command = suggest_command(error)
        if command is not None:
            print(f"sas-megatron: try: {command}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        _remove_empty_log_folder()


def _remove_empty_log_folder() -> None:
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from sas_megatron.platform.launcher import remove_empty_log_folder

        remove_empty_log_folder()


def _escape_unencodable_output() -> None:
    r"""Print characters that the output cannot encode as escapes such as \u2026, instead of failing.

    Its encoding is that of the locale or PYTHONIOENCODING, which may be ASCII. Even UTF-8 has no encoding for
    the bytes of a file name that is not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_launched_rank_above_0() -> bool:
    """Whether a launcher started this process, as a rank other than 0, for a command that all ranks run.

    RANK alone does not show it: some cluster operators set RANK in every pod. torchrun and deepspeed set
    LOCAL_RANK as well.
    """
    from sas_megatron.platform.launcher import is_rank0

    command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    return command in COLLECTIVE_COMMANDS and "LOCAL_RANK" in os.environ and not is_rank0()
