"""TFRecord files without TensorFlow: framing, checksums and random access.

A file is a sequence of records, each `u64 length | u32 masked crc32c(length) | payload | u32 masked crc32c(payload)`,
little endian (https://www.tensorflow.org/tutorials/load_data/tfrecord, section "TFRecords format details").
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import google_crc32c

from prismatic.evidence.files import replacing
from prismatic.vla.datasets.source import DataSetError

_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
HEADER_BYTES = _LENGTH.size + _CRC.size
FOOTER_BYTES = _CRC.size


class CorruptRecordError(DataSetError):
    """A record whose bytes do not agree with its framing, its checksum or its declared content."""


@dataclass(frozen=True)
class RecordSpan:
    """Place of one payload: record number in the file, byte offset of the record, payload length in bytes."""

    number: int
    offset: int
    length: int


def masked_crc32c(data: bytes) -> int:
    """CRC32C of `data`, rotated right by 15 bits plus 0xa282ead8 modulo 2**32 (the TFRecord masking)."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame_record(payload: bytes) -> bytes:
    """The bytes of one complete record holding `payload`."""
    length = _LENGTH.pack(len(payload))
    return b"".join((length, _CRC.pack(masked_crc32c(length)), payload, _CRC.pack(masked_crc32c(payload))))


def write_records(path: str | os.PathLike, payloads: Iterable[bytes]) -> list[RecordSpan]:
    """Write `payloads` as a TFRecord file in one go; returns the span of each record."""
    spans: list[RecordSpan] = []
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        for payload in payloads:
            spans.append(RecordSpan(len(spans), stream.tell(), len(payload)))
            stream.write(frame_record(payload))
    return spans


def index_records(path: str | os.PathLike) -> list[RecordSpan]:
    """Spans of all records of a file, reading the 12-byte headers only.

    Raises FileNotFoundError for a missing file and CorruptRecordError (file, record number, offset) for a wrong
    length checksum or a file that ends inside a record.
    """
    return list(iter_spans(path))


def iter_spans(path: str | os.PathLike) -> Iterator[RecordSpan]:
    """Spans of the records one after another; raises as `index_records`, after the records before the damage."""
    path = Path(path)
    size = path.stat().st_size
    number = offset = 0
    with open(path, "rb") as stream:
        while offset < size:
            stream.seek(offset)
            length = _parse_header(stream.read(HEADER_BYTES), path, number, offset)
            end = offset + HEADER_BYTES + length + FOOTER_BYTES
            if end > size:
                raise CorruptRecordError(
                    f"{path}: record {number} at offset {offset} is truncated: "
                    f"it should end at byte {end}, the file has {size} bytes"
                )
            yield RecordSpan(number, offset, length)
            number, offset = number + 1, end


def read_record(path: str | os.PathLike, span: RecordSpan) -> bytes:
    """Payload of one record, checked against its length and checksum (CorruptRecordError otherwise)."""
    with open(path, "rb") as stream:
        return _read_span(stream, Path(path), span)


def iter_records(path: str | os.PathLike) -> Iterator[bytes]:
    """Payloads of a file in order, each checked as in `read_record`."""
    spans = index_records(path)
    with open(path, "rb") as stream:
        for span in spans:
            yield _read_span(stream, Path(path), span)


def _read_span(stream: BinaryIO, path: Path, span: RecordSpan) -> bytes:
    stream.seek(span.offset)
    where = f"{path}: record {span.number} at offset {span.offset}"
    length = _parse_header(stream.read(HEADER_BYTES), path, span.number, span.offset)
    if length != span.length:
        raise CorruptRecordError(f"{where} has length {length}, expected {span.length}: the file was changed")
    body = stream.read(length + FOOTER_BYTES)
    if len(body) != length + FOOTER_BYTES:
        raise CorruptRecordError(f"{where} is truncated: {len(body)} bytes left, expected {length + FOOTER_BYTES}")
    payload = body[:length]
    (stored,) = _CRC.unpack_from(body, length)
    computed = masked_crc32c(payload)
    if stored != computed:
        raise CorruptRecordError(f"{where} has a corrupt payload: checksum {computed:#010x}, stored {stored:#010x}")
    return payload


def _parse_header(header: bytes, path: Path, number: int, offset: int) -> int:
    where = f"{path}: record {number} at offset {offset}"
    if len(header) != HEADER_BYTES:
        raise CorruptRecordError(f"{where} is truncated: header has {len(header)} bytes, expected {HEADER_BYTES}")
    (length,) = _LENGTH.unpack_from(header, 0)
    (stored,) = _CRC.unpack_from(header, _LENGTH.size)
    computed = masked_crc32c(header[: _LENGTH.size])
    if stored != computed:
        raise CorruptRecordError(f"{where} has a corrupt length: checksum {computed:#010x}, stored {stored:#010x}")
    return length
