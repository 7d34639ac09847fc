"""Every option there is, in one table.

Two things live here. :class:`Options` is what the engine receives: one attribute for each thing
that can be asked for, with its type and its default. :data:`TABLE` says how each is spelled: the
long and short option of the command line and of configuration files (the grammar of ``criu`` 4.2),
the field of CRIU's RPC, the verbs that look at it, and one line of help. The command line, the RPC,
the library and the manual pages are all made from these two.

Names follow one rule: the attribute is the long option with underscores. The exceptions are ``pid``
(``--tree``), ``log_level`` (``--verbosity``), ``config_file`` (``--config``), ``restore_detached``
(also ``--daemon``), ``external`` (also ``--veth-pair``, ``--ext-mount-map`` and the inodes of
``--ext-unix-sk``) and ``ext_mount_auto`` (``--external mnt[]``).
"""

from __future__ import annotations

from .errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

# What the grammar accepts and the engine does not do yet. Asking for one of these is an error that
# says so; nothing that changes the result is ignored in silence. An option may be missing in one
# verb alone ("restore leave_stopped"). Whoever implements one deletes its name here, and nowhere
# else.
VERBS_NOT_YET = frozenset((
    "pre-dump", "page-server", "lazy-pages", "dedup", "service", "swrk", "cpuinfo dump",
    "cpuinfo check",
))  # fmt: skip
OPTIONS_NOT_YET = frozenset((
    "auto_dedup", "empty_ns", "freeze_cgroup", "lazy_pages",
    "lsm_mount_context", "lsm_profile", "page_server", "prev_images_dir", "restore leave_stopped",
    "stream", "tls", "track_mem",
))  # fmt: skip

# Bits of cpu_cap, as in RPC field 20.
CPU_CAP_FPU, CPU_CAP_CPU, CPU_CAP_INS, CPU_CAP_IMAGE = 1, 2, 4, 8
CPU_CAP_ALL = CPU_CAP_FPU | CPU_CAP_CPU | CPU_CAP_INS

# Bytes that a woken program can be given: what a guest page has room for (model/guest_page.py).
ARGUMENT_BYTES = 3072

CGROUP_MODES = ("none", "props", "soft", "full", "strict", "ignore")
JOINABLE_NAMESPACES = ("ipc", "mnt", "net", "time", "user", "uts")

# The names that `check --feature` knows.
FEATURES = (
    "mnt_id", "mem_dirty_track", "aio_remap", "timerfd", "tun", "tun_ns", "userns", "fdinfo_lock",
    "seccomp_suspend", "seccomp_filters", "loginuid", "cgroupns", "autofs", "tcp_half_closed",
    "compat_cr", "uffd", "uffd-noncoop", "can_map_vdso", "sk_ns", "sk_unix_file", "net_diag_raw",
    "nsid", "link_nsid", "kcmp_epoll", "timens", "external_net_ns", "clone3_set_tid",
    "newifindex", "nftables", "has_ipt_legacy", "pidfd_store", "ns_pid", "apparmor_stacking",
    "network_lock_nftables", "sockopt_buf_lock", "memfd_hugetlb", "move_mount_set_group",
    "openat2", "get_rseq_conf", "ipv6_freebind", "pagemap_scan", "timer_cr_ids", "overlayfs_maps",
    "breakpoints", "pagemap_scan_guard_pages",
)  # fmt: skip


