"""The page of a method: its recipe's docstring, facts computed from it, its mechanism, claims and measurements."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from method_facts import facts

import rankwise as rw

DOCS = Path(__file__).parent
MARK = "<!-- made by docs/gen_methods.py; change the recipe, docs/mechanisms.md or docs/claims.yml, not this page -->"
PARTS = ["Arguments", "Facts", "Mechanism", "The paper's claim", "Our measurement", "References"]
BAR = "\N{DIVIDES}"  # in a cell of a table "|" would end it


def parts_of(doc: str) -> dict[str, str]:
    """A Google docstring by section, what stands before the first one as ""."""
    lead, *rest = re.split(r"^(\w+):\n", doc, flags=re.MULTILINE)
    return {"": lead.strip()} | {k: v.rstrip() for k, v in zip(rest[::2], rest[1::2], strict=True)}


def dedent(text: str) -> str:
    return re.sub(r"^    ", "", text, flags=re.MULTILINE).strip()


def markdown(text: str) -> str:
    """Text of a docstring as Markdown: roles and code as code, everything else to the letter."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"``\1``", text)
    pieces = re.split(r"``(.+?)``", text, flags=re.DOTALL)
    plain = [re.sub(r"([*_\[\]])", r"\\\1", piece).replace("<", "&lt;") for piece in pieces[::2]]
    code = [f"`{' '.join(piece.split())}`" for piece in pieces[1::2]]
    return "".join(a + b for a, b in zip(plain, [*code, ""], strict=True))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", BAR) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def arguments(entry: Any, text: str) -> str:
    rows = []
    for name, said in re.findall(r"^(\S+?): (.+?)(?=^\S+?: |\Z)", dedent(text), flags=re.MULTILINE | re.DOTALL):
        default = f"`{entry.options[name]!r}`" if name in entry.options else ""
        rows.append([f"`{name}`", default, markdown(" ".join(said.split()))])
    return table(["argument", "default", "meaning"], rows)


def examples(text: str) -> str:
    """Prose and doctests."""
    pieces = [piece.strip() for piece in dedent(text).split("\n\n")]
    return "\n\n".join(f"```python\n{p}\n```" if p.startswith(">>>") else markdown(p) for p in pieces)


def mechanisms() -> dict[str, tuple[str, str]]:
    """Title and text of the section of every method on the page of mechanisms, links as seen from a method's page."""
    found = {}
    for section in re.split(r"^### ", (DOCS / "mechanisms.md").read_text(), flags=re.MULTILINE)[1:]:
        title, body = re.split(r"^#", section, flags=re.MULTILINE)[0].split("\n", 1)
        body = re.sub(r"\]\((?=#)", "](../mechanisms.md", body.strip())
        body = re.sub(r"\]\((?!\.\./|https?:)", "](../", body)
        for name in re.findall(r"`([a-z0-9_]+)`", title):
            found[name] = re.sub(r"[\s,(]*`[^`]+`[\s,)]*", " ", title).strip(), body
    return found


def measured(name: str, rows: list[dict[str, Any]]) -> str:
    """What our race says of a method; rows as in ``rankwise.select.race.Race.to_dict``."""
    found = [row for row in rows if row["method"].split("(")[0] == name]
    if not found:
        return "Not raced yet; [how a race works](../race.md)."
    row, verdict = found[0], found[0].get("verdict") or {}
    if not verdict:
        return f"In our [race](../our-race.md): {row['word']}."
    share, low, high = (verdict[key] for key in ("difference", "low", "high"))
    return (
        f"In our [race](../our-race.md) against tuned LoRA: **{row['word']}**. Its loss is lower by {share:+.1%} "
        f"[{low:+.1%}, {high:+.1%}] of what full fine-tuning gains."
    )


def race() -> list[dict[str, Any]]:
    file = DOCS / "race.json"
    return json.loads(file.read_text())["rows"] if file.exists() else []


def claims() -> dict[str, str]:
    return yaml.safe_load((DOCS / "claims.yml").read_text())


def page(entry: Any, mechanism: tuple[str, str], claim: str, measurement: str) -> str:
    doc, (title, body) = parts_of(entry.doc), mechanism
    known = table(["fact", "value"], [[k, v] for k, v in facts(entry.recipe).items()])
    sections = {
        "Arguments": "\n\n".join([arguments(entry, doc["Args"]), *map(examples, filter(None, [doc.get("Examples")]))]),
        "Facts": "Computed from the recipe at its defaults on one linear layer without a bias.\n\n" + known,
        "Mechanism": body,
        "The paper's claim": claim,
        "Our measurement": measurement,
        "References": markdown(dedent(doc["References"])) if "References" in doc else "None: a composition of ours.",
    }
    text = "".join(f"\n## {name}\n\n{sections[name]}\n" for name in PARTS)
    call = f'Made by `rw.recipe("{entry.name}")`; all methods are in [the table](../methods.md).'
    return f"# {title} (`{entry.name}`)\n\n{MARK}\n\n{markdown(doc[''])}\n\n{call}\n{text}"


def pages() -> dict[str, str]:
    """The text of every page by the method's name."""
    entries, sections, said, rows = rw.catalogue(), mechanisms(), claims(), race()
    if missing := set(rw.recipes.__all__) - sections.keys():
        raise SystemExit(f"give {', '.join(sorted(missing))} a section in docs/mechanisms.md")
    return {
        name: page(entries[name], sections[name], said.get(name, "Not noted."), measured(name, rows))
        for name in rw.recipes.__all__
    }
