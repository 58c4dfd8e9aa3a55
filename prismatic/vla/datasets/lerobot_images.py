"""Images in parquet columns {bytes, path}, copied to a file per camera beside the index."""

from __future__ import annotations

import os
from pathlib import Path

from prismatic.vla.datasets.index_reader import EpisodeIndex
from prismatic.vla.datasets.lerobot_tables import parquet
from prismatic.vla.datasets.source import DataSetError
from prismatic.vla.datasets.source_files import check_image


def embedded_images(column, where: str) -> list[bytes]:
    """Bytes of the images of a struct column {bytes, path}."""
    import pyarrow as pa

    with parquet(where):
        column.validate(full=True)
        if not isinstance(column, pa.StructArray) or column.type.get_field_index("bytes") < 0:
            raise DataSetError(f"{where}: {column.type}, expected struct<bytes: binary, path: string>")
        data = column.field("bytes").to_pylist()
    if not all(isinstance(entry, bytes) for entry in data):
        raise DataSetError(f"{where}: images without bytes, expected them in the column (not as separate files)")
    return data


class Blob:
    """The images of one camera one after another in a file."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.name, self.size, self._shape = path.name, 0, shape
        self._file = path.open("wb")

    def append(self, image: bytes, where: str) -> tuple[int, int]:
        """Offset and size of the image, which is checked as far as possible without decoding it."""
        check_image(image, self._shape, where)
        self._file.write(image)
        self.size += len(image)
        return self.size - len(image), len(image)

    def close(self) -> None:
        self._file.close()


def blobs_are_whole(index: EpisodeIndex) -> bool:
    """Whether the files of images beside an index are there, each with the size it was written with."""
    for name, size in index.info["blobs"].values():
        if not os.path.isfile(index.folder / name) or (index.folder / name).stat().st_size != size:
            return False
    return True
