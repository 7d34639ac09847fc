"""The options table and the object that the engine gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torpor import options as table
from torpor.cli.grammar import criu_grammar, scan
from torpor.cli.values import KINDS, apply
from torpor.errors import UsageError
from torpor.images import schema as pb
from torpor.options import ATTRIBUTES, GROUPS, TABLE, Options


def options_of(*words: str) -> Options:
    options = Options()
    for entry, text in scan(list(words), criu_grammar(), []):
        apply(options, entry.row, text, entry.negated)
    return options


def test_every_attribute_has_a_row_and_every_row_an_attribute() -> None:
    named = {row.attr for row in TABLE if row.attr}
    assert named <= ATTRIBUTES.keys()
    # exec_cmd comes from the words after the verb, progress and notify from a caller in Python.
    assert ATTRIBUTES.keys() - named == {"exec_cmd", "notify", "progress"}


def test_rows_are_told_apart() -> None:
    longs = [row.long for row in TABLE if row.long]
    shorts = [row.short for row in TABLE if row.short]
    assert len(longs) == len(set(longs))
    assert len(shorts) == len(set(shorts))
    assert all(row.kind in KINDS for row in TABLE)
    assert all(row.help and row.group for row in TABLE)
    assert {row.kind for row in TABLE} == set(KINDS)


def test_attribute_is_the_long_option_with_underscores() -> None:
    exceptions = {"tree": "pid", "verbosity": "log_level", "config": "config_file"}
    older = {"daemon", "veth-pair", "ext-mount-map"}
    for row in TABLE:
        if row.attr and row.long and row.long not in older:
            assert row.attr == exceptions.get(row.long, row.long.replace("-", "_"))


def test_switches_are_booleans_and_texts_are_texts() -> None:
    for row in TABLE:
        default = getattr(Options, row.attr, None)
        if row.kind in ("switch", "flag") and row.attr:
            assert isinstance(default, bool), row.long
        if row.kind in ("text", "choice"):
            assert isinstance(default, str), row.long
        if row.kind == "choice":
            assert default in row.arg.split("|")


def test_rpc_fields_exist() -> None:
    fields = {field.name for field in pb.criu_opts.DESCRIPTOR.fields}
    assert {row.rpc for row in TABLE if row.rpc} <= fields
    # What a table of the command line cannot name: descriptors of the caller, and the conversation.
    assert fields - {row.rpc for row in TABLE} == {
        "images_dir_fd", "work_dir_fd", "manage_cgroups", "unix_sk_ino", "notify_scripts",
        "pidfd_store_sk", "log_to_stderr",
    }  # fmt: skip


def test_defaults_are_the_rpc_defaults() -> None:
    fresh, rpc = Options(), pb.criu_opts()
    assert rpc.log_level == fresh.log_level
    assert rpc.ghost_limit == fresh.ghost_limit


def test_groups_cover_the_table_once() -> None:
    assert sum(len(rows) for _, rows in GROUPS) == len(TABLE)


def test_not_yet_names_real_things() -> None:
    from torpor.cli.criu import VERBS

    assert set(VERBS) >= table.VERBS_NOT_YET
    names = [name.split() for name in table.OPTIONS_NOT_YET]
    assert ATTRIBUTES.keys() >= {name[-1] for name in names}
    assert set(VERBS) >= {name[0] for name in names if len(name) == 2}


def test_frozen_options_do_not_change() -> None:
    options = Options(pid=3).freeze()
    with pytest.raises(AttributeError, match="frozen"):
        options.pid = 4
    assert options.pid == 3
    assert options.replace(pid=4).pid == 4


def test_a_misspelt_attribute_is_an_error() -> None:
    with pytest.raises(UsageError, match="did you mean `leave_running`"):
        Options(leave_runing=True)
    with pytest.raises(AttributeError):
        Options().leave_runing = True  # type: ignore[attr-defined]


def test_collections_are_not_shared() -> None:
    first, second = Options(external=["a[b]"]), Options()
    assert first.external == ("a[b]",)
    assert second.external == ()
    assert first != second
    assert repr(first) == "Options(external=('a[b]',))"


def test_external_resources_are_looked_up_newest_first() -> None:
    options = Options(external=["mnt[/a]:one", "net[5]", "mnt[/a]:two", "mnt[/ab]:three"])
    assert options.external_value("mnt[/a]") == "two"
    assert options.external_value("net[5]") == ""
    assert options.external_value("net[6]") is None
    assert options.externals("mnt") == [("/ab", "three"), ("/a", "two"), ("/a", "one")]
    assert options.externals("net") == [("5", "")]


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("-t 42", {"pid": 42}),
        ("-R", {"leave_running": True}),
        ("-R -s", {"leave_stopped": True}),
        ("-s -R", {"leave_running": True}),
        ("-d -S", {"restore_detached": True, "restore_sibling": True}),
        ("-d --no-restore-detached", {}),
        ("--daemon", {"restore_detached": True}),
        ("--no-ghost-fiemap", {"ghost_fiemap": False}),
        ("-v", {"log_level": 3}),
        ("-vvv", {"log_level": 5}),
        ("-v4", {"log_level": 4}),
        ("-v -v", {"log_level": 4}),
        ("-v0", {"log_level": 0}),
        ("-verbosity=0", {"log_level": 0}),
        ("--verbosity=4", {"log_level": 4}),
        ("-v4 -v", {"log_level": 5}),
        ("--ghost-limit 16M", {"ghost_limit": 16 << 20}),
        ("--ghost-limit 3k", {"ghost_limit": 3 << 10}),
        ("--ghost-limit 2G", {"ghost_limit": 2 << 30}),
        ("--ghost-limit 0", {"ghost_limit": 0}),
        ("--timeout 0", {"timeout": 0}),
        ("--manage-cgroups", {}),
        ("--manage-cgroups=full", {"manage_cgroups": "full"}),
        ("--network-lock none", {"network_lock": "skip"}),
        ("--network-lock nftables", {"network_lock": "nftables"}),
        ("--file-validation filesize", {"file_validation": "filesize"}),
        ("--pre-dump-mode read --pre-dump-mode splice", {}),
        ("--empty-ns net", {"empty_ns": ("net",)}),
        ("--enable-fs a,b --enable-fs all", {"enable_fs": ("a", "b", "all")}),
        ("--action-script a --action-script b", {"action_script": ("a", "b")}),
        (
            "--cgroup-root /x --cgroup-root cpu,cpuacct:/y",
            {"cgroup_root": (("", "/x"), ("cpu,cpuacct", "/y"))},
        ),
        ("--cpu-cap", {"cpu_cap": 15}),
        ("--cpu-cap=none", {"cpu_cap": 0}),
        ("--cpu-cap=cpu", {"cpu_cap": 15}),
        ("--cpu-cap=^fpu", {"cpu_cap": 12}),
        ("--cpu-cap=none,ins", {"cpu_cap": 12}),
        ("--cpu-cap=^none", {"cpu_cap": 15}),
        ("-x", {"ext_unix_sk": True}),
        ("-x5,6", {"ext_unix_sk": True, "external": ("unix[5]", "unix[6]")}),
        (
            "--external mnt[/a]:b --external tty[8801:18]",
            {"external": ("mnt[/a]:b", "tty[8801:18]")},
        ),
        ("--external mnt[]", {"ext_mount_auto": True}),
        (
            "--external mnt[]:ms",
            {
                "ext_mount_auto": True,
                "enable_external_sharing": True,
                "enable_external_masters": True,
            },
        ),
        ("--external mnt[]:s", {"ext_mount_auto": True, "enable_external_sharing": True}),
        ("-M auto", {"ext_mount_auto": True}),
        ("-M /a:b", {"external": ("mnt[/a]:b",)}),
        ("--veth-pair eth0=veth7", {"external": ("veth[eth0]:veth7",)}),
        ("--all", {"extra": True, "experimental": True}),
        ("--feature userns", {"feature": "userns"}),
        ("--port 27", {"port": 27}),
        ("--close 4095", {}),
    ],
)  # fmt: skip
def test_words_become_values(words: str, changed: dict[str, object]) -> None:
    assert options_of(*words.split()).changed() == changed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-t 0", "--tree: `0` is not a positive number"),
        ("-t -1", "--tree: `-1`"),
        ("-t 12abc", "--tree: `12abc` is not a number"),
        ("--port some-port", "--port: `some-port` is not a number"),
        ("--port 65536", "--port: `65536`"),
        ("--timeout soon", "--timeout: `soon`"),
        ("--timeout -3", "--timeout: `-3`"),
        ("--ghost-limit 1X", "--ghost-limit: `1X`"),
        ("--ghost-limit M", "--ghost-limit: `"),
        ("--ghost-limit -1K", "--ghost-limit: `-1K` is negative"),
        ("--status-fd one", "--status-fd: `one`"),
        ("--manage-cgroups=most", "--manage-cgroups: `most` is none of"),
        ("--network-lock ipfw", "--network-lock: `ipfw`"),
        ("--file-validation 1", "--file-validation: `1`"),
        ("--pre-dump-mode invalid", "--pre-dump-mode: `invalid`"),
        ("--empty-ns pid", "--empty-ns: `pid`"),
        ("--cpu-cap=fpu,gpu", "--cpu-cap: `gpu`"),
        ("-x0", "--ext-unix-sk: `0`"),
        ("--external foo", "--external: `foo`"),
        ("--external mnt[a", "--external: `mnt[a`"),
        ("--external mnt[a]b", "--external: `mnt[a]b`"),
        ("--external mnt[]:x", "--external: `mnt[]:x`"),
        ("-M nocolon", "--ext-mount-map: `nocolon`"),
        ("--veth-pair eth0", "--veth-pair: `eth0`"),
        ("--inherit-fd 5:x", "--inherit-fd: `5:x`"),
        ("--inherit-fd fd[x]:y", "--inherit-fd: `x` is not a number"),
        ("--inherit-fd fd[4095]:y", "--inherit-fd: descriptor 4095: Bad file descriptor"),
        ("-J pid:1", "--join-ns: `pid`"),
        ("-J invalidjoin-invalid", "--join-ns: `invalidjoin-invalid`"),
        ("-J net:/no/such/file", "--join-ns: `/no/such/file`"),
        ("-J net:1,2", "--join-ns: `2`"),
        ("--feature telepathy", "--feature: there is no feature `telepathy`"),
        ("--ms", "--ms: no longer exists"),
    ],
)
def test_bad_values_are_named(words: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        options_of(*words.split())
    assert message in str(caught.value)


def test_an_inherited_descriptor_has_to_be_open() -> None:
    reader, writer = os.pipe()
    try:
        options = options_of("--inherit-fd", f"fd[{reader}]:pipe[77]")
        assert options.inherit_fd == ((reader, "pipe[77]"),)
        assert options_of("--inherit-fd", f"debug[{writer}]:mark").inherit_fd == ()
        assert os.read(reader, 100) == b"mark"
    finally:
        os.close(reader)
        os.close(writer)


def test_a_namespace_is_joined_by_pid_or_file() -> None:
    assert options_of("-J", f"net:{os.getpid()}").join_ns == (("net", str(os.getpid()), ""),)
    words = ("-J", "user:/proc/self/ns/user,1000,1000")
    assert options_of(*words).join_ns == (("user", "/proc/self/ns/user", "1000,1000"),)


def test_close_closes() -> None:
    fd = os.open(os.devnull, os.O_RDONLY)
    options_of("--close", str(fd))
    with pytest.raises(OSError):
        os.fstat(fd)


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("dump", Options(), "no pid was given"),
        ("restore", Options(restore_sibling=True), "--restore-sibling only makes sense"),
        ("dump", Options(pid=1, mntns_compat_mode=True), "--mntns-compat-mode is for restore"),
        ("dump", Options(pid=1, inherit_fd=((0, "x"),)), "--inherit-fd is for restore"),
        ("page-server", Options(restore_detached=True, ps_socket=1), "--ps-socket"),
    ],
)
def test_options_that_do_not_go_together(verb: str, options: Options, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options.validate(verb)


@pytest.mark.parametrize("name", sorted(table.OPTIONS_NOT_YET - {"share_pages"}))
def test_what_is_not_there_yet_is_refused(name: str) -> None:
    verbs, attribute = (["dump", "restore"], name)
    if " " in name:
        verb, attribute = name.split()
        verbs = [verb]
    default = getattr(Options, attribute)
    asked = True if default is False else "x" if default == "" else (("net", "1", ""),)
    for verb in verbs:
        with pytest.raises(UsageError, match="not implemented yet"):
            Options(pid=1, **{attribute: asked}).validate(verb)
        Options(pid=1, **{attribute: default}).validate(verb)


def test_a_namespace_is_joined_or_left_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "OPTIONS_NOT_YET", frozenset())
    options = Options(join_ns=(("net", "1", ""),), empty_ns=("net",))
    with pytest.raises(UsageError, match="contradict"):
        options.validate("restore")


# Options that nothing but the command line reads, and why that is honest.
UNREAD = {
    "a permission for what is refused anyway": (
        "tcp_established tcp_close skip_in_flight ext_unix_sk allow_uprobes unprivileged "
        "weak_sysctls deprecated enable_external_sharing enable_external_masters ext_mount_auto "
        "orphan_pts_master"
    ),
    "about namespaces, mounts or connections, which are refused": (
        "root skip_mnt enable_fs mntns_compat_mode network_lock"
    ),
    "advice on how, which changes no result": (
        "ghost_fiemap pre_dump_mode force_irmap irmap_scan_path"
    ),
    "of a verb or an option that is refused": (
        "address port ps_socket status_fd tls_cacert tls_cacrl tls_cert tls_key tls_no_cn_verify"
    ),
    "of the command line alone": (
        "exec_cmd restore_detached log_level log_file log_pid display_stats config_file "
        "no_default_config explain json progress pid"
    ),
    "of check": "feature extra experimental",
    "not honest yet": "cpu_cap libdir",
}


def test_an_option_that_nobody_reads_is_refused() -> None:
    """Whoever adds an option, or stops reading one, has to say what becomes of who asks for it."""
    text = ""
    for path in Path(table.__file__).parent.rglob("*.py"):
        if path.parent.name != "cli" and path.name != "options.py":
            text += path.read_text()
    read = {name for name in ATTRIBUTES if f".{name}" in text}
    refused = {name.split()[-1] for name in table.OPTIONS_NOT_YET}
    unread = set(" ".join(UNREAD.values()).split())
    assert ATTRIBUTES.keys() - read - refused - unread == set()
    assert unread <= ATTRIBUTES.keys()


def test_options_that_do() -> None:
    Options(pid=1, leave_running=True).validate("dump")
    Options(restore_detached=True, restore_sibling=True, inherit_fd=((0, "x"),)).validate("restore")
    Options(stream=True, track_mem=True, auto_dedup=True).validate("check")
