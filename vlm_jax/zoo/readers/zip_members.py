"""Finds the members of a zip archive in its file."""

import dataclasses
import struct
import zipfile
import zlib

from vlm_jax.errors import UserError
from vlm_jax.zoo.readers.stored import RegularFile, error_text

_DEFLATE_RATIO = 1032  # the largest compression ratio of deflate (zlib's technical details)

# Errors of zipfile on damaged or malicious archives.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    IndexError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


@dataclasses.dataclass(frozen=True)
class Member:
    """One file of the archive.

    Attributes:
      name: its path in the archive.
      size: bytes when unpacked, as declared.
      offset: first byte in the archive if the member is stored; None if the member is compressed.
    """

    file: RegularFile
    name: str
    size: int
    offset: int | None

    def read(self, size: int) -> bytes:
        """Returns the first bytes, at most `size`."""
        buffer = bytearray(min(size, self.size))
        return bytes(buffer[: self.read_into(buffer)])

    def read_into(self, buffer) -> int:
        """Unpacks the beginning of the member into a writable buffer; returns the number of bytes."""
        view, done = memoryview(buffer), 0
        if self.offset is not None:
            view[:] = self.file.read(self.offset, len(view))
            return len(view)
        try:
            with self.file.open() as handle, zipfile.ZipFile(handle) as archive, archive.open(self.name) as member:
                while done < len(view) and (count := member.readinto(view[done:])):
                    done += count
        except UserError:
            raise
        except _DAMAGE as error:
            raise _damaged(self.file, error) from error
        return done


def zip_members(file: RegularFile) -> dict[str, Member]:
    """Returns the archive's members by name, in order.

    Raises:
      UserError: the archive is damaged, a name occurs twice, or a member is encrypted, packed by anything but
        deflate, or reaches out of the file.
    """
    try:
        with file.open() as handle, zipfile.ZipFile(handle) as archive:
            infos = archive.infolist()
            members = {info.filename: _member(file, handle, info) for info in infos if not info.is_dir()}
            if len(members) != sum(not info.is_dir() for info in infos):
                raise UserError(f"{file.path} has two members of one name; it is damaged, make it again")
    except UserError:
        raise
    except _DAMAGE as error:
        raise _damaged(file, error) from error
    return members


def _member(file: RegularFile, handle, info: zipfile.ZipInfo) -> Member:
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{file.path}: `{info.filename}` is encrypted or packed in a way that no checkpoint is")
    # The local header (APPNOTE 4.3.7): its name and extra field may be longer than the directory's.
    handle.seek(info.header_offset)
    header = handle.read(30)
    if header[:4] != b"PK\x03\x04" or len(header) < 30:
        raise zipfile.BadZipFile(f"`{info.filename}` is not where the directory says")
    offset = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if offset + info.compress_size > file.size or info.file_size >= 1 << 62:
        raise zipfile.BadZipFile(f"`{info.filename}` reaches out of the file")
    if info.file_size > _DEFLATE_RATIO * info.compress_size + 1024:
        raise zipfile.BadZipFile(f"`{info.filename}` declares {info.file_size:,} bytes, more than it can unpack to")
    if info.compress_type == zipfile.ZIP_DEFLATED:
        return Member(file, info.filename, info.file_size, None)
    if info.compress_size != info.file_size:
        raise zipfile.BadZipFile(f"`{info.filename}` has two sizes")
    return Member(file, info.filename, info.file_size, offset)


def _damaged(file: RegularFile, error: Exception) -> UserError:
    return UserError(f"{file.path} is a truncated or damaged zip archive ({error_text(error)}); download it again")
