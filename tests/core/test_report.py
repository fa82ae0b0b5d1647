"""Tables as HTML."""

from hotswap_lab.core.report import html_table


def test_everything_is_escaped():
    evil = "<script>alert(1)</script>"
    html = html_table(evil, [evil], [[evil]], caption=evil, above=[evil], notes=[evil])
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") == 6
