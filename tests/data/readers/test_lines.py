import pytest

from cachefuse.data.readers import lines
from cachefuse.data.readers.lines import read_lines
from cachefuse.errors import DataError
from fixtures.messages import naming


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"\n \r\n\t\n", []),
        (b"a\n\nb", [(1, "a"), (3, "b")]),
        (b"a \r\n\tb\t\r\n", [(1, "a "), (2, "\tb\t")]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", [(1, "a"), (2, "\ufeffb")]),
        (b"one\rtwo\n", [(1, "one\rtwo")]),
        ("naïve\u2028line\x85\n".encode(), [(1, "naïve\u2028line\x85")]),
        (b"caf\xe9 \x93quoted\x94 \x81\n", [(1, "café “quoted” \N{REPLACEMENT CHARACTER}")]),
        ("é".encode() + b" \xe9\n", [(1, "é é")]),
        (b'"a quote\n', [(1, '"a quote')]),
    ],
)
def test_lines_as_they_are_found(tmp_path, data, expected):
    (tmp_path / "a.txt").write_bytes(data)
    assert list(read_lines(tmp_path / "a.txt")) == expected


def test_what_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\n" + "utf-16".encode("utf-16"))
    with pytest.raises(DataError, match=naming("a.txt 2 UTF-8 text")):
        list(read_lines(tmp_path / "a.txt"))


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 8)
    (tmp_path / "a.txt").write_bytes(b"1234567\n123456789")
    with pytest.raises(DataError, match=naming("a.txt 2 8")):
        list(read_lines(tmp_path / "a.txt"))
