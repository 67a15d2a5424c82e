"""The figures of the pages, drawn as SVG: `python docs/onebase_docs/figures.py` writes docs/figures."""

from __future__ import annotations

import html
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "figures"
INK, PAPER, FROZEN, LINE = "#1f2430", "#ffffff", "#e9ecf1", "#5b6474"
LORA, BOTTLENECK, PREFIX, PROMPT = "#2f6fde", "#d9730d", "#2a9d63", "#a03fb5"
TINTS = {LORA: "#dde8fb", BOTTLENECK: "#fbe6d2", PREFIX: "#d7f0e2", PROMPT: "#f1dff5"}


class Drawing:
    """An SVG that grows by boxes, lines and words; units are pixels, y grows downwards."""

    def __init__(self, width: int, height: int, title: str):
        self.size, self.title = (width, height), title
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, text: str = "", fill: str = FROZEN, edge: str = LINE) -> None:
        """Draw a box with words in its middle; a line break in the text begins a new line."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" fill="{fill}" stroke="{edge}" stroke-width="1.4"/>'
        )
        lines = text.split("\n") if text else []
        for i, line in enumerate(lines):
            self.text(x + w / 2, y + h / 2 + 4.5 + 16 * (i - (len(lines) - 1) / 2), line, anchor="middle")

    def trained(self, x: float, y: float, w: float, h: float, text: str, color: str) -> None:
        """Draw a box of a trained part."""
        self.box(x, y, w, h, text, TINTS[color], color)

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", color: str = INK, size: int = 13) -> None:
        """Write words; y is their base line."""
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{color}">{html.escape(text)}</text>'
        )

    def arrow(self, *points: tuple[float, float], color: str = LINE, dashed: bool = False, head: bool = True) -> None:
        """Draw a line through points, with a head at its end."""
        path = " ".join(f"{x},{y}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        end = f' marker-end="url(#{color[1:]})"' if head else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"{dash}{end}/>')

    def plus(self, x: float, y: float) -> None:
        """Draw the place where a branch joins the residual."""
        self.parts.append(f'<circle cx="{x}" cy="{y}" r="10" fill="{PAPER}" stroke="{LINE}" stroke-width="1.4"/>')
        self.text(x, y + 5, "+", anchor="middle", size=15)

    def svg(self) -> str:
        """Return the whole drawing."""
        width, height = self.size
        heads = "".join(
            f'<marker id="{c[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0,0 L10,5 L0,10 z" fill="{c}"/></marker>'
            for c in (LINE, LORA, BOTTLENECK, PREFIX, PROMPT)
        )
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="system-ui, sans-serif" role="img">',
            f"<title>{html.escape(self.title)}</title>",
            f"<defs>{heads}</defs>",
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
            *self.parts,
            "</svg>\n",
        ])  # fmt: skip


def places() -> Drawing:
    """Where four methods sit in one layer."""
    d = Drawing(760, 590, "One layer of a frozen base, and where prompts, prefixes, LoRA and bottlenecks sit in it")
    x = 90  # the residual
    d.text(x, 22, "text", anchor="middle")
    d.arrow((x, 28), (x, 52))
    d.box(30, 52, 120, 34, "embeddings")
    d.trained(190, 52, 210, 34, "prompt: tokens before the text", PROMPT)
    d.arrow((190, 69), (150, 69), color=PROMPT)
    d.arrow((x, 86), (x, 290))
    # attention
    d.text(590, 128, "attention", color=LINE)
    d.arrow((x, 112), (230, 112), (230, 130))
    for i, name in enumerate("qkv"):
        d.box(170 + 52 * i, 130, 40, 30, name)
    d.arrow((190, 160), (190, 190))
    d.arrow((242, 160), (242, 190))
    d.arrow((294, 160), (294, 190))
    d.box(170, 190, 150, 34, "softmax(q k') v")
    d.trained(352, 176, 210, 34, "prefix: keys and values", PREFIX)
    d.arrow((352, 200), (320, 204), color=PREFIX)
    d.trained(352, 128, 210, 34, "LoRA: B A beside a map", LORA)
    d.arrow((352, 145), (314, 145), color=LORA)
    d.arrow((245, 224), (245, 240))
    d.box(220, 240, 50, 30, "o")
    d.trained(310, 226, 252, 58, "bottleneck: U f(D h), on what\nleaves the branch", BOTTLENECK)
    d.arrow((270, 260), (290, 260), head=False)
    d.arrow((290, 260), (290, 300), (102, 300))
    d.arrow((310, 272), (292, 272), color=BOTTLENECK)
    d.plus(x, 300)
    d.box(30, 322, 120, 30, "norm")
    d.arrow((x, 310), (x, 322))
    d.arrow((x, 352), (x, 474))
    # mlp
    d.text(590, 386, "MLP", color=LINE)
    d.arrow((x, 370), (230, 370), (230, 384))
    d.box(190, 384, 80, 30, "up")
    d.arrow((230, 414), (230, 430))
    d.box(190, 430, 80, 30, "down")
    d.trained(310, 376, 252, 34, "LoRA: these maps too, by default", LORA)
    d.arrow((310, 396), (270, 399), color=LORA)
    d.trained(310, 420, 252, 58, "bottleneck: here too; a parallel one\nreads the residual instead", BOTTLENECK)
    d.arrow((270, 445), (290, 445), head=False)
    d.arrow((290, 445), (290, 486), (102, 486))
    d.arrow((310, 462), (292, 462), color=BOTTLENECK)
    d.plus(x, 486)
    d.arrow((x, 496), (x, 508))
    d.box(30, 508, 120, 30, "norm")
    d.arrow((x, 538), (x, 560))
    d.text(x, 578, "next layer", anchor="middle")
    d.box(310, 528, 22, 22)
    d.text(340, 544, "frozen")
    d.box(420, 528, 22, 22, "", TINTS[LORA], LORA)
    d.text(450, 544, "trained, a few values")
    return d


def mixed() -> Drawing:
    """A batch whose rows belong to different adapters."""
    d = Drawing(760, 330, "One batch: every row takes the frozen map, and the change of its own adapter only")
    rows = [("Never again.", "reviews", LORA), ("The fee may rise.", "legal-fr", BOTTLENECK),
            ("Fine.", "reviews", LORA), ("Any text.", None, None), ("Parfait !", "avis", PREFIX)]  # fmt: skip
    d.text(20, 24, "rows of one batch", color=LINE)
    d.text(330, 24, "one forward of the base", color=LINE)
    d.text(590, 24, "answers", color=LINE)
    d.box(300, 40, 90, 230, "frozen\nlayer")
    for i, (text, name, color) in enumerate(rows):
        y = 44 + 46 * i
        d.box(20, y, 220, 34, "", TINTS.get(color or "", FROZEN), color or LINE)
        d.text(30, y + 22, text)
        d.text(232, y + 22, name or "base", anchor="end", color=color or LINE)
        d.arrow((240, y + 17), (300, y + 17), color=color or LINE)
        d.arrow((390, y + 17), (590, y + 17), color=color or LINE)
        if name and color:
            d.trained(430, y + 3, 110, 28, name, color)
        d.text(600, y + 22, "an embedding" if name is None else f"label by {name}'s head")
    d.text(20, 300, "A row is exactly as if it were alone: no value of another row, and no value of another adapter,")
    d.text(20, 318, "enters what is computed for it. Rows of one adapter are computed together wherever they stand.")
    return d


def joint() -> Drawing:
    """Three jobs that train in one pass."""
    d = Drawing(760, 310, "Joint training: jobs share forward and backward passes, everything else is each job's own")
    jobs = [("reviews.csv", "reviews", LORA), ("clauses.csv", "legal-fr", BOTTLENECK), ("avis.csv", "avis", PREFIX)]
    for x, title in ((20, "data"), (170, "shared"), (430, "each job's own"), (640, "store")):
        d.text(x, 24, title, color=LINE)
    d.box(170, 40, 200, 220, "one pass over\nthe frozen base:\nrows of all jobs,\nforward and backward")
    for i, (data, name, color) in enumerate(jobs):
        y = 44 + 76 * i
        d.trained(20, y + 12, 110, 38, data, color)
        d.arrow((130, y + 31), (170, y + 31), color=color)
        d.trained(430, y, 170, 62, "loss, gradients, clip,\noptimizer, schedule,\nearly stopping", color)
        d.arrow((370, y + 31), (430, y + 31), color=color)
        d.arrow((600, y + 31), (640, y + 31), color=color)
        d.box(640, y + 12, 100, 38, f"{name}@1", PAPER, color)
    d.text(20, 292, "An adapter ends with the values it has when it is trained alone; dropout is included.")
    return d


FIGURES = {"places": places, "mixed": mixed, "joint": joint}


def main() -> None:
    """Write every figure."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
