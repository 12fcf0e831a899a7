import csv
import io
import os
import random
import re
from pathlib import Path

import pytest

from cachefuse.data.dataset import load_dataset
from cachefuse.data.manifest import load_manifest
from cachefuse.data.readers.csv_text import read_csv
from cachefuse.errors import DataError
from fixtures.messages import naming

HEADER = "ImageID,Labels,Caption\n"


def read(text, delimiter=",", n_fields=None):
    return read_csv(io.BytesIO(text.encode()), delimiter, "train.csv", n_fields)


def read_captions(*captions):
    """Read captions written as the competition does: quotes around them, none inside escaped."""
    lines = [f'{i}.jpg,{i} 18,"{caption}"\n' for i, caption in enumerate(captions)]
    rows = read(HEADER + "".join(lines))
    assert rows[0] == ["ImageID", "Labels", "Caption"]
    assert [row[:2] for row in rows[1:]] == [[f"{i}.jpg", f"{i} 18"] for i in range(len(captions))]
    return [row[2] for row in rows[1:]]


@pytest.mark.parametrize(
    "caption",
    [
        'a car passing a stop sign that says "whoa"',
        '"whoa" says a sign',
        'A kitten looking at a screen which reads, "COME DINE WITH ME".',
        'A street sign labeled "Seltzer Way," with a red fire hydrant',
        'Signs reading "Nice Ave", "Sapphire St", and "Pedley" sit on top',
        "Two low tables\nfull of very tidily arranged piles.",
        "\nA caption that starts with a line break",
        '\n\n"Go",\nsays a "man"\n',
        "an exercise w\n\n\n\nA couple of men",
        "",
        " ",
        'a lone " quote',
        "no quotes, but commas, and more",
        '"',
    ],
)
def test_unescaped_caption_comes_back_as_written(caption):
    others = ['the "first" one', "the last, one"]
    assert read_captions(others[0], caption, others[1]) == [others[0], caption, others[1]]
    assert read_captions(others[0], caption) == [others[0], caption]
    assert read_captions(caption, others[0]) == [caption, others[0]]


def test_line_ends_of_any_system():
    text = HEADER + '1.jpg,1,"a "stop" sign\nand a car"\n2.jpg,2,"x"\n'
    expected = read(text)
    assert expected[1:] == [["1.jpg", "1", 'a "stop" sign\nand a car'], ["2.jpg", "2", "x"]]
    assert read(text.replace("\n", "\r\n")) == expected
    assert read(text.replace("\n", "\r")) == expected
    assert read(text.removesuffix("\n")) == expected


def test_blank_lines_and_spaces_after_a_record():
    text = '\n\na,b\n1,"x "y" z" \n\n   \n2,"q"\n\n'
    assert read(text) == [["a", "b"], ["1", 'x "y" z'], ["2", "q"]]


def test_texts_before_labels():
    assert read('text,label\n"a "stop" sign","1"\n"say "hi"","2"\n') == [
        ["text", "label"],
        ['a "stop" sign', "1"],
        ['say "hi"', "2"],
    ]


def test_opening_quote_without_its_pair_takes_no_other_row():
    text = 'image,caption\na.jpg,"Go" says a man\nb.jpg,A dog\nc.jpg,"A man rides\nd.jpg,"Quoted"\n'
    assert read(text)[1:] == [
        ["a.jpg", '"Go" says a man'],
        ["b.jpg", "A dog"],
        ["c.jpg", '"A man rides'],
        ["d.jpg", "Quoted"],
    ]


def test_doubled_quotes_are_undone_beside_unescaped_ones():
    assert read_captions('a ""stop"" sign', 'a "go" sign') == ['a "stop" sign', 'a "go" sign']


@pytest.mark.parametrize(
    ("record", "last"),
    [
        ('2.jpg,"Go" says a man, a dog', '"Go" says a man, a dog'),
        ('2.jpg,"A man, a dog', '"A man, a dog'),
        ('2.jpg,"a "man", a dog"', 'a "man", a dog'),
    ],
)
def test_odd_quotes_explain_commas_in_a_last_field(record, last):
    assert read(f'image,caption\n1.jpg,"x"\n{record}\n3.jpg,"y"\n')[1:] == [
        ["1.jpg", "x"],
        ["2.jpg", last],
        ["3.jpg", "y"],
    ]


def test_tabs_between_texts_with_quote_marks():
    text = 'a\tb\n"Go" says\tx "y"\n"q"\t1\n"a "b" c"\t"d ""e"""\n'
    assert read(text, "\t")[1:] == [['"Go" says', 'x "y"'], ["q", "1"], ['a "b" c', 'd "e"']]


def test_tabs_beside_empty_fields_and_texts_over_lines():
    text = 'a\tb\tc\n"x "y" z"\t\t1\n"two\nlines"\t""\t2\n'
    assert read(text, "\t")[1:] == [['x "y" z', "", "1"], ["two\nlines", "", "2"]]


