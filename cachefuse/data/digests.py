"""Fingerprints: equal where the content is equal, wherever and whenever it is read."""

import hashlib


def hash_parts(*parts: str | bytes) -> str:
    """Return 16 hexadecimal characters of BLAKE2b over the parts, their order, number and borders included."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        # Lone surrogates, of odd JSON and of file names, have no plain UTF-8.
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(b"%d:" % len(data))  # without it ("a", "b") would be ("ab",)
        digest.update(data)
    return digest.hexdigest()
