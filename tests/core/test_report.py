"""Tables as HTML."""

from hotswap_lab.core.report import html_table


def test_everything_is_escaped():
    evil = "<script>alert(1)</script>"
    html = html_table(evil, [evil], [[evil]], caption=evil, above=[evil], notes=[evil])
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") == 6


def test_headers_are_headers():
    assert html_table("t", ["name"], [[1]]).count('<th scope="col"') == 1
