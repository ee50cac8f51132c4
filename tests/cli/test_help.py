"""Help, names of options, completion, and messages about usage errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tools.pages.command_line import commands, options

from fidelora.cli import app
from fidelora.cli.options import DEVICE_PANEL, MODEL_PANEL, SAMPLING_PANEL

COMMANDS = dict(commands())


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_fits_into_80_columns(fidelora, name):
    code, out, err = fidelora(*name.split(), "-h")
    assert (code, err) == (0, "")
    assert "…" not in out, "a name was cut off"
    assert max(map(len, out.splitlines())) <= 80
    for option in options(COMMANDS[name]):
        assert option in out
    assert fidelora(*name.split(), "--help")[1] == out


def test_the_options_of_generate_are_in_groups(fidelora):
    _, out, _ = fidelora("generate", "-h")
    titles = ("Options", SAMPLING_PANEL, MODEL_PANEL, DEVICE_PANEL)
    positions = [out.index(f"─ {title} ─") for title in titles]
    assert positions == sorted(positions)
    assert "[trigger] is replaced" in out, "[trigger] was read as markup"


def test_former_and_usual_names_of_options_exist():
    expected = {
        "generate": {
            "-o", "--output", "--out", "--negative", "--negative-prompt", "--guidance",
            "--cfg-scale", "--size", "-n", "--number", "-q", "--json", "--dry-run",
        },
        "grid": {"-o", "--output", "--out"},
        "replay": {"-o", "--output", "--out"},
        "demo": {"-o", "--output", "--out"},
    }  # fmt: skip
    for name, names in expected.items():
        assert names <= options(COMMANDS[name]), name


def test_base_model_has_the_same_short_form_in_all_commands():
    named = {name for name, one in COMMANDS.items() if "--base-model" in options(one)}
    assert {"generate", "serve", "verify"} <= named
    assert named == {name for name, one in COMMANDS.items() if "--base" in options(one)}


def test_the_version_has_a_short_option(fidelora):
    code, out, _ = fidelora("-V")
    assert (code, out) == (0, fidelora("--version")[1])
    assert out.startswith("fidelora ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["genrate"], "No such command 'genrate'. Did you mean 'generate'?"),
        (["generate", "a", "--guidence", "1"], "No such option: --guidence"),
        (["generate", "a", "--seed", "x"], "Invalid value for '--seed': Expected an integer."),
        (["generate", "a", "b"], "Got unexpected extra argument(s) (b)"),
        (["generate", "a", "--lora"], "Option '--lora' requires an argument"),
        (["generate"], "No prompt was given; give PROMPT"),
        (["generate", "a", "--prompts", "p"], "PROMPT and --prompts are both set"),
        (["generate", "a", "--size", "big"], "--size is 'big'"),
        (["generate", "a", "-o", "{x}.png"], "unknown field {x}"),
        (["generate", "a", "--fidelity", "slow"], "'--fidelity': 'slow' is not one of 'exact'"),
        (["serve", "--idle", "-1"], "'--idle': Expected a number of at least 0."),
        (["verify"], "Missing argument 'JOB_DIR'"),
        (["convert", "a", "b"], "Missing option '--to'. Choose from: kohya, peft, diffusers."),
        (["explain", "a.png"], "Give JOB_DIR and PICTURE, or JOB_DIR and --write PROGRAM"),
        (["keys", "foo"], "No such command 'foo'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_use_of_the_command_line_is_one_sentence(fidelora, tmp_path, arguments, sentence):
    code, out, err = fidelora(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert sentence in err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_of_any_command_exits_with_130(fidelora, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fidelora.cli.models.all_families", interrupt)
    assert fidelora("models") == (130, "", "error: Interrupted.\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fidelora gen", "generate"),
        ("fidelora generate x --samp", "--sampler"),
        ("fidelora generate x --sampler k_eu", "k_euler"),
        ("fidelora generate x --model sdx", "sdxl"),
        ("fidelora download zi", "zimage"),
    ],
)
def test_commands_options_and_values_are_completed(words, expected):
    environment = os.environ | {
        "_FIDELORA_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    code = "import sys; sys.argv = ['fidelora']; from fidelora.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert expected in done.stdout.split(), done.stderr


def test_every_command_has_a_group():
    assert all(command.rich_help_panel for command in app.registered_commands)
    assert all(group.rich_help_panel for group in app.registered_groups)
