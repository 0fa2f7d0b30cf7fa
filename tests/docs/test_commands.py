"""Every command in the documentation is valid: its program, options, files and config fields exist."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import click
import pytest

from sas_megatron.cli.main import cli
from sas_megatron.config.attention_kinds import KINDS
from sas_megatron.config.hints import known_keys
from sas_megatron.config.run import RunConfig
from tests.docs.pages import PAGES, ROOT, Command, commands_of, inline_code

COMMANDS = [command for page in PAGES for command in commands_of(page)]
FIELDS = {key for kind in KINDS for key in known_keys({"attention": {"kind": kind}})}
# Programs whose arguments are not checked here.
OTHER_PROGRAMS = {"export", "git", "kubectl", "source", "time", "scancel", "apptainer", "enroot"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.text}"[:100])
def test_a_command_is_valid(command: Command) -> None:
    check_words(command.words, complete=command.complete)


def test_the_readme_begins_with_its_two_commands() -> None:
    readme = [command.words for command in COMMANDS if command.page == "README.md" and command.complete]
    assert readme == [["launch/quickstart.sh"], ["tests/run.sh"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_config_fields_in_running_text_exist(page: Path) -> None:
    named = re.compile(rf"(?:{'|'.join(RunConfig.model_fields)})\.[a-z]\w*")
    fields = {match.group() for code in inline_code(page) if (match := named.match(code))}
    assert not {field for field in fields if field not in FIELDS and not field.endswith(".yaml")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_running_text_exist(page: Path) -> None:
    path = re.compile(r"(?:sas_megatron|tests|docs|configs|launch|docker)/[\w./*-]+")
    named = [code for code in inline_code(page) if path.fullmatch(code)]
    assert not [name for name in named if not list(ROOT.glob(name.rstrip("/")))]


@pytest.mark.parametrize(
    "text",
    [
        "sas-megatron costs configs/125m/mha.yaml --no-such-option",
        "sas-megatron no-such-command",
        "sas-megatron costs configs/125m/absent.yaml",
        "sas-megatron costs configs/125m/mha.yaml data.no_such_field=1",
        "sas-megatron tokenizer train corpus/",
        "launch/absent.sh configs/125m/mha.yaml",
        "launch/torchrun.sh 8 configs/125m/mha.yaml training.no_such_field=1",
        "torchrun --standalone -m sas_megatron evaluate runs/x --no-such-option",
        "python -m tests.absent",
        "pip install -e '.[absent]'",
        "absent-program",
    ],
)
def test_an_invalid_command_is_detected(text: str) -> None:
    with pytest.raises((AssertionError, click.ClickException)):
        check_words(Command("", text, complete=True).words, complete=True)


def check_words(words: list[str], *, complete: bool) -> None:
    """Check a command without running it.

    Args:
        words: The program and its arguments.
        complete: Whether all required arguments must be present.

    Raises:
        AssertionError: A program, file, module or config field does not exist.
        click.ClickException: `sas-megatron` does not accept the arguments.
    """
    program, *arguments = words
    if program == "sas-megatron":
        check_click(arguments, complete=complete)
    elif program in ("torchrun", "srun"):
        start = "sas_megatron" if program == "torchrun" else "sas-megatron"
        assert start in arguments, f"{program} does not start {start}"
        check_click(arguments[arguments.index(start) + 1 :], complete=complete)
    elif program == "sbatch":
        positions = [index for index, word in enumerate(arguments) if word.startswith("launch/")]
        assert positions or not complete, "sbatch does not submit a script of launch/"
        for position in positions[:1]:
            check_words(arguments[position:], complete=complete)
    elif program == "python":
        assert arguments[0] == "-m", "only modules are started"
        assert importlib.util.find_spec(arguments[1]), f"no module is named {arguments[1]}"
        assert all((ROOT / word).exists() for word in arguments[2:] if word.startswith("tests/"))
    elif program == "pip":
        check_pip(arguments)
    elif program == "docker":
        files = [arguments[index + 1] for index, word in enumerate(arguments) if word == "-f"]
        assert all((ROOT / name).is_file() for name in files), files
    elif "/" in program:
        check_script(program)
        check_config_words(arguments)
    else:
        assert program in OTHER_PROGRAMS, f"{program} is not a known program"


def check_click(arguments: list[str], *, complete: bool) -> None:
    """Parse the arguments of `sas-megatron` with its real parser, without running the command."""
    command, context, rest = cli, click.Context(cli), list(arguments)
    while isinstance(command, click.Group) and rest:
        name = rest.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"sas-megatron has no command {name}"
        command = found  # type: ignore[assignment]
    if isinstance(command, click.Group):
        return
    try:
        command.make_context(command.name, list(rest))
    except click.MissingParameter:
        assert not complete, f"sas-megatron {' '.join(arguments)}: a required argument is missing"
    except click.exceptions.Exit:
        pass  # --help and --version
    check_config_words(rest)


def check_config_words(words: list[str]) -> None:
    """Check that configs exist and that overrides name fields of a config."""
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), f"{word} does not exist"
        elif re.match(r"[a-z]\w*\.[a-z]\w*=", word):
            assert word.partition("=")[0] in FIELDS, f"{word} does not name a field"


def check_script(name: str) -> None:
    """Check that a script of the checkout exists and is valid bash."""
    assert (ROOT / name).is_file(), f"{name} does not exist"
    checked = subprocess.run(["bash", "-n", str(ROOT / name)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr


def check_pip(arguments: list[str]) -> None:
    """Check that the folders and extras of a `pip install` exist."""
    assert arguments[0] == "install", "only installations are documented"
    for word in arguments[1:]:
        if extra := re.fullmatch(r"\.\[(\w+)\]", word):
            assert f'"{extra[1]}":' in (ROOT / "setup.py").read_text(encoding="utf-8"), f"no extra {extra[1]}"
        elif "/" in word:
            assert (ROOT / word).exists(), f"{word} does not exist"
