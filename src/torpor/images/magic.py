"""The image files of a set: name, magic, message, and what follows a message.

File names and magics are CRIU's (criu/image-desc.c, criu/include/magic.h of version 4.2). An image
is called here by its file's name without ``.img``: ``core-42``, ``files``, ``tmpfs-5.tar.gz``.
"""

from __future__ import annotations

from collections import namedtuple

from ..errors import UsageError

# How the messages of an image lie in its file.
ONE = "one"  # exactly one message
MANY = "many"  # any number of them
HEADED = "headed"  # a pagemap: one pagemap_head, then any number of pagemap_entry
RAW = "raw"  # no magic, no messages: pages, tar archives, what `ip` and `nft` print

# What comes before the magic of the type, since version 1.1 of the format.
COMMON, SERVICE = 0x54564319, 0x55105940

#: ``stem``: the name before the id; ``id``: "" (none), "u" (decimal), "x" (hexadecimal), "s" (a
#: word); ``magic``: what crit calls the type, "" for raw files; ``number``: the magic itself;
#: ``message``: class of the messages; ``form``: one of the constants above;
#: ``payload``: does something follow each message?
Image = namedtuple("Image", "stem id magic number message form payload")

# Lines of: stem, id, crit's name of the magic, magic, message, form, "+" for a payload.
_TABLE = """
inventory       - INVENTORY      58313116 inventory_entry       one
pstree          - PSTREE         50273030 pstree_entry          many
core            u CORE           55053847 core_entry            one
ids             u IDS            54432030 task_kobj_ids_entry   one
mm              u MM             57492820 mm_entry              one
fs              u FS             51403912 fs_entry              one
creds           u CREDS          54023547 creds_entry           one
pagemap         u PAGEMAP        56084025 pagemap_entry         headed
pagemap-shmem   u PAGEMAP        56084025 pagemap_entry         headed
pages           u -              0        -                     raw
fdinfo          u FDINFO         56213732 fdinfo_entry          many
files           - FILES          56303138 file_entry            many
pipes-data      - PIPES_DATA     56453709 pipe_data_entry       many +
fifo-data       - FIFO_DATA      59333054 pipe_data_entry       many +
sk-queues       - SK_QUEUES      56264026 sk_packet_entry       many +
tcp-stream      x TCP_STREAM     51465506 tcp_stream_entry      one  +
ghost-file      x GHOST_FILE     52583605 ghost_file_entry      many +
remap-fpath     - REMAP_FPATH    59133954 remap_file_path_entry many
memfd           - MEMFD_INODE    48453499 memfd_inode_entry     many
tty-info        - TTY_INFO       59453036 tty_info_entry        many
tty-data        - TTY_DATA       59413026 tty_data_entry        many
filelocks       - FILE_LOCKS     54323616 file_lock_entry       many
bpfmap-file     - BPFMAP_FILE    57506142 bpfmap_file_entry     many
bpfmap-data     - BPFMAP_DATA    64324033 bpfmap_data_entry     many +
cgroup          - CGROUP         59383330 cgroup_entry          one
seccomp         - SECCOMP        64413049 seccomp_entry         one
apparmor        - APPARMOR       59423047 apparmor_entry        one
cpuinfo         - CPUINFO        61404013 cpuinfo_entry         one
utsns           u UTSNS          54473203 utsns_entry           one
timens          u TIMENS         43114433 timens_entry          one
pidns           u PIDNS          61157326 pidns_entry           one
userns          u USERNS         55474906 userns_entry          one
ipcns-var       u IPC_VAR        53115007 ipc_var_entry         one
ipcns-shm       u IPCNS_SHM      46283044 ipc_shm_entry         many +
ipcns-msg       u IPCNS_MSG      55453737 ipc_msg_entry         many +
ipcns-sem       u IPCNS_SEM      59573019 ipc_sem_entry         many +
mountpoints     u MNTS           55563928 mnt_entry             many
netns           u NETNS          55933752 netns_entry           one
netdev          u NETDEV         57373951 net_device_entry      many
autofs          u AUTOFS         49353943 autofs_entry          one
binfmt-misc     - BINFMT_MISC    67343323 binfmt_misc_entry     many
binfmt-misc     u BINFMT_MISC    67343323 binfmt_misc_entry     many
ifaddr          u -              0        -                     raw
route           u -              0        -                     raw
route6          u -              0        -                     raw
rule            u -              0        -                     raw
iptables        u -              0        -                     raw
ip6tables       u -              0        -                     raw
nftables        u -              0        -                     raw
netns-ct        u -              0        -                     raw
netns-exp       u -              0        -                     raw
tmpfs           u -              0        -                     raw
tmpfs-dev       u -              0        -                     raw
reg-files       - REG_FILES      50363636 reg_file_entry        many
ext-files       - EXT_FILES      59255641 ext_file_entry        many
ns-files        - NS_FILES       61394011 ns_file_entry         many
eventfd         - EVENTFD_FILE   44523722 eventfd_file_entry    many
eventpoll       - EVENTPOLL_FILE 45023858 eventpoll_file_entry  many
eventpoll-tfd   - EVENTPOLL_TFD  44433746 eventpoll_tfd_entry   many
signalfd        - SIGNALFD       57323820 signalfd_entry        many
timerfd         - TIMERFD        50493712 timerfd_entry         many
pidfd           - PIDFD          54435556 pidfd_entry           many
inotify         - INOTIFY_FILE   48424431 inotify_file_entry    many
inotify-wd      - INOTIFY_WD     54562009 inotify_wd_entry      many
fanotify        - FANOTIFY_FILE  55096122 fanotify_file_entry   many
fanotify-mark   - FANOTIFY_MARK  56506035 fanotify_mark_entry   many
pipes           - PIPES          56513555 pipe_entry            many
fifo            - FIFO           58364939 fifo_entry            many
unixsk          - UNIXSK         54373943 unix_sk_entry         many
inetsk          - INETSK         56443851 inet_sk_entry         many
packetsk        - PACKETSK       60454618 packet_sock_entry     many
netlinksk       - NETLINK_SK     58005614 netlink_sk_entry      many
tty             - TTY_FILES      59433025 tty_file_entry        many
tunfile         - TUNFILE        57143751 tunfile_entry         many
vmas            u VMAS           54123737 vma_entry             many
sigacts         u SIGACT         55344201 sa_entry              many
itimers         u ITIMERS        57464056 itimer_entry          many
posix-timers    u POSIX_TIMERS   52603957 posix_timer_entry     many
rlimit          u RLIMIT         57113925 rlimit_entry          many
signal-s        u SIGNAL         59255647 siginfo_entry         many
signal-p        u SIGNAL         59255647 siginfo_entry         many
stats           s STATS          57093306 stats_entry           one
irmap-cache     - IRMAP_CACHE    57004059 irmap_cache_entry     many
"""

