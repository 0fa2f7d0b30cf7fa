"""The `sas-megatron` command: finds the subcommand's file, runs it, turns errors into exit statuses.

Subcommands are imported only when they run, so that `--help` stays fast.
"""

from __future__ import annotations

import importlib
import os
import sys
import time

import click

from sas_megatron import __version__
from sas_megatron.config.errors import UserError

# How long other nodes' first processes let rank 0 speak alone.
SECONDS_FOR_THE_FIRST = 3.0

# name -> (module:attribute, one line of help); the help stands here so that listing imports nothing.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": (
        "sas_megatron.cli.quickstart:quickstart",
        "Train MHA and SAS side by side on real text and compare them.",
    ),
    "tokenizer": ("sas_megatron.cli.tokenizer:tokenizer", "Train a sentencepiece tokenizer."),
    "data": ("sas_megatron.cli.data:data", "Turn documents into token files, and look into them."),
    "train": ("sas_megatron.cli.train:train", "Train one model from a config."),
    "evaluate": (
        "sas_megatron.cli.evaluate:evaluate",
        "Measure a trained model: held-out loss, and tasks of lm-evaluation-harness.",
    ),
    "generate": ("sas_megatron.cli.generate:generate", "Let a trained model go on from prompts."),
    "checkpoint": (
        "sas_megatron.cli.checkpoint:checkpoint",
        "Check saved checkpoints; take models to transformers, and from it.",
    ),
    "costs": ("sas_megatron.cli.costs:costs", "Count parameters and FLOPs of configs."),
    "match": (
        "sas_megatron.cli.match:match",
        "Solve attention variants' dimensions until they cost what a base costs.",
    ),
    "study": ("sas_megatron.cli.study:study", "Plan, run and compare many runs that one file describes."),
    "estimate": (
        "sas_megatron.cli.estimate:estimate",
        "Estimate memory, communication and step time of a run on any number of ranks.",
    ),
    "fit": ("sas_megatron.cli.fit:fit", "Fit a scaling law to a table of runs."),
    "doctor": (
        "sas_megatron.cli.doctor:doctor",
        "Look for what would make training fail, on a node or an allocation.",
    ),
    "bench": ("sas_megatron.cli.bench:bench", "Measure speed and memory on this machine."),
}

# old name -> present name
RENAMED_COMMANDS = {"simulate": "estimate"}


class LazyGroup(click.Group):
    """A click group whose subcommands are imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, its file imported now; None: there is no such command.

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
        """Writes the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sas-megatron")
def cli() -> None:
    """Train and compare attention variants (SAS, MHA, GQA, MQA, MLA, MFA, TPA) on Megatron-core."""


def main() -> None:
    """Runs the command line; exit status 2 for what the user can mend, with its message and no traceback."""
    try:
        cli.main(standalone_mode=True)
    except UserError as error:
        # Under a launcher rank 0 speaks for all, and where others may have met something else, the first
        # process of each node for those of its node.
        if os.environ.get("RANK", "0") != "0":
            if os.environ.get("LOCAL_RANK") != "0" or error.raised_on_all_ranks:
                sys.exit(2)
            # Launchers that end all when one ends (srun --kill-on-bad-exit) then show it once.
            time.sleep(SECONDS_FOR_THE_FIRST)
        print(f"sas-megatron: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
