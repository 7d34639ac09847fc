"""The grammar of the command line against two references: the C library's and Python's own."""

from __future__ import annotations

import ctypes
import getopt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torpor.cli.grammar import NONE, OPTIONAL, REQUIRED, Grammar, criu_grammar, scan
from torpor.errors import UsageError
from torpor.options import Option

GRAMMAR = criu_grammar()
Said = list[tuple[str, str | None]]


def ours(words: list[str], grammar: Grammar = GRAMMAR) -> tuple[Said, list[str], bool]:
    """Options in order, other words, and whether it went wrong."""
    said: Said = []
    others: list[str] = []
    try:
        for entry, text in scan(words, grammar, others):
            said.append((entry.name, text))
    except UsageError:
        return said, others, True
    return said, others, False


class LongOption(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("has_arg", ctypes.c_int),
        ("flag", ctypes.POINTER(ctypes.c_int)),
        ("val", ctypes.c_int),
    ]


LIBC = ctypes.CDLL(None)


def c_library(words: list[str], grammar: Grammar = GRAMMAR) -> tuple[Said, list[str], bool]:
    """What glibc's getopt_long makes of the same words, with the same options declared to it."""
    entries = list(grammar.long.values())
    flags: dict[str, ctypes.Array[ctypes.c_int]] = {}
    table = (LongOption * (len(entries) + 1))()
    for index, entry in enumerate(entries):
        table[index].name = entry.name.encode()
        table[index].has_arg = entry.takes
        table[index].val = 1000 + index
        if entry.row.kind == "switch":
            flag = flags.setdefault(entry.row.attr, (ctypes.c_int * 1)())
            table[index].flag = ctypes.cast(flag, ctypes.POINTER(ctypes.c_int))
            table[index].val = int(not entry.negated)
    short = "".join(letter + ":" * entry.takes for letter, entry in grammar.short.items())
    argv = (ctypes.c_char_p * (len(words) + 2))(b"criu", *(w.encode() for w in words), None)
    optarg = ctypes.c_char_p.in_dll(LIBC, "optarg")
    optind = ctypes.c_int.in_dll(LIBC, "optind")
    ctypes.c_int.in_dll(LIBC, "opterr").value = 0
    optind.value = 0
    said: Said = []
    while True:
        index_of = ctypes.c_int(-1)
        code = LIBC.getopt_long(
            len(words) + 1, argv, short.encode(), table, ctypes.byref(index_of)
        )
        if code == -1:
            rest = argv[optind.value : len(words) + 1]
            return said, [word.decode() for word in rest if word is not None], False
        if code == ord("?"):
            return said, [], True
        entry = grammar.short[chr(code)] if index_of.value < 0 else entries[index_of.value]
        said.append((entry.name, None if optarg.value is None else optarg.value.decode()))


def beginnings(name: str) -> st.SearchStrategy[str]:
    return st.integers(1, len(name)).map(lambda end: name[:end])


LONG = st.sampled_from(sorted(GRAMMAR.long))
PLAIN = st.sampled_from(["dump", "restore", "-", "--", "", "7", "a=b", "criu"])
LETTERS = st.text(st.sampled_from([*GRAMMAR.short, "v", "4", "=", "q"]), min_size=1, max_size=4)
WORDS = st.lists(
    st.one_of(
        PLAIN,
        LONG.map("--{}".format),
        LONG.flatmap(beginnings).map("--{}".format),
        st.tuples(LONG.flatmap(beginnings), st.sampled_from(["", "x", "a=b"])).map(
            "--{0[0]}={0[1]}".format
        ),
        LETTERS.map("-{}".format),
    ),
    max_size=6,
)


@settings(max_examples=600)
@given(WORDS)
def test_agrees_with_the_c_library(words: list[str]) -> None:
    mine, reference = ours(words), c_library(words)
    assert mine[0] == reference[0]
    assert mine[2] == reference[2]
    if not mine[2]:
        assert mine[1] == reference[1]


NAMES = ["all", "alert", "be", "bell", "bell-tower", "c"]
TAKES = st.sampled_from(["", "X"])


@st.composite
def small_grammars(draw: st.DrawFn) -> tuple[Grammar, str, list[str]]:
    """A grammar, and the same one as Python's getopt wants it."""
    rows = []
    short, long = "", []
    for letter, name in zip("abcdef", NAMES, strict=True):
        takes = draw(TAKES)
        rows.append(Option(name, letter, takes, name, "text" if takes else "flag", "", "*", ""))
        short += letter + (":" if takes else "")
        long.append(name + ("=" if takes else ""))
    return Grammar(rows), short, long


