"""Pictures of circuits, as a browser shows them."""

from __future__ import annotations

import re
from itertools import combinations, product
from typing import Any
from xml.etree import ElementTree

import pytest
from playwright.sync_api import Browser
from saes import random_sae

from hookpoints import Graph, HookedRecurrent, attribute

BOXES = """(kind) => [...document.querySelectorAll(kind)].map((element) => {
  const { left, top, right, bottom } = element.getBoundingClientRect();
  return [left + 1.5, top + 1.5, right - 1.5, bottom - 1.5];  // without what letters leave free
})"""
KINDS = ("svg", ".node", ".label", "text:not([transform])", "text")
CONTRASTS = """() => {
  const linear = (c) => (c < 11 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = (color) => {
    const [red, green, blue, alpha = 1] = color.match(/[\\d.]+/g).map(Number);
    return alpha ? 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue) : 1;
  };
  return [...document.querySelectorAll("text, .node path")].map((element) => {
    const behind = luminance(getComputedStyle(element.closest("svg")).backgroundColor);
    const [low, high] = [luminance(getComputedStyle(element).fill), behind].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  });
}"""
"""As WCAG has it; behind what is transparent is a white page."""


@pytest.fixture(scope="module")
def graphs(embedded: HookedRecurrent) -> list[Graph]:
    """With many nodes of one token; and with atoms."""
    text = "The Secretary of the Treasury will report. The report of the Secretary of the"
    treasury = attribute(text, embedded, [" Treasury"], against=" Navy", measure=40)
    told = "Ben lives in Rome . Iris keeps a parrot . Ben lives in"
    facts = HookedRecurrent.from_pretrained("facts")
    atoms = random_sae(facts, k=6, target="state", layer=0, head=0)
    return [treasury, attribute(told, facts, "Rome", frozen=True, measure=4, targets=1, saes=[atoms])]


@pytest.mark.slow  # a browser
def test_no_name_covers_another_one_or_a_node_or_is_cut(browser: Browser, graphs: list[Graph]) -> None:
    """Where there is little room some have no name; in a wide picture twelve nodes have one each."""
    page = browser.new_page()
    for graph, width, n in product(graphs, (390, 720), (12, 40)):
        page.set_viewport_size({"width": width, "height": 800})
        page.set_content(f'<body style="margin: 0">{graph.draw(n, width)}')
        (frame,), nodes, names, level, texts = (page.evaluate(BOXES, kind) for kind in KINDS)
        assert all(box[0] > 0 and box[2] < width and box[3] < frame[3] for box in texts)
        for one, other in combinations([*level, *nodes], 2):
            assert one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]
        assert len(nodes) > 6 and (width == 390 or n == 40 or len(names) == len(nodes))
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_and_nodes_are_seen_whatever_is_behind(browser: Browser, graphs: list[Graph], scheme: Any) -> None:
    """A dark browser may show a page that is white."""
    page = browser.new_page(color_scheme=scheme)
    page.set_content(f'<body style="background: white">{graphs[0].draw()}')
    assert min(page.evaluate(CONTRASTS)) > 4.5
    page.close()


def test_every_shape_has_a_path_to_the_answer_and_the_color_of_its_effect(graphs: list[Graph]) -> None:
    """Along the lines that are drawn."""
    root = ElementTree.fromstring(graphs[0].draw())
    titles = [element.text or "" for element in root.iter() if element.tag.endswith("}title")]
    matches = (re.match(r"(.+?) (?:into the \w+ of|into) (.+): ", title) for title in titles)
    lines = [match.groups() for match in matches if match]
    joined = {"logit"}
    for _ in lines:
        joined |= {source for source, target in lines if target in joined}
    kinds = {
        element.attrib["data-node"]: element.get("class") for element in root.iter() if "data-node" in element.attrib
    }
    assert kinds and kinds.keys() <= joined
    seen = graphs[0].nodes[graphs[0].nodes.node_id.isin([*kinds])]
    for kind, rows in (("hurt", seen.measured < 0), ("help", seen.measured > 0)):
        assert rows.any() and {kinds[name] for name in seen.node_id[rows]} == {f"node {kind}"}


def test_a_line_passes_what_is_between_its_ends(graphs: list[Graph]) -> None:
    """Nodes of one token are above each other, and lines between them bend."""
    picture = graphs[0].draw()
    nodes = re.findall(r'data-node=.*translate\((\S+) (\S+)\)"', picture)
    lines = re.findall(r' d="M(\S+) (\S+)C(\S+) .* (\S+) (\S+)"', picture)
    past = [
        abs(float(aside) - float(x))
        for x, y, aside, end, top in lines
        if any(x == across == end and float(top) < float(height) < float(y) for across, height in nodes)
    ]
    assert len(past) > 2 and min(past) > 8


def test_atoms_are_drawn_below_their_state(graphs: list[Graph]) -> None:
    """Diamonds, the largest first, as far as they are measured; a pruned graph has the parts of what it has."""
    _, graph = graphs
    parts: Any = graph.edges[graph.edges.port == "part"]
    assert {*parts.source, *parts.target} <= {*graph.prune(6).nodes.node_id}
    root = ElementTree.fromstring(graph.draw())
    shapes = [element for element in root.iter() if element.get("data-node") in {*parts.source}]
    largest = parts.loc[parts.measured.abs().nlargest(4).index].source
    assert [element.attrib["data-node"] for element in shapes] == largest.tolist()
    heights = [float(element.attrib["transform"].split()[1].rstrip(")")) for element in shapes]
    assert heights == sorted(heights)
    texts = [element.text or "" for element in root.iter() if element.tag.endswith("}text")]
    assert [text for text in texts if text.startswith("atom ")] and "Diamonds" in texts[-1]
