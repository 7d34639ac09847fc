"""Configuration files: how a line is read, in which order the files are, what is refused."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.cli import config
from torpor.cli.config import read, read_defaults, read_line
from torpor.cli.grammar import criu_grammar
from torpor.errors import UsageError
from torpor.options import Options

GRAMMAR = criu_grammar()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", None),
        ("\n", None),
        ("# comment\n", None),
        ("   # comment\n", None),
        ("#\n", None),
        ("tcp-close", ("tcp-close", None)),
        ("tcp-close \n", ("tcp-close", None)),
        ("tcp-close #comment\n", ("tcp-close", None)),
        (" tcp-close #comment\n", ("tcp-close", None)),
        ("\ttcp-close\t#comment\n", ("tcp-close", None)),
        ("tcp-close\r\n", ("tcp-close", None)),
        ('test "test"\n', ("test", "test")),
        ('dsfa "aaaaa \\"bbbbbb\\""\n', ("dsfa", 'aaaaa "bbbbbb"')),
        ("verbosity 4\n", ("verbosity", "4")),
        ("verbosity 4#comment\n", ("verbosity", "4")),
        ("verbosity 4 #comment\n", ("verbosity", "4")),
        ("verbosity 4  # com ment\n", ("verbosity", "4")),
        ("verbosity\t4\t#comment\n", ("verbosity", "4")),
        ('lsm-profile "" # more comments\n', ("lsm-profile", "")),
        ('lsm-profile "something"# comment\n', ("lsm-profile", "something")),
        ('lsm-profile "something"#comment\n', ("lsm-profile", "something")),
        ('lsm-profile "selinux:a\\"with\\"quotes"\n', ("lsm-profile", 'selinux:a"with"quotes')),
        ('work-dir "/tmp with spaces"\n', ("work-dir", "/tmp with spaces")),
        ('work-dir "/tmp with spaces"   # comment\n', ("work-dir", "/tmp with spaces")),
        ('work-dir "/tmp/number#1"\n', ("work-dir", "/tmp/number#1")),
        ('work-dir "/back\\slash"\n', ("work-dir", "/back\\slash")),
        ("external mnt[/a]:b\n", ("external", "mnt[/a]:b")),
    ],
)
def test_a_line_says(line: str, said: tuple[str, str | None] | None) -> None:
    assert read_line(line) == said


@pytest.mark.parametrize(
    "line",
    [
        'verbosity "',
        'verbosity "4',
        'verbosity "4\\"',
        "verbosity 4 no-comment",
        'work-dir "/tmp with spaces" no-comment',
        'work-dir "/tmp"more',
        "a b c d e f g h i",
    ],
)
def test_a_line_that_makes_no_sense(line: str) -> None:
    with pytest.raises(UsageError):
        read_line(line)


VALUE = st.text(st.characters(exclude_characters="\\\n\r", exclude_categories=["Cs"]), max_size=30)


@given(VALUE, st.sampled_from(["", " ", "  # a comment", "#x"]))
def test_a_quoted_value_is_read_back(value: str, tail: str) -> None:
    quoted = value.replace('"', '\\"')
    assert read_line(f'work-dir "{quoted}"{tail}') == ("work-dir", value)


def read_text(text: str, options: Options | None = None) -> tuple[Options, list[str]]:
    options = options or Options()
    notes: list[str] = []
    read(text, GRAMMAR, options, notes)
    return options, notes


def test_a_file_sets_options() -> None:
    text = """\
# of a container
tcp-established
work-dir "/home/me/my \\"work\\" directory"
no-restore-sibling   # this is another comment
verbosity 4
manage-cgroups full
ghost-limit=16M
external mnt[/a]:b
external mnt[/c]:d
file-lock
"""
    options, notes = read_text(text, Options(restore_sibling=True))
    assert not notes
    assert options.changed() == {
        "work_dir": '/home/me/my "work" directory',
        "file_locks": True,
        "ghost_limit": 16 << 20,
        "tcp_established": True,
        "external": ("mnt[/a]:b", "mnt[/c]:d"),
        "manage_cgroups": "full",
        "log_level": 4,
    }


def test_a_word_too_many_for_a_switch_is_noted() -> None:
    options, notes = read_text("tcp-close true\n")
    assert options.tcp_close
    assert notes == ["config: `tcp-close` takes no argument, `true` is ignored"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\nnonsense 4\n", "line 3: there is no option --nonsense"),
        ("tree\n", "line 1: `tree` needs an argument"),
        ("port many\n", "line 1: --port: `many`"),
        ("help\n", "line 1: `help` has no place"),
        ("version\n", "line 1: `version` has no place"),
        ("exec-cmd\n", "line 1: `exec-cmd` has no place"),
        ("dump\n", "line 1: there is no option --dump"),
        ("lea\n", "line 1: --lea may mean any of"),
        ("explain\n", "line 1: there is no option"),
    ],
)
def test_a_file_that_makes_no_sense(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_text(text)
    assert message in str(caught.value)


@pytest.fixture
def files(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Four files that each say who they are, in the places where they are looked for."""
    home = os.path.join(tmp_path, "home")
    os.makedirs(os.path.join(home, ".criu"))
    places = {
        "global": os.path.join(tmp_path, "global.conf"),
        "user": os.path.join(home, ".criu", "default.conf"),
        "env": os.path.join(tmp_path, "env.conf"),
        "named": os.path.join(tmp_path, "named.conf"),
    }
    for name, path in places.items():
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"log-file {name}\nskip-mnt /{name}\nverbosity\n")
    monkeypatch.setattr(config, "GLOBAL_FILE", places["global"])
    monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("CRIU_CONFIG_FILE", raising=False)
    return str(tmp_path)


def defaults(**how: object) -> Options:
    options = Options()
    assert read_defaults(options, GRAMMAR, **how) == []  # type: ignore[arg-type]
    return options


def test_files_are_read_in_order(files: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRIU_CONFIG_FILE", f"{files}/env.conf")
    options = defaults()
    assert options.skip_mnt == ("/global", "/user", "/env")
    assert options.log_file == "env"
    assert options.log_level == 5
    options = defaults(config_file=f"{files}/named.conf")
    assert options.skip_mnt == ("/env", "/named")
    assert options.log_file == "named"
    assert defaults(no_default_config=True).skip_mnt == ("/env",)


def test_without_home_there_is_no_users_file(files: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    assert defaults().skip_mnt == ("/global",)


def test_a_file_that_is_not_there_is_passed_over(files: str) -> None:
    options = Options()
    notes = read_defaults(options, GRAMMAR, config_file="/no/such/file")
    assert options == Options()
    assert notes == ["config: `/no/such/file` cannot be read, going on without it"]


def test_an_error_names_the_file(files: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{files}/env.conf"
    with open(path, "a", encoding="utf-8") as file:
        file.write("nonsense\n")
    monkeypatch.setenv("CRIU_CONFIG_FILE", path)
    with pytest.raises(UsageError, match=f"{path}: line 4: there is no option"):
        read_defaults(Options(), GRAMMAR)
