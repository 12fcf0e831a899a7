"""The matches of a query in a store as one self-contained HTML page."""

from dataclasses import dataclass
from pathlib import Path

from cachefuse.alignment.retrieve import QueryResult
from cachefuse.data.column import Source, as_text
from cachefuse.data.dataset import Dataset
from cachefuse.errors import BadSampleError
from cachefuse.output import check_output, write_output
from cachefuse.report.gallery import PICTURED, lines_of, picture_of, thumbnail
from cachefuse.report.render import render

TEMPLATE = "matches.html.j2"
MAX_CAPTIONS = 2  # shown with a matched image


@dataclass(frozen=True)
class Hit:
    """A match on the page: the matched text, or an image's captions; its picture, or the reason ``missing`` it."""

    id: str
    cosine: float
    texts: tuple[str, ...]
    picture: str
    missing: str


def write_matches(
    result: QueryResult, path: Path, space_name: str, dataset: Dataset, query_image: Source | None = None
) -> Path:
    """Write the page of ``matches_html`` to a file, and return its path.

    Raises ConfigError if the path is a folder or its folder is missing.
    """
    check_output(path)
    write_output(path, matches_html(result, space_name, dataset, query_image).encode())
    return path


def matches_html(result: QueryResult, space_name: str, dataset: Dataset, query_image: Source | None = None) -> str:
    """Return a query's matches as one HTML page: the same matches give the same page.

    ``dataset`` is the raw data, in which samples are looked up by id; ``query_image`` is an image query's source. Names
    and texts from data are escaped.
    """
    rows = {sample: row for row, sample in enumerate(dataset.ids)}
    picture, missing = "", ""
    if query_image is not None:
        try:
            picture = thumbnail(query_image)
        except BadSampleError as error:
            missing = str(error)
    context = {
        "query": result.query if query_image is None else Path(result.query).name,
        "picture": picture,
        "missing": missing,
        "by_image": query_image is not None,
        "noun": result.modality + "s" * (len(result.matches) != 1),
        "modality": result.modality,
        "space": space_name,
        "dataset": dataset.manifest.title or dataset.name,
        "hits": [_hit(result, i, dataset, rows) for i in range(len(result.matches))],
    }
    return render(TEMPLATE, context)


def _hit(result: QueryResult, i: int, dataset: Dataset, rows: dict[str, int]) -> Hit:
    match = result.matches[i]
    row = rows.get(match.id)
    texts = lines_of(dataset, row)[:MAX_CAPTIONS]
    if result.modality != PICTURED:
        texts = tuple(map(as_text, dataset.sources(result.modality, row)[match.item : match.item + 1]))
    return Hit(match.id, match.score, texts, *picture_of(dataset, row))
