"""How much is tried: a little by default, more in the slow tests, all where CACHEFUSE_ATTACK says so.

``CACHEFUSE_ATTACK=1.0`` means 1,000 kills, 1,000 faults and 10,000 hostile files. ``CACHEFUSE_ATTACK_SEED`` chooses
which.
"""

import os

SCALE = float(os.environ.get("CACHEFUSE_ATTACK", "0"))
SEED = int(os.environ.get("CACHEFUSE_ATTACK_SEED", "0"))


def size(whole: int, small: int) -> int:
    """Return how many cases to try, of ``whole`` in the long form; ``small`` without the environment's variable."""
    return max(1, round(whole * SCALE)) if SCALE else small
