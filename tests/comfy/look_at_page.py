"""The pack in ComfyUI's page, by a browser: `look_at_page.py ADDRESS FOLDER EXAMPLES`; pictures go to FOLDER.

Needs playwright and a chromium (`CHROMIUM` or /usr/bin/chromium). EXAMPLES is JSON: a workflow's name to values that
are set in its widgets, as one would type them. Each is opened from the template browser and queued; every node's help
page and picture is opened, and a picture of the node is taken. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

ADDRESS, FOLDER = sys.argv[1], Path(sys.argv[2])
EXAMPLES: dict[str, dict[str, Any]] = json.loads(sys.argv[3])
PACK = "anonymization-prompt"
NODES_OF_GRAPH = """() => window.app.graph.nodes.map(n => ({type: n.type, missing: !!n.has_errors,
    images: (n.imgs || []).length, text: (n.widgets || []).filter(w => /preview/i.test(w.name)).map(w => w.value)}))"""
TOOLTIPS = """() => { const n = window.app.graph.nodes[0];
    const widgets = (n.widgets || []).filter(w => !/^control|preview|upload/.test(w.name));
    const places = [...widgets, ...n.inputs, ...n.outputs];
    return places.filter(p => !(p.tooltip || (p.options || {}).tooltip ||
        (window.LiteGraph.registered_node_types[n.type].nodeData.inputs[p.name] || {}).tooltip ||
        window.LiteGraph.registered_node_types[n.type].nodeData.outputs.some(o => o.name === p.name && o.tooltip)))
        .map(p => p.name); }"""
SET_WIDGETS = """values => { let found = 0;
    for (const n of window.app.graph.nodes) for (const w of n.widgets || [])
        if (w.name in values) { w.value = values[w.name]; w.callback?.(w.value); found++; }
    window.app.canvas.setDirty(true, true); return found; }"""
FRAME_NODE = """id => { const n = window.app.graph.getNodeById(id), c = window.app.canvas;
    c.ds.scale = 1; c.ds.offset = [160 + 60 - n.pos[0], 120 - n.pos[1]]; c.setDirty(true, true);
    return [n.pos[0], n.pos[1], n.size[0], n.size[1]]; }"""


def ready(page: Page) -> None:
    page.goto(ADDRESS)
    page.wait_for_function("() => window.app && window.app.graph && window.app.extensionManager", timeout=300_000)
    page.wait_for_timeout(2000)


def command(page: Page, name: str) -> None:
    page.evaluate("name => window.app.extensionManager.command.execute(name)", name)


def open_template(page: Page, name: str) -> None:
    """By the template browser, as a user does: the pack's category, then the card."""
    command(page, "Comfy.BrowseTemplates")
    page.get_by_text(PACK, exact=False).first.click(timeout=60_000)
    card = page.locator(f'[data-testid="template-workflow-{name}"]')
    card.wait_for(timeout=60_000)
    page.wait_for_timeout(1500)  # its picture
    page.screenshot(path=FOLDER / "templates.png")
    card.click()
    page.wait_for_function("() => window.app.graph.nodes.length > 5", timeout=60_000)
    page.wait_for_timeout(1500)


HISTORY = """async () => Object.fromEntries(Object.entries(await (await fetch('/api/history')).json())
    .map(([key, value]) => [key, value.status.status_str]))"""


def run(page: Page, seconds: int) -> str:
    """Press Run and wait for the end: what the server's history says."""
    before = page.evaluate(HISTORY)
    page.locator('[data-testid="queue-button"]').click()
    for _ in range(seconds):
        page.wait_for_timeout(1000)
        if new := {key: state for key, state in page.evaluate(HISTORY).items() if key not in before}:
            page.wait_for_timeout(2000)  # pictures come in
            return next(iter(new.values()))
    return "nothing came"


def fit(page: Page) -> None:
    command(page, "Comfy.Canvas.FitView")
    page.wait_for_timeout(1200)


def help_pages(page: Page, names: list[str]) -> dict[str, Any]:
    """Opens each node's help from the toolbox above it, and takes the node's picture and that of its tooltip."""
    found = {}
    for name in names:
        page.evaluate("""name => { const g = window.app.graph; g.clear(); const n = LiteGraph.createNode(name);
            n.pos = [60, 120]; g.add(n);
            n.setSize([Math.max(n.size[0], 350), n.size[1]]); window.app.canvas.deselectAll(); }""", name)
        page.wait_for_timeout(500)
        box = page.evaluate(FRAME_NODE, page.evaluate("() => window.app.graph.nodes[0].id"))
        page.wait_for_timeout(1000)
        page.screenshot(path=FOLDER / f"{name}.png",
                        clip={"x": 60 + 150, "y": 120 - 32, "width": box[2] + 20, "height": box[3] + 44})
        tooltip = page.evaluate(TOOLTIPS)
        page.evaluate("() => window.app.canvas.selectNode(window.app.graph.nodes[0])")
        page.locator('[data-testid="info-button"]').click(timeout=60_000)
        page.locator(".node-help-content").wait_for(timeout=60_000)
        page.wait_for_timeout(1500)
        text = page.evaluate("() => document.querySelector('.node-help-content').innerText")
        pictures = page.evaluate("""() => [...document.querySelectorAll('.node-help-content img')]
            .map(i => [i.getAttribute('src'), i.naturalWidth])""")
        page.screenshot(path=FOLDER / f"help-{name}.png")
        found[name] = {"text": text[:160], "length": len(text), "pictures": pictures, "without_tooltip": tooltip}
    return found


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"),
                                       args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1700, "height": 1000})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)[:300]))
        ready(page)
        page.screenshot(path=FOLDER / "start.png")
        found: dict[str, Any] = {"workflows": {}}
        for name, values in sorted(EXAMPLES.items()):
            open_template(page, name)
            if page.evaluate(SET_WIDGETS, values) < len(values):
                raise RuntimeError(f"{name} has not all widgets of {values}")
            fit(page)
            page.screenshot(path=FOLDER / f"{name}-loaded.png")
            state = run(page, 900)
            fit(page)
            page.screenshot(path=FOLDER / f"{name}-done.png")
            found["workflows"][name] = {"state": state, "nodes": page.evaluate(NODES_OF_GRAPH)}
        names = page.evaluate("""async () => Object.keys(await (await fetch('/api/object_info')).json())
            .filter(name => name.startsWith('APL_'))""")
        found["help"] = help_pages(page, names)
        found["errors"] = errors
        browser.close()
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
