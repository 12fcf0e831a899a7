"""What a text or an image found in a store, as one HTML page that needs nothing else."""

from dataclasses import dataclass
from pathlib import Path

from cachefuse.alignment.retrieve import QueryResult
from cachefuse.data.column import Source, as_text
from cachefuse.data.dataset import Dataset
from cachefuse.errors import BadSampleError
from cachefuse.files import write_atomically
from cachefuse.report.gallery import PICTURED, lines_of, picture_of, thumbnail
from cachefuse.report.render import check_target, render

TEMPLATE = "found.html.j2"
MAX_CAPTIONS = 2  # shown with a found image


@dataclass(frozen=True)
class Hit:
    """A match as it looks and reads: the text that was found, or captions of an image; its picture, or why none."""

    id: str
    cosine: float
    texts: tuple[str, ...]
    picture: str
    missing: str


def write_found(
    found: QueryResult, path: Path, space_name: str, dataset: Dataset, query_image: Source | None = None
) -> Path:
    """Write what was found as a page, whole or not at all, and return its path. The rest is as in ``found_html``.

    Raises ConfigError if there can be no such file.
    """
    check_target(path)
    write_atomically(path, found_html(found, space_name, dataset, query_image).encode())
    return path


def found_html(found: QueryResult, space_name: str, dataset: Dataset, query_image: Source | None = None) -> str:
    """Return what was found as one HTML page: the same matches give the same page.

    ``dataset`` is the raw data, in which samples are looked up by their ids; ``query_image`` is the query, if it is an
    image. Names and texts from data are escaped.
    """
    rows = {sample: row for row, sample in enumerate(dataset.ids)}
    picture, missing = "", ""
    if query_image is not None:
        try:
            picture = thumbnail(query_image)
        except BadSampleError as error:
            missing = str(error)
    context = {
        "query": found.query if query_image is None else Path(found.query).name,
        "picture": picture,
        "missing": missing,
        "by_image": query_image is not None,
        "noun": found.modality + "s" * (len(found.matches) != 1),
        "modality": found.modality,
        "space": space_name,
        "dataset": dataset.manifest.title or dataset.name,
        "hits": [_hit(found, place, dataset, rows) for place in range(len(found.matches))],
    }
    return render(TEMPLATE, context)


def _hit(found: QueryResult, place: int, dataset: Dataset, rows: dict[str, int]) -> Hit:
    match = found.matches[place]
    row = rows.get(match.id)
    texts = lines_of(dataset, row)[:MAX_CAPTIONS]
    if found.modality != PICTURED:
        texts = tuple(map(as_text, dataset.sources(found.modality, row)[match.item : match.item + 1]))
    return Hit(match.id, match.score, texts, *picture_of(dataset, row))