class Options:
    """What was asked for. Make one with keyword arguments; what is left out has the default shown
    here.

    Collections are tuples in the order they were given. In CRIU a later ``external`` overrides an
    earlier one of the same name, so look them up with :meth:`external_value`. After :meth:`freeze`
    an assignment raises AttributeError.
    """

    # target and directories
    pid = 0  # the root of the tree to dump
    images_dir = "."
    work_dir = ""  # "" means images_dir
    pidfile = ""
    # afterwards
    leave_running = False
    leave_stopped = False
    restore_detached = False
    restore_sibling = False
    own_pids = False  # ours: into a pid namespace of its own, with an init and a /proc
    exec_cmd: tuple[str, ...] = ()
    # files, terminals, devices
    shell_job = False
    file_locks = False
    link_remap = False
    ghost_limit = 1 << 20  # bytes
    ghost_fiemap = True
    evasive_devices = False
    force_irmap = False
    irmap_scan_path: tuple[str, ...] = ()
    file_validation = "buildid"  # or "filesize"
    skip_file_rwx_check = False
    orphan_pts_master = False  # RPC only
    # network
    tcp_established = False
    tcp_close = False
    skip_in_flight = False
    network_lock = "iptables"  # or "nftables", "skip"
    ext_unix_sk = False
    remap_address: tuple[str, ...] = ()  # OLD=NEW, see resources/inet_remap.py, unix_remap.py
    # external resources
    external: tuple[str, ...] = ()  # TYPE[ID] or TYPE[ID]:VALUE
    ext_mount_auto = False
    enable_external_sharing = False
    enable_external_masters = False
    inherit_fd: tuple[tuple[int, str], ...] = ()  # (descriptor of ours, what it stands for)
    # namespaces and mounts
    root = ""
    join_ns: tuple[tuple[str, str, str], ...] = ()  # (kind, pid or file, extra such as "UID,GID")
    empty_ns: tuple[str, ...] = ()  # only "net"
    skip_mnt: tuple[str, ...] = ()
    enable_fs: tuple[str, ...] = ()  # names of file systems, or "all"
    mntns_compat_mode = False
    overlay: tuple[str, ...] = ()  # ours: directories, see engine/overlays.py
    overlay_upper = ""
    overlay_size = 0  # bytes of the tmpfs; 0: what the kernel gives one
    overlay_keep = False
    weak_sysctls = False
    # control groups
    manage_cgroups = "soft"  # one of CGROUP_MODES
    cgroup_root: tuple[tuple[str, str], ...] = ()  # (controllers, path); "" stands for all of them
    freeze_cgroup = ""
    cgroup_props = ""
    cgroup_props_file = ""
    cgroup_dump_controller: tuple[str, ...] = ()
    cgroup_yard = ""
    # security and processor
    lsm_profile = ""
    lsm_mount_context = ""
    cpu_cap = CPU_CAP_FPU | CPU_CAP_INS
    unprivileged = False
    allow_uprobes = False
    # memory
    track_mem = False
    prev_images_dir = ""
    auto_dedup = False
    pre_dump_mode = "splice"  # or "read"
    lazy_pages = False
    stream = False
    map = False  # ours: memory is brought in from the images once the tasks run
    map_lazy = False  # ours: with map, only what is touched
    share_pages = True  # ours: pages that tasks share copy-on-write are stored once
    precopy = True  # ours: with leave_running, large memory is copied before the tasks are stopped
    # ours: secrets and programs that know of snapshots
    guest = True  # tell them before a dump, and wait for them
    guest_timeout = 10  # seconds; 0 waits for ever
    argument = b""  # what the woken programs are given
    fresh = False  # memory that fork(2) wipes, and droppable memory, come up empty
    new_generation = True  # off: the woken programs do not learn that they are copies
    audit = False
    strict = False
    allow_shared: tuple[str, ...] = ()
    # servers
    page_server = False
    address = ""
    port = 0
    ps_socket = -1
    status_fd = -1
    tls = False
    tls_cacert = ""
    tls_cacrl = ""
    tls_cert = ""
    tls_key = ""
    tls_no_cn_verify = False
    # scripts and plugins
    action_script: tuple[str, ...] = ()
    notify: Callable[[Any], object] | None = None  # library and RPC: told of the same moments (engine/hooks.py)
    libdir = ""
    timeout = 10  # seconds; 0 waits for ever
    # check
    feature = ""
    extra = False
    experimental = False
    # log
    log_level = 2
    log_file = ""  # "" is stderr, "-" is stdout
    log_pid = False
    display_stats = False
    # settings
    config_file = ""
    no_default_config = False
    deprecated = False
    # ours
    explain = False
    json = False
    progress: Callable[[str], None] | None = None  # told in a few words what is being done now

    def __init__(self, **values: object) -> None:
        for name, value in values.items():
            if name not in ATTRIBUTES:
                raise UsageError(f"there is no option `{name}`", hint=nearest(name, ATTRIBUTES))
            setattr(self, name, tuple(value) if isinstance(value, list) else value)

    def freeze(self) -> Options:
        """From now on an assignment is an error. Returns the object itself."""
        self.__dict__["_frozen"] = True
        return self

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ATTRIBUTES:
            raise AttributeError(f"Options has no attribute `{name}`")
        if "_frozen" in self.__dict__:
            raise AttributeError(f"options are frozen: cannot set `{name}`")
        self.__dict__[name] = value

    def replace(self, **values: object) -> Options:
        """A copy, not frozen, with these values instead."""
        return Options(**{**self.changed(), **values})

    def changed(self) -> dict[str, object]:
        """Every attribute whose value is not the default, by name, in the order of the class."""
        mine = self.__dict__
        return {
            name: mine[name]
            for name in ATTRIBUTES
            if name in mine and mine[name] != getattr(Options, name)
        }

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.changed().items())
        return f"Options({values})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and self.changed() == other.changed()

    __hash__ = None  # type: ignore[assignment]

    def external_value(self, key: str) -> str | None:
        """The value of the external resource ``key``, written ``TYPE[ID]``.

        "" if the resource was named without a value, None if it was not named.
        """
        for entry in reversed(self.external):
            if entry == key:
                return ""
            if entry.startswith(key + ":"):
                return entry[len(key) + 1 :]
        return None

    def externals(self, kind: str) -> list[tuple[str, str]]:
        """All external resources of one type as pairs (id, value), the last one given first."""
        found = []
        for entry in reversed(self.external):
            if entry.startswith(kind + "["):
                ident, _, rest = entry[len(kind) + 1 :].partition("]")
                found.append((ident, rest[1:]))
        return found

    def validate(self, verb: str) -> None:
        """Do these options go together, and with this verb? Raises UsageError for what does not."""
        for name, value in self.changed().items():
            missing = name in OPTIONS_NOT_YET or f"{verb} {name}" in OPTIONS_NOT_YET
            if missing and value and verb in ("dump", "pre-dump", "restore"):
                raise UsageError(f"{verb} --{name.replace('_', '-')} is not implemented yet")
        if self.restore_sibling and not self.restore_detached:
            raise UsageError("--restore-sibling only makes sense together with --restore-detached")
        if self.mntns_compat_mode and verb != "restore":
            raise UsageError("--mntns-compat-mode is for restore only")
        if self.inherit_fd and verb != "restore":
            raise UsageError("--inherit-fd is for restore only")
        if verb in ("dump", "pre-dump") and self.pid <= 0:
            raise UsageError("which process? no pid was given", hint="--tree PID")
        if verb == "pre-dump" and self.lazy_pages:
            raise UsageError("--lazy-pages does not go with pre-dump")
        if len(self.argument) > ARGUMENT_BYTES:
            raise UsageError(
                f"--argument: {len(self.argument)} bytes, at most {ARGUMENT_BYTES} are handed over",
                hint="hand over the name of a file",
            )
        if self.map_lazy and not self.map:
            raise UsageError("--map-lazy only makes sense together with --map")
        for kind, _, _ in self.join_ns:
            if kind in self.empty_ns:
                raise UsageError(f"--join-ns {kind} and --empty-ns {kind} contradict each other")
            if kind != "net" and verb == "restore":
                raise UsageError(f"restore --join-ns {kind} is not implemented yet")
        if verb == "page-server" and self.restore_detached and 0 <= self.ps_socket <= 2:
            raise UsageError("--ps-socket is a standard descriptor, and --daemon closes those")