def test_number_of_fields_without_a_header():
    assert read('1,"x "y" z"\n2,a\n', n_fields=2) == [["1", 'x "y" z'], ["2", "a"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a,b,c\n1,2,3\n4,5\n6,7,"x "y" z"\n', "train.csv 3 2"),
        ("a,b\n1\n", "train.csv 2 1"),
        ("a,b\n1,2\n3,4,5\n", "train.csv line 3 3 2 quotes"),
        ("a,b\n1,2,\n", "train.csv line 2 3 2 quotes"),
        ('a,b,c\n1,2,3\n4,5, 6,"7"\n', "train.csv line 3 4 3 quotes"),
        ('a,b,c\n1,2,3\n4,"5","6","7"\n', "train.csv line 3 4 3 quotes"),
        ('a,b,c\n1,"x "y" z",3\n4,5,6,7\n', "train.csv line 3 4 3 quotes"),
        ('a,b,c\n1,"x "y" z",3,4\n', "train.csv line 2 4 3 quotes"),
        ('a,b\n1,"x "y" z\n', "train.csv 2"),
        ("a,b\n" + '"' * 100_001, "train.csv 2"),
    ],
)
def test_what_can_not_be_read_names_its_line(text, message):
    with pytest.raises(DataError, match=naming(message)):
        read(text)


def random_cell(rng, alphabet):
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(12)))


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_escaped_tables_come_back_as_written(delimiter, line_end):
    rng = random.Random(0)
    for _ in range(100):
        n_rows, n_fields = rng.randrange(1, 6), rng.randrange(1, 5)
        table = [[random_cell(rng, "aé ,\t\"\n\r'\0") for _ in range(n_fields)] for _ in range(n_rows)]
        file = io.StringIO(newline="")
        csv.writer(file, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL).writerows(table)
        assert read(file.getvalue(), delimiter) == table


def test_unescaped_tables_come_back_as_written():
    rng = random.Random(1)
    words = ["a", "dog", '"stop"', '"Seltzer Way,"', "reads,", '"x".', "\n", ", ", '" Tag "', "it's"]
    for _ in range(300):
        captions = [" ".join(rng.choices(words, k=rng.randrange(8))) for _ in range(rng.randrange(1, 6))]
        # Ambiguous: doubled quotes, and a quote before a line break (which looks like the record's end).
        captions = [caption for caption in captions if not re.search('""|" *\n', caption)]
        assert read_captions(*captions, 'the "last"') == [*captions, 'the "last"']


@pytest.mark.slow
def test_time_grows_with_the_length(growth):
    """Not with its square, 16 times, as when each record searched the whole rest."""

    def work(n):
        assert len(read("a,b\n" + '1,q" x\n' * n + '1,"q "x""\n')) == n + 2

    assert growth(work, 5_000) < 9


def test_field_beyond_the_limit_of_the_csv_module():
    limit = csv.field_size_limit(100)
    try:
        assert read(f'id,plot\n1,"{"long " * 30}"\n')[1] == ["1", "long " * 30]
    finally:
        csv.field_size_limit(limit)


@pytest.mark.real
@pytest.mark.skipif("CACHEFUSE_REAL_DATA" not in os.environ, reason="CACHEFUSE_REAL_DATA is unset")
def test_real_competition_files():
    root = Path(os.environ["CACHEFUSE_REAL_DATA"], "data/comp5329")
    rows = {file: read((root / file).read_text(encoding="utf-8"))[1:] for file in ("train.csv", "test.csv")}
    assert {file: len(table) for file, table in rows.items()} == {"train.csv": 3057, "test.csv": 620}
    captions = {row[0]: row[-1] for table in rows.values() for row in table}
    assert captions["11703.jpg"] == 'a car passing a stop sign that says "whoa"'
    assert captions["7208.jpg"] == 'A kitten looking at a television screen which reads, "COME DINE WITH ME".'
    assert captions["9084.jpg"] == (
        'A street sign labeled "Seltzer Way," with a red fire hydrant in the foreground '
        "and a street stretching into the background."
    )
    assert captions["1014.jpg"].endswith("and a taller one\nfull of very tidily arranged piles of jeans and tops.")
    assert captions["18112.jpg"] == 'A small hand is forming the"thumbs up," signal.'
    assert captions["3465.jpg"].startswith('A sign for "John\'s Market" with')
    assert captions["51.jpg"] == "a cat is sitting on top of a vehicle"
    assert all((root / "data" / image).is_file() for image in captions)

    dataset = load_dataset(load_manifest("comp5329")[0], root)
    assert len(dataset) == 3677
    assert set(dataset.splits) == {"train", "val", "test"}
    assert any("3,057 train rows, but the published dataset has 30,000" in note for note in dataset.notes)
    assert dataset.targets[dataset.splits == "test"].max() == -1
