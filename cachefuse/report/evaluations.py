"""The evaluations that a report shows: of the run, and of the run without each of its modalities."""

from collections.abc import Callable
from functools import partial

from cachefuse.errors import RunError
from cachefuse.runs.evaluate import Evaluation, evaluate
from cachefuse.runs.run import Run
from cachefuse.store.store import FeatureStore

OnProgress = Callable[[str, int, int], None]


def evaluate_for_report(
    run: Run, store: FeatureStore, split: str | None, device: str, on_progress: OnProgress
) -> tuple[Evaluation | None, dict[str, Evaluation], str]:
    """Return the evaluation of a labelled split, by default of the held-out rows; None if there are none.

    Also return the evaluations without each modality, or the reason why there are none. Raises as ``evaluate`` does.
    """
    if split is None and run.held_out is None:
        return None, {}, ""
    evaluate_split = partial(evaluate, run, store, split, device=device)
    evaluation = evaluate_split(on_progress=partial(on_progress, "intervals"))
    without: dict[str, Evaluation] = {}
    why_not = f"The run reads only {run.modalities[0]}: there is nothing to leave out."
    try:
        for modality in run.modalities if len(run.modalities) > 1 else ():
            on_progress(f"without {modality}", len(without), len(run.modalities))
            without[modality] = evaluate_split(without=[modality], n_resamples=0)
    except RunError as error:  # the run has no models that have not seen the held-out rows, only their scores
        why_not = f"This is unknown: {error}."
    return evaluation, without, why_not
