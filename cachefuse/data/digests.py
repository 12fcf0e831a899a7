"""Fingerprints of content: equal for equal content, on every machine."""

import hashlib
from typing import BinaryIO

PIECE = 1 << 20  # bytes of a file that are in memory


def hash_parts(*parts: str | bytes) -> str:
    """Return 16 hexadecimal characters of BLAKE2b over the parts, their order, number and lengths."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        # Lone surrogates, from odd JSON and file names, have no plain UTF-8.
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(b"%d:" % len(data))  # so that ("a", "b") differs from ("ab",)
        digest.update(data)
    return digest.hexdigest()


def hash_file(kind: str, file: BinaryIO, n_bytes: int) -> str:
    """Return what ``hash_parts(kind, all of the file)`` does, without all of it in memory."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(b"%d:%s%d:" % (len(kind.encode()), kind.encode(), n_bytes))
    n_read = 0
    while piece := file.read(PIECE):
        digest.update(piece)
        n_read += len(piece)
    if n_read == n_bytes:
        return digest.hexdigest()
    file.seek(0)  # it changes meanwhile, or its system does not know its size
    return hash_parts(kind, file.read())
