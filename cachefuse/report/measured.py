"""What a report measures: how well the run does on rows that it names, and without each of its modalities."""

from collections.abc import Callable
from functools import partial

from cachefuse.errors import RunError
from cachefuse.runs.evaluate import Evaluation, evaluate
from cachefuse.runs.run import Run
from cachefuse.store.store import FeatureStore

OnProgress = Callable[[str, int, int], None]


def measure(
    run: Run, store: FeatureStore, split: str | None, device: str, on_progress: OnProgress
) -> tuple[Evaluation | None, dict[str, Evaluation], str]:
    """Return the evaluation of a labelled split, by default of the rows held out; None if there are none of those.

    With it come those with one modality taken as absent, or the reason that there are none. Raises as ``evaluate``
    does.
    """
    if split is None and run.held_out is None:
        return None, {}, ""
    measured = partial(evaluate, run, store, split, device=device)
    evaluation = measured(on_progress=partial(on_progress, "intervals"))
    without: dict[str, Evaluation] = {}
    why_not = f"The run reads only {run.modalities[0]}: there is nothing to leave out."
    try:
        for modality in run.modalities if len(run.modalities) > 1 else ():
            on_progress(f"without {modality}", len(without), len(run.modalities))
            without[modality] = measured(without=[modality], n_resamples=0)
    except RunError as error:  # models that have seen the rows held out, where other models' scores of them are kept
        why_not = f"This can't be told: {error}."
    return evaluation, without, why_not
