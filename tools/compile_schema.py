#!/usr/bin/env python3
"""Compile src/torpor/images/schema/*.proto to src/torpor/images/schema.binpb.

Run it after every change of a .proto file (needs grpcio-tools); tests/images/test_schema.py holds
that the two agree. The set is stripped of what only generated code needs, because it is loaded at
every start.
"""

from __future__ import annotations

import importlib.resources
import os
import sys
import tempfile

IMAGES = os.path.join(os.path.dirname(__file__), "..", "src", "torpor", "images")


def compile_set(folder: str) -> bytes:
    """The serialized FileDescriptorSet of all .proto files in ``folder``, imported files first."""
    from google.protobuf.descriptor_pb2 import FileDescriptorSet
    from grpc_tools import protoc

    names = sorted(name for name in os.listdir(folder) if name.endswith(".proto"))
    with tempfile.TemporaryDirectory() as scratch:
        output = os.path.join(scratch, "set")
        include = str(importlib.resources.files("grpc_tools") / "_proto")
        arguments = [f"-I{folder}", f"-I{include}", "--include_imports", f"-o{output}", *names]
        if protoc.main(["protoc", *arguments]) != 0:
            raise SystemExit("protoc failed")
        with open(output, "rb") as file:
            described = FileDescriptorSet.FromString(file.read())
    for file_proto in described.file:
        for message in file_proto.message_type:
            for field in message.field:
                field.ClearField("json_name")
    return described.SerializeToString(deterministic=True)


def main() -> None:
    """Write the set; with --check, only say whether it is up to date."""
    compiled = compile_set(os.path.join(IMAGES, "schema"))
    target = os.path.join(IMAGES, "schema.binpb")
    if "--check" in sys.argv[1:]:
        with open(target, "rb") as file:
            raise SystemExit(0 if file.read() == compiled else f"{target} is out of date")
    with open(target, "wb") as file:
        file.write(compiled)
    print(f"{target}: {len(compiled)} bytes")


if __name__ == "__main__":
    main()
