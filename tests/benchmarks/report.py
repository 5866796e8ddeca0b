"""The command of a benchmark: sections measured on request, kept as JSON, and a page of all of them."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch

Sections = dict[str, Callable[[int], list[dict]]]


def markdown(rows: list[dict]) -> str:
    def cell(value) -> str:
        return (
            f"{value:.3g}"
            if isinstance(value, float) and abs(value) < 100
            else (f"{value:.0f}" if isinstance(value, float) else str(value))
        )

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(head: str, sections: Sections, result: dict) -> str:
    """All sections as Markdown, each with its date and machine."""
    parts = [head]
    for name, section in result.items():
        origin = f"{section['date']}, {section['machine']}, torch {section['torch']}, {section['rounds']} rounds"
        about = " ".join((sections[name].__doc__ or "").split())
        parts.append(f"## {name}\n\n{about} ({origin})\n\n{markdown(section['rows'])}\n")
    return "\n".join(parts)


def main(description: str | None, head: str, sections: Sections, output: Path) -> None:
    """Measures the sections that the command line names, all by default; those of before stay in the file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=output)
    args = parser.parse_args()
    result = json.loads(args.output.read_text()) if args.output.is_file() else {}
    for name in args.only:
        rows = sections[name](args.rounds)
        result[name] = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}",
            "torch": torch.__version__,
            "rounds": args.rounds,
            "rows": rows,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(page(head, sections, json.loads(args.output.read_text())))
        print(f"\n{name}\n{markdown(rows)}", flush=True)
