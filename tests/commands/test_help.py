"""What --help prints: within the terminal, every flag, and the defaults that hold."""

import dataclasses
import pydoc
import re
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import tyro

import vmae_fast.commands
from vmae_fast import VideoMAEConfig, cli
from vmae_fast.commands._arguments import parse
from vmae_fast.commands._help import Flag, layout
from vmae_fast.train import PretrainConfig, load_config

COMMANDS = sorted(cli.COMMANDS)


@pytest.fixture
def help_of(capsys, monkeypatch):
    """Output of a command line that asks for help, in a terminal of some width."""

    def show(*args, columns=80, status=0):
        monkeypatch.setenv("COLUMNS", str(columns))
        try:
            came = cli.main(list(args))
        except SystemExit as exit_:
            came = exit_.code
        seen = capsys.readouterr()
        assert came == status, seen
        return seen.err if status else seen.out

    return show


def parser_of(command, monkeypatch):
    """What tyro's own parser takes for a command: option strings of all flags."""
    asked = []

    def remember(kind, *, default=None, config=(), **_):
        asked.append((kind, default, config))
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(tyro, "cli", remember)
        with pytest.raises(SystemExit):
            import_module(f"vmae_fast.commands.{command}").run([])
    ((kind, default, config),) = asked
    given = {} if default is None else {"default": default}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(kind, config=config, **given)
    return {name for action in parser._actions for name in action.option_strings}


def shown_defaults(text):
    """What stands in brackets, by flag."""
    rows = re.findall(r"^  (--[\w-]+)(.*(?:\n {5,}.*)*)", text, re.MULTILINE)
    joined = ((flag, " ".join(rest.split())) for flag, rest in rows)
    return {flag: m[1] for flag, rest in joined if (m := re.search(r"\[([^][]*)\]$", rest))}


def test_every_command_is_listed():
    folder = Path(vmae_fast.commands.__file__).parent
    files = {file.stem for file in folder.glob("[!_]*.py")}
    assert files == set(cli.COMMANDS)


@pytest.mark.parametrize("columns", [60, 80, 100])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_no_line_is_wider_than_the_terminal(command, columns, help_of):
    asked = [[command, "--help"], [command, "--help-all"]] if command else [["--help"]]
    if command in ("pretrain", "plan"):
        asked.append([command, "--help", "model"])
    for args in asked:
        text = help_of(*args, columns=columns)
        assert text.startswith("usage: vmae-fast")
        too_wide = [line for line in text.splitlines() if len(line) > columns]
        assert not too_wide, args


@pytest.mark.parametrize("command", COMMANDS)
def test_usual_flags_are_flags(command, help_of, monkeypatch):
    usual = []

    def remember(*_, **given):
        usual.extend(given.get("usual", ()))
        raise SystemExit

    module = import_module(f"vmae_fast.commands.{command}")
    with monkeypatch.context() as patched:
        patched.setattr(module, "parse", remember)
        with pytest.raises(SystemExit):
            module.run([])
    text = help_of(command, "--help-all")
    for name in usual:
        assert re.search(rf"^  (--)?\[?{name.replace('_', '-')}\b", text, re.M | re.I), name


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen(command, help_of):
    assert len(help_of(*filter(None, [command]), "--help").splitlines()) <= 42