ATTRIBUTES: dict[str, None] = dict.fromkeys(
    name
    for name, value in vars(Options).items()
    if not name.startswith("_") and not hasattr(value, "__get__")
)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names what may have been meant, or "" when nothing is close. For errors only."""
    import difflib

    found = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean `{found[0]}`?" if found else ""


class Option:
    """One row of the table.

    ``arg`` is what the option takes, as the help shows it: "" for nothing, in [] if it may be left
    out. ``attr`` is "" for what a command line deals with by itself (``--help``), ``long`` is ""
    for what only the RPC can say. ``kind`` is how its text becomes a value: a function in
    :mod:`torpor.cli.values` ("switch" also has a --no- form). ``rpc`` is the field of criu_opts,
    ``verbs`` the verbs that look at it ("*": all).
    """

    __slots__ = ("arg", "attr", "group", "help", "kind", "long", "rpc", "short", "verbs")

    def __init__(
        self, long: str, short: str, arg: str, attr: str, kind: str, rpc: str, verbs: str, help: str
    ) -> None:
        self.long, self.short, self.arg, self.attr, self.kind = long, short, arg, attr, kind
        self.rpc, self.verbs, self.help, self.group = rpc, tuple(verbs.split()), help, ""

    @property
    def ours(self) -> bool:
        """Does CRIU not have it?"""
        return self.long in OURS

    def used_by(self, verb: str) -> bool:
        """Does this verb look at the option?"""
        return "*" in self.verbs or verb in self.verbs


OURS = frozenset((
    "allow-shared", "argument", "audit", "explain", "fresh", "guest", "guest-timeout", "json", "map",
    "map-lazy", "new-generation", "overlay", "overlay-keep", "overlay-size", "overlay-upper", "own-pids", "precopy",
    "remap-address", "share-pages", "strict",
))  # fmt: skip
#: Those that the criu command takes as well.
OURS_IN_CRIU = frozenset(("guest", "guest-timeout", "precopy", "remap-address", "share-pages"))

_D, _R, _SRV = "dump pre-dump", "restore", "page-server service lazy-pages"
_DR, _NET = f"{_D} {_R}", f"{_D} {_R} {_SRV}"
_O = Option

GROUPS: tuple[tuple[str, tuple[Option, ...]], ...] = (
    ("Which process, which directory", (
        _O("tree", "t", "PID", "pid", "positive", "pid", _D,
           "the process whose whole tree is dumped"),
        _O("images-dir", "D", "DIR", "images_dir", "text", "images_dir", "*",
           "where the images are (default: here)"),
        _O("work-dir", "W", "DIR", "work_dir", "text", "", "*",
           "where logs, pidfiles and statistics go (default: -D)"),
    )),
    ("What happens afterwards", (
        _O("leave-running", "R", "", "leave_running", "leave", "leave_running", _D,
           "let the tasks run on after the dump"),
        _O("leave-stopped", "s", "", "leave_stopped", "leave", "leave_stopped", _DR,
           "leave the tasks stopped"),
        _O("restore-detached", "d", "", "restore_detached", "switch", "", _R,
           "return once the tasks run; do not wait for them"),
        _O("restore-sibling", "S", "", "restore_sibling", "switch", "rst_sibling", _R,
           "make the root task a sibling of this command, with -d"),
        _O("own-pids", "", "", "own_pids", "switch", "", _R,
           "into a pid namespace of its own: any number of times at once"),
        _O("exec-cmd", "", "", "", "flag", "exec_cmd", _R,
           "become the command after `--` once restored: it is the parent"),
        _O("pidfile", "", "FILE", "pidfile", "text", "", "restore page-server service",
           "write the pid of the root task or server here"),
    )),
    ("Files, terminals and devices", (
        _O("shell-job", "j", "", "shell_job", "switch", "shell_job", _DR,
           "the tree shares session and terminal with a shell outside it"),
        _O("file-locks", "l", "", "file_locks", "switch", "file_locks", _DR,
           "include file locks; nobody outside may hold one of them"),
        _O("link-remap", "", "", "link_remap", "switch", "link_remap", _DR,
           "give deleted files a temporary name rather than refuse"),
        _O("ghost-limit", "", "SIZE", "ghost_limit", "size", "ghost_limit", _D,
           "largest deleted file to carry along (default 1M)"),
        _O("ghost-fiemap", "", "", "ghost_fiemap", "switch", "", _D,
           "find the holes of deleted files with one ioctl (default)"),
        _O("evasive-devices", "", "", "evasive_devices", "switch", "evasive_devices", _DR,
           "take any path of a device if its own is gone"),
        _O("force-irmap", "", "", "force_irmap", "switch", "force_irmap", _D,
           "search the paths of inotify and fanotify watches"),
        _O("irmap-scan-path", "", "PATH", "irmap_scan_path", "append", "irmap_scan_paths", _D,
           "search here for them, too"),
        _O("file-validation", "", "buildid|filesize", "file_validation", "choice", "", _DR,
           "how to tell that a file is still the same one"),
        _O("skip-file-rwx-check", "", "", "skip_file_rwx_check", "switch", "skip_file_rwx_check",
           _R, "accept files whose permissions changed"),
        _O("", "", "", "orphan_pts_master", "flag", "orphan_pts_master", _R,
           "hand the master of the console to the caller"),
    )),
    ("Network", (
        _O("tcp-established", "", "", "tcp_established", "switch", "tcp_established", _DR,
           "include established TCP connections"),
        _O("tcp-close", "", "", "tcp_close", "switch", "tcp_close", _DR,
           "restore established TCP connections as closed"),
        _O("skip-in-flight", "", "", "skip_in_flight", "switch", "tcp_skip_in_flight", _D,
           "leave out connections still being set up"),
        _O("network-lock", "", "iptables|nftables|skip", "network_lock", "network_lock",
           "network_lock", _D, "how to hold back packets meanwhile"),
        _O("remap-address", "", "OLD=NEW", "remap_address", "remap_address", "", _R,
           "sockets at ADDRESS[:PORT], :PORT, PATH or @NAME OLD come up at NEW"),
        _O("ext-unix-sk", "x", "[INODE,...]", "ext_unix_sk", "ext_unix_sk", "ext_unix_sk", _DR,
           "unix sockets may have their peer outside"),
    )),
    ("What lies outside of the tree", (
        _O("external", "", "RES", "external", "external", "external", _DR,
           "this is outside: save its name only, or find it by name"),
        _O("inherit-fd", "", "fd[N]:RES", "inherit_fd", "inherit_fd", "inherit_fd", _R,
           "descriptor N of this command stands for RES"),
        _O("enable-external-sharing", "", "", "enable_external_sharing", "flag", "ext_sharing", _DR,
           "external mounts may be shared"),
        _O("enable-external-masters", "", "", "enable_external_masters", "flag", "ext_masters", _DR,
           "external mounts may be slaves"),
        _O("ext-mount-map", "M", "KEY:VAL", "external", "ext_mount_map", "ext_mnt", _DR,
           "older spelling of --external mnt[KEY]:VAL; or `auto`"),
        _O("veth-pair", "", "IN=OUT", "external", "veth_pair", "veths", _R,
           "older spelling of --external veth[IN]:OUT"),
        _O("", "", "", "ext_mount_auto", "flag", "auto_ext_mnt", _DR,
           "find external mounts by looking"),
    )),
    ("Files of a copy's own", (
        _O("overlay", "", "DIR", "overlay", "append", "", _R,
           "what it writes in DIR is for it alone, with --own-pids; repeatable"),
        _O("overlay-upper", "", "PATH", "overlay_upper", "text", "", _R,
           "write to a new folder in PATH, not a tmpfs; removed in the end"),
        _O("overlay-size", "", "SIZE", "overlay_size", "size", "", _R,
           "limit of that tmpfs, such as 64M (default: half of the memory)"),
        _O("overlay-keep", "", "", "overlay_keep", "switch", "", _R,
           "do not remove the folder in PATH"),
    )),
    ("Namespaces and mounts", (
        _O("root", "r", "DIR", "root", "text", "root", _DR,
           "root directory of the restored mount namespace"),
        _O("join-ns", "J", "NS:PID|FILE[,UID,GID]", "join_ns", "join_ns", "join_ns", _R,
           "restore into a network namespace that exists"),
        _O("empty-ns", "", "net", "empty_ns", "empty_ns", "empty_ns", _DR,
           "make this namespace, but leave it to a script to fill it"),
        _O("skip-mnt", "", "DIR", "skip_mnt", "append", "skip_mnt", _DR,
           "leave out what is mounted here"),
        _O("enable-fs", "", "NAME,...|all", "enable_fs", "names", "enable_fs", _DR,
           "trust that these file systems just mount again"),
        _O("mntns-compat-mode", "", "", "mntns_compat_mode", "switch", "mntns_compat_mode", _R,
           "build mounts in the older way"),
        _O("weak-sysctls", "", "", "weak_sysctls", "switch", "weak_sysctls", _R,
           "skip sysctls that this kernel does not have"),
    )),
    ("Control groups", (
        _O("manage-cgroups", "", "[MODE]", "manage_cgroups", "cgroup_mode", "manage_cgroups_mode",
           _DR, "none, props, soft (default), full, strict or ignore"),
        _O("cgroup-root", "", "[CTL:]DIR", "cgroup_root", "cgroup_root", "cg_root", _DR,
           "the group that takes the place of the root"),
        _O("freeze-cgroup", "", "DIR", "freeze_cgroup", "text", "freeze_cgroup", _D,
           "the tree is what is in this group"),
        _O("cgroup-props", "", "YAML", "cgroup_props", "text", "cgroup_props", _D,
           "which properties of which controllers to save"),
        _O("cgroup-props-file", "", "FILE", "cgroup_props_file", "text", "cgroup_props_file", _D,
           "the same from a file"),
        _O("cgroup-dump-controller", "", "NAME", "cgroup_dump_controller", "append",
           "cgroup_dump_controller", _D, "save this controller and none but those named"),
        _O("cgroup-yard", "", "DIR", "cgroup_yard", "text", "cgroup_yard", _DR,
           "where the hierarchies are mounted already"),
    )),
    ("Security and processor", (
        _O("lsm-profile", "", "TYPE:NAME", "lsm_profile", "text", "lsm_profile", _R,
           "apparmor profile or selinux label to restore with"),
        _O("lsm-mount-context", "", "CTX", "lsm_mount_context", "text", "lsm_mount_context", _R,
           "selinux context for mounts that have one"),
        _O("cpu-cap", "", "[CAP,...]", "cpu_cap", "cpu_cap", "cpu_cap", _DR + " cpuinfo",
           "compare processors by cpu, fpu, ins, all or none; ^CAP: not"),
        _O("unprivileged", "", "", "unprivileged", "switch", "unprivileged", "*",
           "run without root, within the limits that this has"),
        _O("allow-uprobes", "", "", "allow_uprobes", "switch", "", _DR,
           "accept a mapping left behind by uprobes"),
    )),
    ("Memory", (
        _O("share-pages", "", "", "share_pages", "switch", "", _D,
           "store what tasks share once (default); CRIU cannot read that"),
        _O("precopy", "", "", "precopy", "switch", "", _D,
           "with --leave-running, copy large memory before stopping (default)"),
        _O("map", "", "", "map", "switch", "", _R,
           "let tasks run at once; memory comes when touched, then the rest"),
        _O("map-lazy", "", "", "map_lazy", "switch", "", _R,
           "with --map: only what is touched, for as long as it takes"),
        _O("track-mem", "", "", "track_mem", "switch", "track_mem", _D,
           "watch which pages change, for the next dump"),
        _O("prev-images-dir", "", "DIR", "prev_images_dir", "text", "parent_img", _D,
           "the dump before this one, relative to -D"),
        _O("auto-dedup", "", "", "auto_dedup", "switch", "auto_dedup", _DR + " page-server",
           "drop from older images what newer ones hold"),
        _O("pre-dump-mode", "", "splice|read", "pre_dump_mode", "choice", "pre_dump_mode",
           "pre-dump", "how a pre-dump reads memory"),
        _O("lazy-pages", "", "", "lazy_pages", "flag", "lazy_pages", _DR + " page-server",
           "bring memory in when it is touched"),
        _O("stream", "", "", "stream", "switch", "", _DR,
           "pass images through criu-image-streamer"),
    )),
    ("Copies and their secrets", (
        _O("guest", "", "", "guest", "switch", "", _D,
           "tell programs that know of snapshots, and wait until they are ready"),
        _O("guest-timeout", "", "SECONDS", "guest_timeout", "natural", "", _D,
           "how long to wait for them (default 10; 0: for ever)"),
        _O("argument", "", "TEXT|-", "argument", "argument", "", _R,
           "hand this to the woken programs that take it; - reads stdin"),
        _O("fresh", "", "", "fresh", "switch", "", _R,
           "memory that is wiped by fork, or droppable, comes up empty"),
        _O("new-generation", "", "", "new_generation", "switch", "", _R,
           "give the copy a generation of its own (default)"),
        _O("audit", "", "", "audit", "switch", "", _R,
           "say what copies of this snapshot share, and restore nothing"),
        _O("strict", "", "", "strict", "switch", "", _R,
           "refuse if copies would share a secret that nobody renews"),
        _O("allow-shared", "", "WHAT", "allow_shared", "append", "", _R,
           "accept that they share this, as --audit calls it"),
    )),
    ("Servers", (
        _O("page-server", "", "", "page_server", "switch", "ps", _D,
           "send memory to a page server"),
        _O("address", "", "ADDR", "address", "text", "ps", _NET,
           "address of the server"),
        _O("port", "", "PORT", "port", "port", "ps", _NET,
           "its port"),
        _O("ps-socket", "", "FD", "ps_socket", "number", "ps",
           "dump pre-dump page-server lazy-pages", "talk over this socket instead"),
        _O("daemon", "", "", "restore_detached", "switch", "", _SRV,
           "go into the background once ready"),
        _O("status-fd", "", "FD", "status_fd", "number", "status_fd", _SRV,
           "write a zero byte here once ready"),
        _O("tls", "", "", "tls", "switch", "tls", _NET,
           "encrypt connections"),
        _O("tls-cacert", "", "FILE", "tls_cacert", "text", "tls_cacert", _NET,
           "trust only what this authority signed"),
        _O("tls-cacrl", "", "FILE", "tls_cacrl", "text", "tls_cacrl", _NET,
           "revoked certificates"),
        _O("tls-cert", "", "FILE", "tls_cert", "text", "tls_cert", _NET,
           "our certificate"),
        _O("tls-key", "", "FILE", "tls_key", "text", "tls_key", _NET,
           "our private key"),
        _O("tls-no-cn-verify", "", "", "tls_no_cn_verify", "flag", "tls_no_cn_verify", _NET,
           "do not compare the name in the certificate"),
    )),
    ("Scripts, plugins, limits", (
        _O("action-script", "", "FILE", "action_script", "append", "", _DR,
           "run this at each stage, told of it by $CRTOOLS_SCRIPT_ACTION"),
        _O("libdir", "L", "DIR", "libdir", "text", "", _DR,
           "where plugins are (default $CRIU_LIBS_DIR, /usr/lib/criu)"),
        _O("timeout", "", "SECONDS", "timeout", "natural", "timeout", _D,
           "how long to wait for tasks to stop (default 10)"),
        _O("close", "", "FD", "", "close", "", "*",
           "close this descriptor first"),
    )),
    ("Checking the kernel", (
        _O("feature", "", "NAME", "feature", "feature", "", "check",
           "check this one only (`list` names them)"),
        _O("extra", "", "", "extra", "switch", "", "check",
           "check what only some programs need, too"),
        _O("experimental", "", "", "experimental", "switch", "", "check",
           "check what is experimental, too"),
        _O("all", "", "", "", "check_all", "", "check",
           "both"),
        _O("ms", "", "", "", "removed", "", "",
           "(no longer there)"),
    )),
    ("What it says while it works", (
        _O("verbosity", "v", "[LEVEL]", "log_level", "verbosity", "log_level", "*",
           "0 silent, 1 errors, 2 warnings (default), 3 progress, 4 all"),
        _O("log-file", "o", "FILE", "log_file", "text", "log_file", "*",
           "where the log goes (default stderr; - is stdout)"),
        _O("log-pid", "", "", "log_pid", "switch", "", _DR,
           "accepted; there is one log"),
        _O("display-stats", "", "", "display_stats", "switch", "display_stats", _DR,
           "print the statistics at the end"),
        _O("explain", "", "", "explain", "switch", "", _DR,
           "print the system calls that each task would do, and do nothing"),
        _O("json", "", "", "json", "switch", "", "dump restore check",
           "print the result as JSON"),
    )),
    ("Settings", (
        _O("config", "", "FILE", "config_file", "text", "config_file", "*",
           "read options from here instead of the default files"),
        _O("no-default-config", "", "", "no_default_config", "flag", "", "*",
           "do not read the default files"),
        _O("deprecated", "", "", "deprecated", "switch", "", "*",
           "allow what is on its way out"),
        _O("help", "h", "", "", "flag", "", "*",
           "show this text"),
        _O("version", "V", "", "", "flag", "", "*",
           "show the version"),
    )),
)  # fmt: skip

TABLE: tuple[Option, ...] = tuple(row for _, rows in GROUPS for row in rows)
for _title, _rows in GROUPS:
    for _row in _rows:
        _row.group = _title
