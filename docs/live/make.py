"""The page in which a model runs: its HTML for the site, the files that it reads, and the same in one file.

    python docs/live/make.py FOLDER    # writes the single file, and what the site's page reads, to FOLDER
    python docs/live/make.py --still   # draws still.png, which is shown without JavaScript, in Chromium

``live.html`` is the page's text, ``live.js`` draws it, and ``model.js`` is the model, which runs in a Web Worker.
"""

from __future__ import annotations

import base64
import json
import shutil
import struct
import sys
import tempfile
from importlib.metadata import metadata
from pathlib import Path

from hotswap_lab import demo
from hotswap_lab.figures.palette import BASE, CARD, DARK, INK, MUTED, RIGHT, WHITE, WRONG, adapter_color, mix

FOLDER = Path(__file__).parent
URLS = dict(each.split(", ") for each in metadata("hotswap_lab").get_all("Project-URL"))
#: the one table of the page's colors: what is named in its CSS, for a light and for a dark page
COLORS = {
    "card": (CARD, DARK[CARD]),
    "ink": (INK, DARK[INK]),
    "muted": (MUTED, DARK[MUTED]),
    "base": (BASE, DARK[BASE]),
    "cell": (WHITE, mix(DARK[CARD], 0.94, WHITE)),
    "right": (RIGHT, mix(RIGHT, 0.55, WHITE)),
    "wrong": (WRONG, mix(WRONG, 0.55, WHITE)),
    **{name: (adapter_color(name), mix(adapter_color(name), 0.55, WHITE)) for name in demo.adapter_names()},
}
#: what can be done wrong, by what the page calls it
SWITCHES = {
    "damaged": "damaged file",
    "request": "request meanwhile",
    "padding": "padding not cleared",
    "scaling": "old scaling kept",
    "unpadded": "another rank without padding",
}
#: the page's answers in Python; a test runs it
PYTHON = """from hotswap_lab import AdapterPool, demo, verify_hotswap
names = demo.adapter_names()
model, tokenizer = demo.load("{before}")
pool = AdapterPool(model, adapters={name: demo.adapter_path(name) for name in names})
print(demo.ask(model, tokenizer, "{word}"))  # {one}
pool.swap("{after}")
print(demo.ask(model, tokenizer, "{word}"))  # {two}
print(verify_hotswap(model, demo.adapter_path("{after}"), base=demo.load_base))"""
#: the still picture, as wide as the page has it
STILL = FOLDER / "still.png"
#: the page in one file, next to what the site reads
SINGLE = "hotswap_lab.html"
#: the page's title, which docs/index.md has as well
TITLE = "Swap an adapter while the model runs"


def files() -> dict[str, Path]:
    """The files that the page reads, as the package ships them, by the names that they have on the site."""
    found = {"base.safetensors": demo.BASE_DIR / "model.safetensors"}
    for name in demo.adapter_names():
        found[f"{name}.safetensors"] = Path(demo.adapter_path(name), "adapter_model.safetensors")
    return found


def settings() -> dict:
    """What the page must know besides these files."""
    read = {each: json.loads((demo.BASE_DIR / f"{each}.json").read_text()) for each in ("config", "tokenizer")}
    configs = {
        name: json.loads(Path(demo.adapter_path(name), "adapter_config.json").read_text())
        for name in demo.adapter_names()
    }
    disk = "From disk, a browser reads no other files: open the page on the site, or its single file, live/" + SINGLE
    return {
        "files": "live/",
        "config": read["config"],
        "vocabulary": read["tokenizer"]["model"]["vocab"],
        "adapters": configs,
        "python": PYTHON,
        "fromDisk": disk,
    }


