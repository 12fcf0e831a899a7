import re
import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")


@pytest.fixture
def browse(tmp_path):
    def load(page):
        """Return the page as the browser has it in the end, and what its console says."""
        command = [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr", "--v=0", "--hide-scrollbars", "--allow-file-access-from-files",
            "--dump-dom", page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return load


@in_a_browser
@pytest.mark.slow
def test_the_console_is_clean_and_no_script_runs(browse, tmp_path, page, hostile_page, parse):
    for name, html in (("page", page), ("hostile", hostile_page)):
        (tmp_path / f"{name}.html").write_bytes(html.encode())
        dom, console = browse(tmp_path / f"{name}.html")
        assert console == []
        assert "<script" not in dom
        assert dom.rstrip().endswith("</html>")
        assert len(parse(dom).sections) == 10


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (lambda html: re.sub("<meta http-equiv.*?>", "", html) + "<script>console.error('oh')</script>", "oh"),
        (lambda html: html + "<script>console.log('ran')</script>", "Content Security Policy"),
        (lambda html: html + "<img src='https://example.invalid/x.png'>", "Content Security Policy"),
    ],
)
def test_the_console_would_tell(spoilt, message, browse, tmp_path, page):
    (tmp_path / "spoilt.html").write_text(spoilt(page))
    console = browse(tmp_path / "spoilt.html")[1]
    assert len(console) == 1
    assert message in console[0]


@pytest.mark.slow
@in_a_browser
def test_nothing_is_wider_than_a_phone(browse, tmp_path, page, hostile_page):
    wide = page.replace("<main>", '<main><p style="width: 361px">too wide</p>')
    frames = {"page": page, "hostile": hostile_page, "wide": wide}
    for name, html in frames.items():
        (tmp_path / f"{name}.html").write_bytes(html.encode())
    (tmp_path / "phone.html").write_text(
        "".join(
            f'<iframe id={name} src="{name}.html" style="width:360px;height:800px;border:0"></iframe>'
            for name in frames
        )
        + "<p id=widths></p><script>onload = () => { widths.textContent = [...document.querySelectorAll('iframe')]"
        ".map(f => f.id + ' ' + f.contentDocument.documentElement.scrollWidth).join(', ') }</script>"
    )
    dom, console = browse(tmp_path / "phone.html")
    assert console == []
    widths = re.search(r'<p id="widths">(.*?)</p>', dom).group(1)
    assert re.fullmatch(r"page 360, hostile 360, wide (37[0-9]|38[0-9])", widths), widths
