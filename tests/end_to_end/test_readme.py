"""The commands, options, config fields and files that the README names exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from sas_megatron.cli.main import cli
from sas_megatron.config.loading import known_keys

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.strip()
] + re.findall(r"`(sas-megatron bench [^`]*)`", README)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_is_valid(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "sas-megatron":
        check_options(words[1:])
    elif words[0] != "source":
        assert (ROOT / words[0]).is_file(), words[0]
        for word in words[1:]:
            if word.startswith("configs/"):
                assert (ROOT / word).is_file(), word
            elif "=" in word:
                assert word.split("=")[0] in known_keys({"attention": {"kind": "sas"}})


def check_options(words: list[str]) -> None:
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        subcommand = command.get_command(context, words.pop(0))
        assert subcommand is not None
        command = subcommand
    options = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


def test_the_files_that_the_readme_links_exist() -> None:
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert linked
    for path in linked:
        assert (ROOT / path).is_file(), path


def test_the_two_commands_come_first() -> None:
    assert COMMANDS[:2] == ["launch/quickstart.sh", "tests/run.sh"]
