"""The results of a run as a table, with warnings for lower ratios: ``python -m benches.table FOLDER``.

The JSON files of the other benches in a folder become a Markdown table, and their ratios are compared with
`ratios.json`, the ratios of the last release. Ratios are compared instead of times, as times depend on the
machine; ratios depend on it less, so lower ratios only warn. ``--keep`` replaces the ratios to compare
with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

KEPT = Path(__file__).parent / "ratios.json"

# Smallest share of the kept ratio without a warning: pairs on a busy machine differ by this much.
TOLERANCE = 0.8


def comparisons(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text())
        found = content.get("rows", []) if isinstance(content, dict) else []
        rows += [{**row, "threads": content.get("threads")} for row in found if "ratio" in row]
    return rows


def as_markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| work | against | lorank | peer | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        line = "| {work} | {against} | {lorank:.3g} s | {peer:.3g} s | {ratio:.2f}x |"
        lines.append(line.format(**row))
    return "\n".join(lines)


def warnings(rows: list[dict[str, Any]], kept: dict[str, float]) -> list[str]:
    found = []
    for row in rows:
        name = f"{row['work']} against {row['against']}"
        before = kept.get(name)
        if before is not None and row["ratio"] < TOLERANCE * before:
            found.append(f"{name}: {row['ratio']:.2f}x, was {before:.2f}x")
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--keep", action="store_true", help="compare with these ratios from now on")
    arguments = options.parse_args()
    rows = comparisons(arguments.folder)
    print(as_markdown(rows))
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for warning in warnings(rows, kept):
        print(f"WARNING: slower than before: {warning}")
    if arguments.keep:
        ratios = {f"{row['work']} against {row['against']}": round(row["ratio"], 3) for row in rows}
        KEPT.write_text(json.dumps(kept | ratios, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
