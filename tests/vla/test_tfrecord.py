import pytest

from prismatic.vla.datasets.tfrecord import (
    CorruptRecordError,
    index_records,
    iter_records,
    masked_crc32c,
    read_record,
    write_records,
)

PAYLOADS = [b"first", b"", b"third" * 1000]


@pytest.fixture
def record_file(tmp_path):
    path = tmp_path / "records"
    write_records(path, PAYLOADS)
    return path


def flip_byte(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x01
    path.write_bytes(bytes(data))


def test_masked_crc_of_known_vector():
    # CRC32C("123456789") = 0xE3069283 (RFC 3720 family check value); the mask is applied by hand.
    crc = 0xE3069283
    expected = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    assert masked_crc32c(b"123456789") == expected


def test_round_trip_and_random_access(record_file):
    spans = index_records(record_file)
    assert list(iter_records(record_file)) == PAYLOADS
    assert [read_record(record_file, span) for span in reversed(spans)] == PAYLOADS[::-1]
    assert [path.name for path in record_file.parent.iterdir()] == ["records"]


def test_failed_writing_leaves_nothing(tmp_path):
    def payloads():
        yield b"one"
        raise RuntimeError("collector failed")

    with pytest.raises(RuntimeError):
        write_records(tmp_path / "records", payloads())
    assert list(tmp_path.iterdir()) == []


def test_corrupt_payload_names_file_record_and_offset(record_file):
    span = index_records(record_file)[2]
    flip_byte(record_file, span.offset + 20)
    assert read_record(record_file, index_records(record_file)[0]) == PAYLOADS[0]
    with pytest.raises(CorruptRecordError, match=rf"records: record 2 at offset {span.offset} .*checksum"):
        read_record(record_file, span)


def test_corrupt_length_is_found_when_indexing(record_file):
    span = index_records(record_file)[1]
    flip_byte(record_file, span.offset)
    with pytest.raises(CorruptRecordError, match=rf"record 1 at offset {span.offset} .*corrupt length"):
        index_records(record_file)


@pytest.mark.parametrize("missing_bytes", [1, 4, 5002])
def test_truncation_is_found_when_indexing(record_file, missing_bytes):
    span = index_records(record_file)[2]
    record_file.write_bytes(record_file.read_bytes()[:-missing_bytes])
    with pytest.raises(CorruptRecordError, match=rf"record 2 at offset {span.offset} is truncated"):
        index_records(record_file)


def test_truncation_inside_a_header(record_file):
    span = index_records(record_file)[2]
    record_file.write_bytes(record_file.read_bytes()[: span.offset + 3])
    with pytest.raises(CorruptRecordError, match="header has 3 bytes"):
        index_records(record_file)
