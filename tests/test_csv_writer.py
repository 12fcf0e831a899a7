import csv
import io

from cachefuse.csv_writer import csv_bytes, csv_for_people


def test_a_text_that_a_spreadsheet_would_run_is_no_formula():
    texts = ["=1+1", "+1+1", "-2+3", "@SUM(A1)", "\uff1d1", "-", "-inf"]
    (row,) = csv.reader(io.StringIO(csv_for_people([texts]).decode(), newline=""))
    assert row == [f"'{text}" for text in texts]


def test_numbers_and_other_texts_stay():
    row = ["-0.5", "+1e-3", -0.5, 3, "a = b", "'=", "", "caf\u00e9"]
    assert csv_for_people([row, [float("nan")]]).decode() == '-0.5,+1e-3,-0.5,3,a = b,\'=,,caf\u00e9\n""\n'


def test_controls_are_escaped_in_tables_for_people_alone():
    rows = [["\t=1", "\x1b[2J\u202e\x9b", "a\nb", "\udcff"]]
    assert csv_for_people(rows) == b"\\t=1,\\x1b[2J\\u202e\\x9b,a\\nb,\\udcff\n"
    assert csv_bytes(rows).decode("utf-8", "surrogatepass") == '\t=1,\x1b[2J\u202e\x9b,"a\nb",\udcff\n'
