"""Plots as SVG, written by hand: grouped horizontal bars, and lines over a logarithmic or linear axis. Colours and
text are legible on white and on black (the background is drawn)."""
import math
from xml.sax.saxutils import escape

INK, FAINT, PAPER = "#24292f", "#d0d7de", "#ffffff"
PALETTE = ("#0969da", "#bf3989", "#1a7f37", "#9a6700", "#8250df", "#cf222e", "#0a7ea4", "#57606a")


def number(x):
    if x is None:
        return "-"
    if abs(x) >= 10000:
        return f"{x / 1000:.1f} k"
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 1 else f"{x:.2f}"


class Svg:
    def __init__(self, width, height, title):
        self.width, self.height = width, height
        self.parts = [f'<rect width="{width}" height="{height}" fill="{PAPER}"/>']
        self.title = title

    def text(self, x, y, text, size=12, anchor="start", weight="normal", fill=INK, turn=0):
        turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
                          f'font-weight="{weight}" fill="{fill}"{turned}>{escape(text)}</text>')

    def line(self, x1, y1, x2, y2, stroke=FAINT, width=1):
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" '
                          f'stroke-width="{width}"/>')

    def rect(self, x, y, w, h, fill):
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{fill}"/>')

    def polyline(self, points, stroke):
        self.parts.append('<polyline fill="none" stroke="%s" stroke-width="2" points="%s"/>' % (
            stroke, " ".join(f"{x:.1f},{y:.1f}" for x, y in points)))

    def circle(self, x, y, fill):
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{fill}"/>')

    def write(self, path):
        with open(path, "w") as f:
            f.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
                    f'viewBox="0 0 {self.width} {self.height}" font-family="sans-serif" role="img">\n'
                    f"<title>{escape(self.title)}</title>\n" + "\n".join(self.parts) + "\n</svg>\n")


def bars(path, title, panels, colour, columns=2):
    """panels: [(heading, [(label, key, median, least, most)])]; colour: key -> fill. The bar is the median, the thin
    line the range over the repetitions; each panel has its own scale, from 0."""
    label_w, bar_w, row_h, gap = 200, 250, 19, 34
    panel_w = label_w + bar_w + 70
    heights = [gap + row_h * len(rows) for _, rows in panels]
    lines = [heights[i:i + columns] for i in range(0, len(panels), columns)]
    svg = Svg(panel_w * columns + 20, 40 + sum(max(line) for line in lines) + 12, title)
    svg.text(12, 26, title, 16, weight="bold")
    top = 40
    for i, (heading, rows) in enumerate(panels):
        left = 12 + panel_w * (i % columns)
        svg.text(left, top + 22, heading, 13, weight="bold")
        most = max((r[4] for r in rows if r[4]), default=1) or 1
        for k, (label, key, median, least, high) in enumerate(rows):
            y = top + gap + row_h * k
            svg.text(left + label_w - 8, y + 11, label, 11, "end")
            if median is None:
                svg.text(left + label_w, y + 11, "not measured", 10, fill="#8c959f")
                continue
            svg.rect(left + label_w, y, max(bar_w * median / most, 1), row_h - 5, colour(key))
            middle = y + (row_h - 5) / 2
            svg.line(left + label_w + bar_w * least / most, middle, left + label_w + bar_w * high / most, middle, INK, 1.5)
            svg.text(left + label_w + bar_w * max(median, high) / most + 5, y + 11, number(median), 11)
        if i % columns == columns - 1 or i == len(panels) - 1:
            top += max(lines[i // columns])
    svg.write(path)


def ticks_linear(most):
    step = 10 ** math.floor(math.log10(most or 1))
    while most / step < 3:
        step /= 2
    return [step * k for k in range(int(most / step) + 2)]


def lines(path, title, panels, columns=2):
    """panels: [(heading, x label, x log?, [(name, [(x, median, least, most)])], {x: tick text} or none)]."""
    w, h, left_w, top_h, bottom_h = 360, 220, 62, 34, 46
    panel_w, panel_h = left_w + w + 30, top_h + h + bottom_h
    rows = -(-len(panels) // columns)
    svg = Svg(panel_w * columns + 16, 44 + panel_h * rows, title)
    svg.text(12, 26, title, 16, weight="bold")
    for i, (heading, x_label, x_log, series, x_ticks) in enumerate(panels):
        left, top = 8 + panel_w * (i % columns) + left_w, 44 + panel_h * (i // columns) + top_h
        svg.text(left - left_w + 8, top - 16, heading, 13, weight="bold")
        xs = sorted({p[0] for _, points in series for p in points})
        if not xs:
            svg.text(left, top + 20, "not measured", 11)
            continue
        place = (lambda x: math.log2(max(x, 0.5))) if x_log else (lambda x: x)
        low, span = place(xs[0]), (place(xs[-1]) - place(xs[0])) or 1
        ticks = ticks_linear(max(p[3] for _, points in series for p in points))
        at_x = lambda x: left + 8 + (w - 16) * (place(x) - low) / span
        at_y = lambda y: top + h - h * y / ticks[-1]
        for t in ticks:
            svg.line(left, at_y(t), left + w, at_y(t))
            svg.text(left - 6, at_y(t) + 4, number(t) if t else "0", 10, "end")
        for x in xs:
            svg.line(at_x(x), top + h, at_x(x), top + h + 4, INK)
            svg.text(at_x(x), top + h + 16, (x_ticks or {}).get(x, f"{x:g}"), 10, "middle")
        svg.text(left + w / 2, top + h + 34, x_label, 11, "middle")
        for k, (name, points) in enumerate(series):
            colour = PALETTE[k % len(PALETTE)]
            svg.polyline([(at_x(p[0]), at_y(p[1])) for p in points], colour)
            for x, median, least, most in points:
                svg.line(at_x(x), at_y(least), at_x(x), at_y(most), colour, 1.5)
                svg.circle(at_x(x), at_y(median), colour)
            svg.rect(left + w - 152, top + 6 + 15 * k, 10, 10, colour)
            svg.text(left + w - 138, top + 15 + 15 * k, name, 10)
    svg.write(path)
