"""Zero-shot classification: the class whose name, in a sentence, is nearest to the image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from cachefuse.alignment.space import OnRows, Space, silent
from cachefuse.data.splits import ordered_splits
from cachefuse.data.targets import is_labelled
from cachefuse.errors import ConfigError, DataError
from cachefuse.nn.losses import TINY_NORM
from cachefuse.store.store import FeatureStore
from cachefuse.threads import idle_threads

PROMPT = "a photo of a {}"
TOP = 5
PIECE = 4096


@dataclass(frozen=True)
class ZeroShot:
    """By split: the images, and the share of them whose class is among the k likeliest, for k from 1 to 5.

    ``by_class`` is the accuracy (C,) over all splits measured; NaN for a class without images.
    """

    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    n_images: dict[str, int]
    accuracy: dict[str, tuple[float, ...]]
    by_class: tuple[float, ...]

    @property
    def chance(self) -> float:
        return 1 / len(self.classes)


@idle_threads()
def zero_shot(
    space: Space,
    store: FeatureStore,
    *,
    classes: Sequence[str] = (),
    prompts: Sequence[str] = (PROMPT,),
    split: str | None = None,
    on_rows: OnRows = silent,
) -> ZeroShot:
    """Classify a store's labelled images by the texts nearest to them, and measure it.

    ``classes`` are names to put in the prompts in place of the dataset's, in their order. With several prompts a class
    is the mean of its texts (arXiv 2103.00020, section 3.1.4). Raises ConfigError for a dataset that is not
    multi-class, another number of classes, or a prompt without {}; DataError without labelled images.
    """
    if store.manifest.task != "multiclass":
        raise ConfigError(f"zero-shot takes a multi-class dataset; {store.dataset} is one for {store.manifest.task}")
    names = tuple(classes) or tuple(name.replace("_", " ") for name in store.classes)
    if len(names) != len(store.classes):
        raise ConfigError(f"{store.dataset} has {len(store.classes)} classes. Got {len(names)} names instead")
    for prompt in prompts:
        if "{}" not in prompt:
            raise ConfigError(f"a prompt must have {{}} where the class goes. Got {prompt!r} instead")
    if not prompts:
        raise ConfigError("zero-shot needs at least one prompt")
    here = is_labelled(store.targets) & store.present("image")
    splits = [split] if split is not None else ordered_splits(store.splits[here])
    counts = {name: int((here & (store.splits == name)).sum()) for name in splits}
    if not counts or not all(counts.values()):
        known = ", ".join(ordered_splits(store.splits[here])) or "none"
        which = f" in split {split!r}" if split is not None else ""
        raise DataError(f"{store.dataset} has no labelled images{which}; splits with some: {known}")
    texts = [prompt.replace("{}", name) for name in names for prompt in prompts]
    vectors = F.normalize(space.embed("text", texts), dim=1, eps=TINY_NORM)  # (C * P, W)
    by_class = F.normalize(vectors.unflatten(0, (len(names), -1)).mean(1), dim=1, eps=TINY_NORM)  # (C, W)
    rows = space.stored(store, "image", on_rows).rows()
    ranks = np.zeros(len(store), np.int64)
    targets = torch.from_numpy(store.targets).long()
    for start, part in rows.in_order(PIECE):
        scores = part.float() @ by_class.T  # (n, C); an image's length does not change the order of its classes
        own = scores.gather(1, targets[start : start + len(part)].clamp(min=0)[:, None])
        ranks[start : start + len(part)] = (
            (~(scores < own)).sum(1).numpy()
        )  # of equal scores, or none (NaN), one's own is last
    measured = here & np.isin(store.splits, splits)
    right = ranks == 1
    return ZeroShot(
        classes=names,
        prompts=tuple(prompts),
        n_images=counts,
        accuracy={
            name: tuple(
                float((ranks[here & (store.splits == name)] <= k).mean()) for k in range(1, min(TOP, len(names)) + 1)
            )
            for name in splits
        },
        by_class=tuple(
            float(right[mine].mean()) if (mine := measured & (store.targets == c)).any() else float("nan")
            for c in range(len(names))
        ),
    )