def test_top_level_help(help_of):
    text = help_of("--help")
    on_one_line = re.sub(r"\n {10,}", " ", text)
    for command, what in cli.COMMANDS.items():
        assert re.search(rf"^  {command} +{re.escape(what)}$", on_one_line, re.MULTILINE)
    assert "to begin with\n  vmae-fast pretrain\n" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_all_flags_are_there_and_no_others(command, help_of, monkeypatch):
    text = help_of(command, "--help-all")
    # The row of a flag, not a mention of it in another's.
    shown = set(re.findall(r"^  (--[\w-]+)", text, re.MULTILINE))
    takes = parser_of(command, monkeypatch)
    one_of_each = {name for name in takes if not name.startswith("--no-")} - {"-h", "--help"}
    assert shown - {"--config"} == one_of_each
    assert ("--config" in shown) == (command in ("pretrain", "plan", "preview", "check"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_in_a_group_and_described(command, help_of):
    text = help_of(command, "--help-all")
    group = None
    for line in text.splitlines():
        if re.match(r"(arguments|options|model|data|loading|optim|run)(:|$)", line):
            group = line
        elif line == "":
            group = None
        elif line.startswith("  --"):
            assert group, line
    for name, rest in re.findall(r"^  (--[\w-]+)(.*(?:\n {5,}.*)*)", text, re.MULTILINE):
        assert re.search(r"[a-z]{2}", rest), name


@pytest.mark.parametrize("command", COMMANDS)
def test_no_words_of_python(command, help_of):
    text = help_of(command, "--help-all")
    # But where it may be typed.
    assert not re.search(r"\bNone\b(?! for any)|\{|MISSING|<class|default:", text)


def test_defaults_are_those_of_the_recipe(help_of):
    tiny = load_config("tiny")
    shown = shown_defaults(help_of("pretrain", "--help-all"))
    model = VideoMAEConfig.of("tiny")
    expected = {
        "--config": "tiny",
        "--model": "tiny",
        "--frames": model.frames,
        "--image-size": model.size[0],
        "--decoder-depth": model.decoder_depth,
        "--mask-kind": model.mask_kind,
        "--stride": tiny.data.stride,
        "--val": tiny.loading.val,
        "--batch-size": tiny.optim.batch_size,
        "--steps": tiny.optim.steps,
        "--lr": tiny.optim.lr,
        "--base-lr": "--lr instead",
        "--epochs": "--steps instead",
        "--cache": "on",
        "--resume": "off",
        "--workers": "by cores (0 where two compute, and with --cache)",
        "--precision": "auto",
    }
    assert {flag: shown.get(flag) for flag in expected} == {k: str(v) for k, v in expected.items()}


def test_every_flag_of_pretrain_says_its_default(help_of):
    shown = shown_defaults(help_of("pretrain", "--help-all"))
    fields = [
        f"--{field.name.replace('_', '-')}"
        for group in dataclasses.fields(PretrainConfig)
        if group.init
        for field in dataclasses.fields(group.default_factory)
    ]
    assert sorted(shown) == sorted([*fields, "--config"])


@pytest.mark.parametrize(
    ("args", "flag", "default"),
    [
        (["pretrain", "--config", "v2-base"], "--repeats", "4"),
        (["pretrain", "--config", "v2-base"], "--decoder-mask-ratio", "0.5"),
        (["pretrain", "--config", "v2-base"], "--steps", "by --epochs"),
        (["pretrain", "--config=v2-base"], "--config", "v2-base"),
        (["pretrain", "--model", "large"], "--decoder-depth", "12"),
        (["pretrain", "--init", "somewhere"], "--frames", "the checkpoint's"),
        (["plan", "--config", "tiny"], "--frames", "8"),
        (["plan"], "--frames", "16"),
        (["plan"], "--precision", "bf16"),
        (["reconstruct"], "--stride", "4"),
        (["convert"], "--dialect", "vmae-fast"),
    ],
)
def test_defaults_follow_what_else_is_given(args, flag, default, help_of):
    assert shown_defaults(help_of(*args, "--help-all"))[flag] == default


def test_the_short_help_of_pretrain(help_of):
    short, whole = help_of("pretrain", "--help"), help_of("pretrain", "--help-all")
    assert len(short.splitlines()) < len(whole.splitlines()) / 2
    for flag in ("--data", "--out", "--resume", "--micro-batch", "--config"):
        assert f"\n  {flag}" in short
    assert "--beta2" not in short
    assert "vmae-fast pretrain --help-all" in short
    # The bracket of a flag is the same in both.
    brief, full = shown_defaults(short), shown_defaults(whole)
    assert brief == {flag: full[flag] for flag in brief}


def test_one_group(help_of):
    text = help_of("pretrain", "--help", "optim")
    assert "--beta2" in text
    assert "--stride" not in text
    assert "optim: How it is trained" in text
    assert "there are options, model, data, loading, optim, run" in help_of(
        "pretrain", "--help", "optin", status=2
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_the_pager_takes_all_flags_on_a_terminal(terminal, help_of, monkeypatch):
    paged = []
    monkeypatch.setattr(pydoc, "pager", paged.append)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    text = help_of("pretrain", "--help-all")
    assert bool(paged) == terminal == ("--beta2" not in text)
    assert "usage" in help_of("pretrain", "--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_flag_is_status_2(command, help_of):
    needed = {
        "convert": ["a", "b"],
        "inspect": ["a"],
        "pack": ["a", "b"],
        "reconstruct": ["a", "b"],
    }.get(command, [])
    assert "--no-such-flag" in help_of(command, *needed, "--no-such-flag", status=2)


def test_commands_are_told_from_each_other(help_of):
    assert "did you mean 'pretrain'" in help_of("pretrian", status=2)
    assert "there are" in help_of("zzz", status=2)


@dataclasses.dataclass
class Odd:
    """Flags as rarely as they come."""

    name: str = ""
    """First sentence, of e.g.two words. Second. None: not this."""
    pair: tuple[int, int] | None = None
    """Two numbers. None: none of them."""
    many: list[str] = dataclasses.field(default_factory=list)
    """Any number."""
    rate: int | str | None = 3
    """A rate."""
    plain: float | None = None
    undocumented: bool = True


def test_odd_flags(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse(Odd, prog="odd", description="Odd.", args=["-h"])
    text = re.sub(r"\n {20,}", " ", capsys.readouterr().out)
    assert re.search(r"--name NAME +First sentence, of e.g.two words. Second. \[none\]", text)
    assert re.search(r"--pair N N +Two numbers. \[none of them\]", text)
    assert re.search(r"--many MANY ... +Any number. \[none\]", text)
    assert re.search(r"--rate N\|RATE +A rate. \[3\]", text)
    assert re.search(r"--plain X *\n", text)
    assert re.search(r"--undocumented, --no-undocumented +\[on\]", text)


def test_words_longer_than_the_terminal_are_broken():
    flag = Flag("options", "", "x", "--" + "x" * 90, "y" * 200, "z" * 90)
    text = layout("usage: x", "w" * 100, [flag], width=30, examples=("v" * 30 + " -a b",))
    assert max(map(len, text.splitlines())) <= 94
