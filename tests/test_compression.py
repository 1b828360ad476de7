"""Compressed files are read as the formats' own tools read them."""

import bz2
import gzip
import lzma
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from pipelines.compression import open_stored

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CONTENT = "".join(f"line {i} of many\n" for i in range(30_000)).encode()
WRITERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\0\0\0\x01\x02\x03\x04"


def content_of(path: Path, stored: bytes) -> bytes:
    path.write_bytes(stored)
    with open_stored(pafs.LocalFileSystem(), str(path)) as stream:
        return bytes(stream.read())


@pytest.mark.parametrize("ending", WRITERS)
def test_members_and_padding_are_read(tmp_path: Path, ending: str) -> None:
    one = WRITERS[ending](CONTENT)
    path = tmp_path / f"a{ending}"
    assert content_of(path, one) == CONTENT
    assert content_of(path, one + WRITERS[ending](b"") + one) == CONTENT * 2
    assert content_of(path, one + bytes(512)) == CONTENT
    assert content_of(path, one + bytes(8) + one + bytes(2**20)) == CONTENT * 2


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("length", [0.5, 0.9, 1.0])
def test_what_is_cut_short_is_an_error(tmp_path: Path, ending: str, length: float) -> None:
    one = WRITERS[ending](CONTENT)
    with pytest.raises(OSError, match="ends too soon"):
        content_of(tmp_path / f"a{ending}", one[: int(len(one) * length) - 1])


@pytest.mark.parametrize("ending", WRITERS)
def test_what_is_altered_is_an_error(tmp_path: Path, ending: str) -> None:
    one = bytearray(WRITERS[ending](CONTENT))
    one[len(one) // 2] ^= 255
    with pytest.raises(OSError):
        content_of(tmp_path / f"a{ending}", bytes(one))


def test_other_bytes_after_the_end_are_told_as_the_tools_do(tmp_path: Path) -> None:
    """gzip and bzip2 only warn of them."""
    for ending in (".gz", ".bz2"):
        assert content_of(tmp_path / f"a{ending}", WRITERS[ending](CONTENT) + b"x" * 9) == CONTENT
    for ending in (".xz", ".zst"):
        with pytest.raises(OSError, match="what follows the compressed data is none"):
            content_of(tmp_path / f"a{ending}", WRITERS[ending](CONTENT) + b"x" * 9)


def test_zstd_with_skippable_frames_and_a_long_window(tmp_path: Path) -> None:
    one = zstd.compress(CONTENT)
    assert content_of(tmp_path / "a.zst", SKIPPABLE + one + SKIPPABLE + one) == CONTENT * 2
    long = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 28})
    stored = long.compress(CONTENT) + long.flush()  # without its size, the window is the setting's
    with (
        pytest.raises(OSError, match="too much memory"),
        pa.input_stream(pa.BufferReader(stored), compression="zstd") as stream,
    ):
        stream.read()
    assert content_of(tmp_path / "a.zstd", stored) == CONTENT


def test_lz4_and_plain_files(tmp_path: Path) -> None:
    with pa.output_stream(str(tmp_path / "b.lz4"), compression="lz4") as stream:
        stream.write(CONTENT)
    assert content_of(tmp_path / "a.lz4", (tmp_path / "b.lz4").read_bytes()) == CONTENT
    assert content_of(tmp_path / "a.txt", CONTENT) == CONTENT