def measured() -> dict[str, str]:
    """The times and sizes of the library's own swaps, from the last run that drew README's picture."""
    found = json.loads((FOLDER.parent.parent / "notebooks" / "pictures" / "first.json").read_text(encoding="utf-8"))
    ways = {"POOL": "hotswap_lab, pool", "DISK": "hotswap_lab, disk", "LOAD": "PEFT load + set + delete"}
    sizes = [f"{each['numbers'] / 1e6:.1f}" for each in found["voices"]]
    times = {name: f"{found['ways'][way]['swap']['median'] * 1000:.2g} ms" for name, way in ways.items()}
    times["LOAD"] = f"{found['ways'][ways['LOAD']]['swap']['median'] * 1000:.0f} ms"
    return {**times, "NUMBERS": f"{min(sizes)} to {max(sizes)}"}


def fragment(*, single: bool = False) -> str:
    """The page's part as HTML, with its style, its program and its model; ``single``: with all files, too."""
    text = {
        each: (FOLDER / each).read_text(encoding="utf-8") for each in ("live.html", "live.css", "live.js", "model.js")
    }
    colors = ";".join(f"--{name}:light-dark({light},{dark})" for name, (light, dark) in COLORS.items())
    still, site = base64.b64encode(STILL.read_bytes()).decode(), URLS["Documentation"]
    here = "This is the page in one file."
    if not single:
        here = f'The page is also <a href="live/{SINGLE}">one file</a> of 8 MB, for use without a network.'
    buttons = [f'<button type="button" value="{name}">{label}</button>' for name, label in SWITCHES.items()]
    parts = {
        "STILL": f"data:image/png;base64,{still}",
        "STILL_SIZE": 'width="{}" height="{}"'.format(*struct.unpack(">II", STILL.read_bytes()[16:24])),
        "SWITCHES": "".join(buttons),
        "SINGLE": here,
        "NOTEBOOK": f"{site if single else ''}notebooks/00_start_here.html",
        "README": f"{URLS['Repository']}#readme",
        **measured(),
    }
    html = text["live.html"]
    for name, part in parts.items():
        html = html.replace(f"{{{name}}}", part)
    data = json.dumps(settings(), separators=(",", ":")).replace("</", "<\\/")
    inside = ""
    for name, path in files().items() if single else ():
        content = base64.b64encode(path.read_bytes()).decode()
        inside += f'<script type="text/plain" data-file="{name}">{content}</script>\n'
    return f"""<section class="live" aria-label="A swap, in the page" style="{colors}">
<style>{text["live.css"]}</style>
{html}
<script type="application/json" class="live-settings">{data}</script>
<script type="text/plain" class="live-model">{text["model.js"]}</script>
{inside}</section>
<script>
{text["live.js"]}</script>
"""


def document() -> str:
    """The page in one file, which works when it is opened from disk."""
    ink = f"light-dark({','.join(COLORS['ink'])})"
    title = f"font-size:28px;line-height:1.25;max-width:960px;margin:16px auto;color:{ink}"
    look = "margin:0;padding:16px;font-family:system-ui,sans-serif;background:light-dark(#fff,#0d1117)"
    return f"""<!doctype html>
<html lang="en" style="color-scheme:light dark">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>hotswap_lab: swap an adapter while the model runs</title>
<body style="{look}">
<h1 style="{title}">{TITLE}</h1>
<main style="max-width:960px;margin:0 auto">{fragment(single=True)}</main>
</body>
</html>
"""


def write(folder: Path) -> None:
    """Write what the site has besides its pages: the model's files, and the page in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in files().items():
        shutil.copyfile(path, folder / name)
    (folder / SINGLE).write_text(document(), encoding="utf-8")


def draw_still() -> None:
    """Take a picture of the page before a swap."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder, SINGLE)
        file.write_text(document(), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1024, "height": 900})
        page.goto(file.as_uri())
        page.wait_for_selector(".live[data-ready]")
        page.add_style_tag(
            content=".live-steps { display: none !important } .live-picture { background: white; padding: 8px }"
        )
        page.wait_for_timeout(300)  # until the lines are where they belong
        page.locator(".live-picture").screenshot(path=STILL)
        browser.close()


if __name__ == "__main__":
    draw_still() if sys.argv[1] == "--still" else write(Path(sys.argv[1]))
