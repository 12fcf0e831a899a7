"""Zero-shot classification: predict the class whose prompt is nearest to the image."""

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
from cachefuse.printable import listed
from cachefuse.store.store import FeatureStore
from cachefuse.threads import idle_threads

PROMPT = "a photo of a {}"
TOP = 5
PIECE = 4096


@dataclass(frozen=True)
class ZeroShot:
    """By split: the number of images, and the top-k accuracy for k from 1 to 5.

    ``by_class`` is the accuracy (C,) over all evaluated splits; NaN for a class without images.
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
    """Classify a store's labelled images by the nearest class prompt, and return the accuracy.

    ``classes`` are names for the prompts instead of the dataset's class names, in the same order. With several prompts
    a class is the mean of its texts' vectors (arXiv 2103.00020, section 3.1.4). Raises ConfigError for a dataset that
    is not multi-class, another number of classes, or a prompt without {}; DataError if there are no labelled images.
    """
    if store.manifest.task != "multiclass":
        raise ConfigError(
            f"zero-shot needs a multi-class dataset; the task of {store.dataset} is {store.manifest.task}"
        )
    names = tuple(classes) or tuple(name.replace("_", " ") for name in store.classes)
    if len(names) != len(store.classes):
        raise ConfigError(f"{store.dataset} has {len(store.classes)} classes. Got {len(names)} names instead")
    for prompt in prompts:
        if "{}" not in prompt:
            raise ConfigError(f"a prompt must have {{}} where the class goes. Got {prompt!r} instead")
    if not prompts:
        raise ConfigError("zero-shot needs at least one prompt")
    usable = is_labelled(store.targets) & store.present("image")
    splits = [split] if split is not None else ordered_splits(store.splits[usable])
    counts = {name: int((usable & (store.splits == name)).sum()) for name in splits}
    if not counts or not all(counts.values()):
        known = listed(ordered_splits(store.splits[usable])) or "none"
        which = f" in split {split!r}" if split is not None else ""
        raise DataError(f"{store.dataset} has no labelled images{which}; splits with some: {known}")
    texts = [prompt.replace("{}", name) for name in names for prompt in prompts]
    vectors = F.normalize(space.embed("text", texts), dim=1, eps=TINY_NORM)  # (C * P, W)
    by_class = F.normalize(vectors.unflatten(0, (len(names), -1)).mean(1), dim=1, eps=TINY_NORM)  # (C, W)
    rows = space.stored(store, "image", on_rows).rows()
    ranks = np.zeros(len(store), np.int64)
    targets = torch.from_numpy(store.targets).long()
    for start, block in rows.in_order(PIECE):
        scores = block.float() @ by_class.T  # (n, C); an image's length does not change the order of its classes
        true = scores.gather(1, targets[start : start + len(block)].clamp(min=0)[:, None])
        # Among equal scores, or NaN, the true class ranks last.
        ranks[start : start + len(block)] = (~(scores < true)).sum(1).numpy()
    evaluated = usable & np.isin(store.splits, splits)
    right = ranks == 1
    return ZeroShot(
        classes=names,
        prompts=tuple(prompts),
        n_images=counts,
        accuracy={
            name: tuple(
                float((ranks[usable & (store.splits == name)] <= k).mean()) for k in range(1, min(TOP, len(names)) + 1)
            )
            for name in splits
        },
        by_class=tuple(
            float(right[of_class].mean()) if (of_class := evaluated & (store.targets == c)).any() else float("nan")
            for c in range(len(names))
        ),
    )