# A set without files.img has its open files in these: image -> (fd_types name, file_entry field).
OLD_STYLE_FILES = {
    "reg-files": ("REG", "reg"),
    "pipes": ("PIPE", "pipe"),
    "fifo": ("FIFO", "fifo"),
    "inetsk": ("INETSK", "isk"),
    "unixsk": ("UNIXSK", "usk"),
    "eventfd": ("EVENTFD", "efd"),
    "eventpoll": ("EVENTPOLL", "epfd"),
    "inotify": ("INOTIFY", "ify"),
    "signalfd": ("SIGNALFD", "sgfd"),
    "packetsk": ("PACKETSK", "psk"),
    "tty": ("TTY", "tty"),
    "fanotify": ("FANOTIFY", "ffy"),
    "netlinksk": ("NETLINKSK", "nlsk"),
    "ns-files": ("NS", "nsf"),
    "tunfile": ("TUNF", "tunf"),
    "ext-files": ("EXT", "ext"),
    "timerfd": ("TIMERFD", "tfd"),
    "pidfd": ("PIDFD", "pidfd"),
}

# Images without an id that CRIU looks for in every set: one left over from an older set would be
# taken for a part of the new one.
_GLOBAL = """
files sk-queues pipes-data fifo-data tty-info tty-data remap-fpath cgroup filelocks seccomp
apparmor memfd bpfmap-file bpfmap-data
"""
GLOBAL = frozenset(_GLOBAL.split())


def _parse() -> dict[tuple[str, str], Image]:
    images = {}
    for line in _TABLE.strip().splitlines():
        stem, kind, magic, number, message, form, *payload = (
            "" if word == "-" else word for word in line.split()
        )
        image = Image(stem, kind, magic, int(number, 16), message, form, bool(payload))
        images[stem, kind] = image
    return images


#: Every image by stem and kind of id.
IMAGES = _parse()

_BY_MAGIC: dict[str, Image] = {}
_BY_NUMBER: dict[int, Image] = {}
for _image in IMAGES.values():
    if _image.magic:
        _BY_MAGIC.setdefault(_image.magic, _image)
        _BY_NUMBER.setdefault(_image.number, _image)

_DIGITS = {"u": frozenset("0123456789"), "x": frozenset("0123456789abcdef")}
_WORDS = ("dump", "restore")  # of stats-


def find(name: str) -> Image | None:
    """The kind of the image called ``name`` (without ``.img``); None if there is no such kind."""
    if name not in _found:  # asked several times for each image, of which there may be one for each connection
        if len(_found) > _FOUND_MAX:
            _found.clear()
        _found[name] = _find(name)
    return _found[name]


_found: dict[str, Image | None] = {}
_FOUND_MAX = 4096


def _find(name: str) -> Image | None:
    image = IMAGES.get((name, ""))
    if image is not None:
        return image
    if name.endswith(".tar.gz"):
        name = name[:-7]
        if not name.startswith("tmpfs"):
            return None
    elif name.startswith("tmpfs"):
        return None
    stem, dash, number = name.rpartition("-")
    if not dash or not 0 < len(number) <= 20:
        return None
    for kind, digits in _DIGITS.items():
        image = IMAGES.get((stem, kind))
        if image is not None:
            return image if digits.issuperset(number) else None
    return IMAGES.get((stem, "s")) if number in _WORDS else None


def kind_of(name: str) -> Image:
    """As :func:`find`; UsageError where a set has no such image. Guards every file name we open."""
    image = find(name)
    if image is None:
        raise UsageError(f"`{name}` is no image of a set")
    return image


def by_magic(magic: str) -> Image | None:
    """The kind of image that crit calls ``magic``."""
    return _BY_MAGIC.get(magic)


def by_number(number: int) -> Image | None:
    """The kind of image with that magic number."""
    return _BY_NUMBER.get(number)


def file_name(name: str) -> str:
    """The file of the image ``name``; raises as :func:`kind_of`."""
    image = kind_of(name)
    return name if image.stem in ("stats", "irmap-cache") else f"{name}.img"


def image_name(file: str) -> str | None:
    """The image that the file called ``file`` is, or None if it is none."""
    name = file.removesuffix(".img")
    return name if find(name) is not None and file_name(name) == file else None


def head(image: Image) -> bytes:
    """The first bytes of a file of that kind."""
    if image.form == RAW:
        return b""
    number: int = image.number
    own = number.to_bytes(4, "little")
    if image.stem == "inventory":  # it tells whether the others have the common magic
        return own
    first = SERVICE if image.stem in ("stats", "irmap-cache") else COMMON
    return first.to_bytes(4, "little") + own
