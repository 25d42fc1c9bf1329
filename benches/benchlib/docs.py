"""Generated parts of documents: what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
import os
import re

from benchlib.host import ROOT, Failure

PAGE = os.path.join(ROOT, "docs", "performance.md")
# Plots and raw results, beside the page.
FOLDER = os.path.join(ROOT, "docs", "bench")


def put(name, text, page=PAGE):
    """Replaces that part of the page."""
    old = open(page).read()
    part = re.compile(rf"(<!-- {re.escape(name)}:begin[^\n]*-->\n).*?(<!-- {re.escape(name)}:end -->)", re.S)
    if not part.search(old):
        raise Failure(f"{page} has no part {name}: no lines <!-- {name}:begin --> and <!-- {name}:end -->")
    new = part.sub(lambda m: m[1] + text.strip("\n") + "\n" + m[2], old, count=1)
    with open(page + ".new", "w") as f:
        f.write(new)
    os.replace(page + ".new", page)


def folder():
    os.makedirs(FOLDER, exist_ok=True)
    return FOLDER