@settings(max_examples=300)
@given(
    small_grammars(),
    st.lists(
        st.text(st.sampled_from([*"abcdelrt-="]), max_size=8) | st.sampled_from(["--", "--be"])
    ),
)
def test_agrees_with_pythons_getopt(made: tuple[Grammar, str, list[str]], words: list[str]) -> None:
    grammar, short, long = made
    said, others, wrong = ours(words, grammar)
    try:
        reference, rest = getopt.gnu_getopt(words, short, long)
    except getopt.GetoptError:
        assert wrong
        return
    assert not wrong
    assert others == rest
    names = {f"-{letter}": entry.name for letter, entry in grammar.short.items()}
    expected = [(names.get(name, name[2:]), text) for name, text in reference]
    assert [(name, text or "") for name, text in said] == expected


@pytest.mark.parametrize(
    ("words", "said", "others"),
    [
        (["dump", "-t", "42"], [("tree", "42")], ["dump"]),
        (["-t42", "dump"], [("tree", "42")], ["dump"]),
        (["dump", "--tree=42"], [("tree", "42")], ["dump"]),
        (["dump", "--tree", "42", "-vvv"], [("tree", "42"), ("verbosity", "vv")], ["dump"]),
        (["check", "-verbosity=0"], [("verbosity", "erbosity=0")], ["check"]),
        (["-v", "4"], [("verbosity", None)], ["4"]),
        (["-v4"], [("verbosity", "4")], []),
        (["--verbosity", "4"], [("verbosity", None)], ["4"]),
        (["-dj"], [("restore-detached", None), ("shell-job", None)], []),
        (["-djo", "f"], [("restore-detached", None), ("shell-job", None), ("log-file", "f")], []),
        (["--restore-detach"], [("restore-detached", None)], []),
        (["--no-restore-s"], [("no-restore-sibling", None)], []),
        (["--tls"], [("tls", None)], []),
        (["--cpu-cap"], [("cpu-cap", None)], []),
        (["--cpu-cap="], [("cpu-cap", "")], []),
        (["--conf", "f"], [("config", "f")], []),
        (["restore", "--exec-cmd", "--", "a", "-b"], [("exec-cmd", None)], ["restore", "a", "-b"]),
        (["-D", "--", "dump"], [("images-dir", "--")], ["dump"]),
        (["-x", "1"], [("ext-unix-sk", None)], ["1"]),
        (["-x1,2"], [("ext-unix-sk", "1,2")], []),
        (["--cgroup-root", "cpu:/a"], [("cgroup-root", "cpu:/a")], []),
    ],
)  # fmt: skip
def test_words_mean(words: list[str], said: Said, others: list[str]) -> None:
    assert ours(words) == (said, others, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nonsense"], "there is no option --nonsense"),
        (["--leave-runing"], "did you mean `leave-running`?"),
        (["--leave"], "--leave may mean any of --leave-running, --leave-stopped"),
        (["-q"], "there is no option -q"),
        (["-t"], "-t needs an argument: PID"),
        (["--tree"], "--tree needs an argument: PID"),
        (["--shell-job=yes"], "--shell-job takes no argument"),
        (["--no-tree", "4"], "there is no option --no-tree"),
        (["--explain"], "there is no option --explain"),
    ],
)
def test_nonsense_is_named(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        list(scan(words, GRAMMAR, []))
    assert message in str(caught.value)


def test_what_comes_before_the_nonsense_is_seen() -> None:
    assert ours(["-V", "--nonsense"])[0] == [("version", None)]


def test_posix_order_ends_at_the_first_word() -> None:
    others: list[str] = []
    said = list(scan(["-d", "dump", "-j"], GRAMMAR, others, permute=False))
    assert [entry.name for entry, _ in said] == ["restore-detached"]
    assert others == ["dump", "-j"]


def test_table_is_the_one_of_criu() -> None:
    """Counted in criu/config.c of 4.2: 27 options can be negated; its letters. Three more are ours."""
    ours = {"share-pages", "no-share-pages", "precopy", "no-precopy", "guest", "no-guest"}
    assert sum(entry.negated for name, entry in GRAMMAR.long.items() if name not in ours) == 27
    # Options of getopt's short string: a letter and a colon for each of "takes one", "if attached".
    letters = {letter + ":" * entry.takes for letter, entry in GRAMMAR.short.items()}
    assert letters == set("d S s R t: h D: o: v:: x:: V r: j J: l W: L: M:".split())


def test_takes_is_read_off_the_table() -> None:
    assert GRAMMAR.long["shell-job"].takes == NONE
    assert GRAMMAR.long["cgroup-root"].takes == REQUIRED
    assert GRAMMAR.long["manage-cgroups"].takes == OPTIONAL
