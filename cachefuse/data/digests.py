"""Fingerprints of content: equal for equal content, on every machine."""

import hashlib


def hash_parts(*parts: str | bytes) -> str:
    """Return 16 hexadecimal characters of BLAKE2b over the parts, their order, number and lengths."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        # Lone surrogates, from odd JSON and file names, have no plain UTF-8.
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(b"%d:" % len(data))  # so that ("a", "b") differs from ("ab",)
        digest.update(data)
    return digest.hexdigest()
