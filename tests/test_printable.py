import unicodedata

from cachefuse.printable import listed, printable


def test_what_a_terminal_obeys_is_escaped():
    assert printable("\x1b[31mred\x07\0\x9b2J\x7f") == r"\x1b[31mred\x07\x00\x9b2J\x7f"
    assert printable("a\u202egpj.exe\u2066\u200f") == r"a\u202egpj.exe\u2066\u200f"
    assert printable("two\nlines\r\tand\u2028one") == r"two\nlines\r\tand\u2028one"
    assert printable("half \ud83d of a pair") == r"half \ud83d of a pair"


def test_no_control_and_no_bidirectional_mark_is_left():
    characters = [chr(i) for i in range(0x110000)]
    kept = set(printable("".join(characters)))
    marks = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    for character in kept:
        assert unicodedata.category(character) not in {"Cc", "Cs", "Zl", "Zp"}
        assert unicodedata.bidirectional(character) not in marks


def test_other_text_stays_as_it_is():
    text = "Füße, 猫, עברית, العربية, 👩‍🚀, a\u00a0b \\x1b"
    assert printable(text) == text


def test_listed_names_are_one_safe_line():
    assert listed(["a", "b\n", "\x1b[1m"]) == r"a, b\n, \x1b[1m"
    assert listed(["x" * 200]) == printable("x" * 200, 80)


def test_a_long_text_is_cut_in_its_middle():
    text = printable("a" * 300 + "\n" * 300, limit=500)
    assert len(text) == 500
    assert text.startswith("a" * 300)
    assert text.endswith(r"\n")
    assert " ... " in text
