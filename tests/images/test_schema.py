"""The schema is CRIU's, the compiled set the sources', and it loads however protobuf is built."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from hypothesis import given
from hypothesis import strategies as st

from images.made import TEXTS, least
from kit.verbs import SOURCES, tool
from torpor.errors import ImageError
from torpor.images import magic
from torpor.images import schema as pb

IMAGES = os.path.join(SOURCES, "torpor", "images")

# Names, numbers, types, labels and defaults of all fields and enums in CRIU 4.2's images/*.proto
# without opts.proto: 1273 lines in the form of facts(), sorted, one newline between them.
CRIU_FACTS = (1273, "3ff0169601d80462c6617b20dfdcef68f6b869a7569a75d4556eb446d7d244f0")


def compiled() -> Any:
    with open(os.path.join(IMAGES, "schema.binpb"), "rb") as file:
        return descriptor_pb2.FileDescriptorSet.FromString(file.read())


def facts(described: Any) -> list[str]:
    """One line for each field and enum value that CRIU has too."""
    fields = [(m, f) for file in described.file for m in file.message_type for f in m.field]
    ours: set[str] = set()
    grown = {f.type_name for _, f in fields if f.number >= 1000}
    while grown != ours:  # what is a part of ours alone is ours
        ours = grown
        theirs = {f.type_name for m, f in fields if f.number < 1000 and f".{m.name}" not in ours}
        grown = (ours | {f.type_name for m, f in fields if f".{m.name}" in ours}) - theirs
    lines = [
        f"{m.name}.{f.name} {f.label} {f.type} {f.type_name} {f.number} {f.default_value}"
        for m, f in fields
        if f.number < 1000 and f".{m.name}" not in ours
    ]
    enums = [("", e) for file in described.file for e in file.enum_type]
    enums += [
        (f"{m.name}.", e) for file in described.file for m in file.message_type for e in m.enum_type
    ]
    lines += [
        f"{place}{e.name}.{v.name}={v.number}"
        for place, e in enums
        for v in e.value
        if not (e.name in ("fd_types", "remap_type") and 1000 <= v.number < 2000)
    ]
    return sorted(lines)


def test_every_fact_is_criu_s() -> None:
    lines = facts(compiled())
    assert (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()) == CRIU_FACTS


def test_the_set_is_compiled_from_the_sources() -> None:
    pytest.importorskip("grpc_tools", reason="pip install grpcio-tools")
    fresh = descriptor_pb2.FileDescriptorSet.FromString(
        tool("compile_schema").compile_set(os.path.join(IMAGES, "schema"))
    )
    assert fresh == compiled(), "run tools/compile_schema.py"


def test_what_is_ours_is_optional() -> None:
    for file in compiled().file:
        for message in file.message_type:
            for field in message.field:
                if field.number >= 1000:
                    assert field.label != field.LABEL_REQUIRED, f"{message.name}.{field.name}"


def test_every_image_has_its_message() -> None:
    for image in magic.IMAGES.values():
        if image.message:
            assert pb.message_class(image.message).DESCRIPTOR.name == image.message


def test_a_message_is_what_protobuf_says() -> None:
    entry = pb.eventfd_file_entry(id=1, flags=2, fown=least("fown_entry"), counter=3)
    assert entry.SerializeToString().startswith(b"\x08\x01\x10\x02\x1a")
    assert pb.eventfd_file_entry is pb.eventfd_file_entry
    assert type(entry.fown) is pb.fown_entry
    assert pb.eventfd_file_entry.FromString(entry.SerializeToString()) == entry


def test_enums() -> None:
    assert pb.fd_types.EVENTFD == 6
    assert pb.fd_types.Name(6) == "EVENTFD"
    assert pb.core_entry.X86_64 == 1


def test_there_is_nothing_else() -> None:
    with pytest.raises(AttributeError, match="no message or enum `core_entri`"):
        pb.core_entri
    with pytest.raises(KeyError):
        pb.message_class("nothing")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x08", "1 bytes are no valid reg_file_entry"),
        (b"\xff" * 20, "20 bytes are no valid reg_file_entry"),
        (b"\x08\x01", "reg_file_entry lacks flags, pos, fown and 1 more"),
        (b"\x2a\x00\x08\x01\x10\x01\x18\x01", "lacks name, fown.uid, fown.euid and 3 more"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ImageError) as caught:
        pb.decode("reg_file_entry", data, "files.img", "entry 3")
    assert str(caught.value).startswith("files.img: entry 3: ")
    assert why in str(caught.value)
    assert (caught.value.image, caught.value.field) == ("files.img", "entry 3")


def test_a_message_nested_without_end_is_refused() -> None:
    data = b""
    for _ in range(5000):
        size = len(data)
        head = bytearray(b"\x12")  # cgroup_dir_entry.children
        while size > 0x7F:
            head.append(size & 0x7F | 0x80)
            size >>= 7
        data = bytes(head) + bytes([size]) + data
    with pytest.raises(ImageError):
        pb.decode("cgroup_dir_entry", data, "cgroup.img")


def test_what_lacks_a_field_is_not_written() -> None:
    with pytest.raises(ImageError, match=r"inventory\.img: inventory_entry lacks img_version"):
        pb.encode(pb.inventory_entry(), "inventory.img")


@given(TEXTS)
def test_strings_may_hold_any_bytes(value: bytes) -> None:
    entry = pb.inherit_fd(fd=1)
    pb.put_bytes(entry, "key", b"before")
    pb.put_bytes(entry, "key", value)
    again = pb.decode("inherit_fd", pb.encode(entry, ""), "")
    assert pb.get_bytes(again.key) == value
    assert again.SerializeToString() == b"\x0a%c%b\x10\x01" % (len(value), value)


@given(st.lists(TEXTS, max_size=4))
def test_lists_of_strings_too(values: list[bytes]) -> None:
    entry = pb.plugins_entry()
    for value in values:
        pb.add_bytes(entry, "plugins", value)
    again = pb.plugins_entry.FromString(entry.SerializeToString())
    assert [pb.get_bytes(value) for value in again.plugins] == values


def test_others_may_have_messages_of_the_same_names() -> None:
    other = descriptor_pb2.FileDescriptorProto(name="other.proto", syntax="proto2")
    other.message_type.add(name="core_entry")
    descriptor_pool.Default().AddSerializedFile(other.SerializeToString())
    assert pb.core_entry(mtype=1).SerializeToString() == b"\x08\x01"


RUNTIME = """
import sys
sys.path.insert(0, {sources!r})
from torpor.images import schema as pb
assert not any(name.startswith("google") for name in sys.modules), "protobuf is loaded too early"
{before}
entry = pb.file_entry(type=pb.fd_types.REG, id=5)
entry.reg.id = 5
entry.reg.fown.uid = 7
print(entry.SerializePartialToString().hex(), pb._make_class.__module__)
print("google.protobuf.descriptor_pool" in sys.modules)
"""


def loaded(before: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", RUNTIME.format(sources=SOURCES, before=before)],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_all_runtimes_write_the_same() -> None:
    usual = loaded("")
    broken = loaded("pb._upb_runtime = lambda: object.no_such_thing")
    pure = loaded("", PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION="python")
    assert usual[0] == broken[0] == pure[0] == "080110051a0608052a020807"
    assert usual[1:] == ["torpor.images.schema", "False"], "the short way in is not taken any more"
    assert broken[1:] == pure[1:] == ["google.protobuf.message_factory", "True"]
