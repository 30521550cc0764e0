"""TensorFlow checkpoints ("tensor bundles"), read without TensorFlow.

A bundle is a table of contents, and the numbers:

    model.ckpt.index                  name -> dtype, shape, shard, offset, size, checksum
    model.ckpt.data-00000-of-00001    the tensors end to end, little-endian

The index is a LevelDB table (github.com/google/leveldb, doc/table_format.md): blocks of sorted keys
and values. The values are protocol buffers (protobuf.dev/programming-guides/encoding; TensorFlow's
are in tensorflow/core/protobuf/tensor_bundle.proto). Every block and every tensor has a checksum,
and all of them are verified.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from gpt2mini.checkpoints.stored import CheckpointError, StoredTensor, file_beside, reading
from gpt2mini.files import refuse_placeholder

FOOTER_SIZE = 48  # of a LevelDB table, which ends with
MAGIC = 0xDB4775248B80FB57
TRAILER_SIZE = 5  # of a block: one byte for the compression, four for the checksum
LARGEST_INDEX = 2**20  # bytes; that of GPT-2 XL has some 20,000
LONGEST_NAME = 1000
# types.proto: DT_FLOAT, DT_DOUBLE, DT_HALF
DTYPES: dict[int, np.dtype] = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 19: np.dtype("<f2")}


def read_bundle(index: Path) -> dict[str, StoredTensor]:
    """The tensors of a bundle under their own names, in their own shapes."""
    tensors = {}
    with reading(index):
        refuse_placeholder(index)
        if index.stat().st_size > LARGEST_INDEX:
            raise CheckpointError(f"{index} is too large to be the index of a checkpoint")
        entries = read_table(index.read_bytes())
        header = read_message(entries.pop(b"", b""))
        n_shards = number(header, 1)
        if number(header, 2):
            raise CheckpointError(f"{index} is of a big-endian machine")
        for key, value in entries.items():
            name, entry = key.decode(), read_message(value)
            shard = f"{index.stem}.data-{number(entry, 3):05d}-of-{n_shards:05d}"
            tensors[name] = stored_tensor(name, entry, file_beside(index, shard))
    return tensors


def stored_tensor(name: str, entry: dict[int, list], file: Path) -> StoredTensor:
    """From a BundleEntryProto: 1 dtype, 2 shape, 3 shard, 4 offset, 5 size, 6 crc32c, 7 slices."""
    code = number(entry, 1)
    if code not in DTYPES or 7 in entry:
        return StoredTensor(file, (), partial(refuse, file, name))  # a counter of steps, say
    dtype = DTYPES[code]
    dimensions = [read_message(dim) for dim in read_message(entry.get(2, [b""])[-1]).get(2, [])]
    shape = tuple(number(dim, 1) for dim in dimensions)
    offset, size = number(entry, 4), number(entry, 5)
    if any(length < 0 for length in shape) or offset < 0:
        raise CheckpointError(f"{name} has an impossible shape {shape} or place {offset}")
    count = 1
    for length in shape:
        count *= length
    if count * dtype.itemsize != size or offset + size > file.stat().st_size:
        raise CheckpointError(
            f"{name}, {size} bytes for the shape {shape}, does not fit into {file.name}"
        )
    read = partial(read_array, file, name, dtype, shape, offset, number(entry, 6))
    return StoredTensor(file, shape, read)


def refuse(file: Path, name: str) -> Tensor:
    raise CheckpointError(f"{file}: {name} holds no weights: expected floats of 16, 32 or 64 bits")


def read_array(
    file: Path, name: str, dtype: np.dtype, shape: tuple[int, ...], offset: int, checksum: int
) -> Tensor:
    """Map one tensor's part of a data file, and verify it."""
    if 0 in shape:
        return torch.empty(shape)
    array = np.memmap(file, dtype, mode="c", offset=offset, shape=shape)
    if masked_crc32c(array) != checksum:
        raise CheckpointError(
            f"{file}: {name} is damaged, its checksum is not the one in the index: "
            "download the file again"
        )
    return torch.from_numpy(array)


# ---- the table


def read_table(data: bytes) -> dict[bytes, bytes]:
    """All keys and values of a LevelDB table.

    The footer points to a block that lists the others: name of its last key -> where it is.
    """
    if len(data) < FOOTER_SIZE or int.from_bytes(data[-8:], "little") != MAGIC:
        raise ValueError("it is not an index of TensorFlow: its last bytes are others")
    footer = data[-FOOTER_SIZE:]
    extras, at = read_handle(footer, 0)
    blocks, _ = read_handle(footer, at)
    list(read_block(data, *extras))  # there are none; for the checksum
    entries: dict[bytes, bytes] = {}
    end = 0
    for _, value in read_block(data, *blocks):
        (offset, size), _ = read_handle(value, 0)
        if offset < end:  # or a small file could list a block a million times
            raise ValueError("it is damaged: its blocks overlap")
        entries.update(read_block(data, offset, size))
        end = offset + size
    return entries


def read_block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of one block.

    An entry is the number of bytes that its key shares with the key before, the number of other
    bytes, the size of the value, and those bytes and that value. After the last entry stand the
    offsets at which full keys begin, 4 bytes each, and their number.
    """
    end = offset + size
    if end + TRAILER_SIZE > len(data) or size < 4:
        raise ValueError("it is cut off: a block lies beyond its end")
    if data[end]:
        raise ValueError("it is compressed; TensorFlow writes it plain")
    if masked_crc32c(data[offset : end + 1]) != int.from_bytes(data[end + 1 : end + 5], "little"):
        raise ValueError("it is damaged: the checksum of a block is wrong")
    end -= 4 + 4 * int.from_bytes(data[end - 4 : end], "little")
    at, key = offset, b""
    while at < end:
        shared, at = read_varint(data, at)
        others, at = read_varint(data, at)
        length, at = read_varint(data, at)
        key = key[:shared] + data[at : at + others]
        at += others
        if len(key) > LONGEST_NAME:
            raise ValueError("it is damaged: a name has more than a thousand bytes")
        yield key, data[at : at + length]
        at += length


def read_handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """((offset, size) of a block, the place after them)."""
    offset, at = read_varint(data, at)
    size, at = read_varint(data, at)
    return (offset, size), at


# ---- protocol buffers


def read_message(data: bytes) -> dict[int, list]:
    """The fields of a message: number -> values, each a whole number or bytes."""
    fields: dict[int, list] = {}
    at, value = 0, None  # type: int, int | bytes | None
    while at < len(data):
        tag, at = read_varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = read_varint(data, at)
        elif kind in (1, 5):  # 8 or 4 bytes
            size = 8 if kind == 1 else 4
            value, at = int.from_bytes(data[at : at + size], "little"), at + size
        elif kind == 2:  # bytes: a string or a message
            size, at = read_varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"a message has a field of the unknown kind {kind}")
        if at > len(data):
            raise ValueError("a message is cut off")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def number(fields: dict[int, list], field: int) -> int:
    """A field that holds a whole number: the last one written counts, and none is 0."""
    value = fields.get(field, [0])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {field} of a message is no number")
    return value - 2**64 if value >= 2**63 else value


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(a whole number, the place after it): seven bits a byte, the lowest first; a set eighth bit
    says that more follow."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise ValueError("a number is cut off")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
    raise ValueError("a number has more than 64 bits")


def masked_crc32c(data: bytes | np.ndarray) -> int:
    """The CRC-32C as LevelDB stores it: rotated and shifted, so that the checksum of data with
    checksums in it stays a good one (leveldb, util/crc32c.h)."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
