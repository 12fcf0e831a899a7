"""How a store is laid out: names, block sizes and the provenance key."""

import hashlib
import json
from collections.abc import Mapping

FORMAT = 1  # of the store; a reader refuses what it does not know
BLOCK_BYTES = 32 << 20  # the most that one block of a view holds
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 64, 4096
CHUNKS_PER_BLOCK = 16
DTYPES = {"float16": "<f2", "float32": "<f4"}


def block_rows(n_rows: int, row_bytes: int) -> int:
    """Return how many rows make a block: a power of two, so that a block's bytes fill whole pages.

    A block is what a resumed extraction may have to do again, so a small dataset has small ones.
    """
    fitting = max(1, min(MAX_BLOCK_ROWS, BLOCK_BYTES // max(1, row_bytes)))
    wanted = max(MIN_BLOCK_ROWS, n_rows // 16)
    return 1 << (min(fitting, wanted).bit_length() - 1)


def chunk_rows(rows: int) -> int:
    """Return the rows of one inner chunk of a block (a shard)."""
    return max(1, rows // CHUNKS_PER_BLOCK)


def provenance_key(provenance: Mapping[str, str]) -> str:
    """Hash what the features depend on. Same key: the same features."""
    canonical = json.dumps(dict(sorted(provenance.items())), ensure_ascii=False)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def differing_fields(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return the provenance fields that differ, sorted."""
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
