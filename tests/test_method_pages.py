"""The manual's pages of methods: every part is there, and what they say of a method is so."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import nn

import rankwise as rw
from rankwise.errors import ConversionError
from rankwise.formats import peft
from rankwise.hf.run import Run
from rankwise.select.evidence import compare
from rankwise.select.race import Race, Row

DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS))

method_facts, method_pages = (importlib.import_module(name) for name in ("method_facts", "method_pages"))
FACTS = [
    "Layer", "Trained numbers", "Stored numbers", "Shared between layers", "At the start", "The init reads", "Merges",
    "As a plain LoRA", "PEFT", "Multiply-adds of the update", "Step the same in every gauge",
]  # fmt: skip


@pytest.mark.parametrize("name", rw.recipes.__all__)
def test_a_page_has_all_its_parts(name):
    text = (DOCS / "methods" / f"{name}.md").read_text()
    _, *parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    sections = {title: body.strip() for title, body in zip(parts[::2], parts[1::2], strict=True)}
    assert list(sections) == method_pages.PARTS
    assert all(sections.values())
    assert re.findall(r"^\| ([A-Z][^|]+?) \|", sections["Facts"], flags=re.MULTILINE) == FACTS
    named = re.findall(r"^\| `(\S+?)` \|", sections["Arguments"], flags=re.MULTILINE)
    assert named == [*rw.catalogue()[name].options, "**axes"]
    assert sections["Mechanism"].startswith("- **Idea**: ") and "- **Measured**: " in sections["Mechanism"]


def test_the_table_leads_to_every_page():
    table = (DOCS / "methods.md").read_text()
    assert re.findall(r"^\| \[`(\w+)`\]\(methods/(\w+)\.md\) \|", table, flags=re.MULTILINE) == [
        (name, name) for name in rw.recipes.__all__
    ]


def test_claims_name_their_source_and_reach_their_pages():
    claims = method_pages.claims()
    source = re.compile(r"\((arXiv \d{4}\.\d{4,5}|IC[LM][RL] \d{4})[^()]*\)\.$")
    assert [name for name, claim in claims.items() if not source.search(claim)] == []
    for name in rw.recipes.__all__:
        text = (DOCS / "methods" / f"{name}.md").read_text()
        assert f"\n## The paper's claim\n\n{claims.get(name, 'Not noted.')}\n" in text


FILES = ["lora", "pissa", "dora", "oft", "bi_lora", "dylora", "galore", "relora", "vera"]
FILES += ["ia3", "psoft", "c3a", "glora"]


@pytest.mark.parametrize("name", FILES)
def test_facts_agree_with_the_files(name, tmp_path):
    """Against an adapter that is saved, exported and loaded again, where the pages only count and ask."""
    recipe = rw.recipe(name)
    told = method_facts.facts(recipe)
    adapter = rw.attach(nn.Sequential(nn.Linear(256, 256, bias=False)), recipe)
    with safe_open(adapter.save(tmp_path / "own"), "pt") as file:
        stored = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 (no iteration)
    assert told["Stored numbers"].startswith(f"{sum(t.numel() for t in stored):,} ({sum(t.nbytes for t in stored):,} ")
    try:
        rw.export(adapter, tmp_path / "peft")
    except ConversionError:
        assert told["PEFT"] == "no: merge it"
        return
    found = peft.load(nn.Sequential(nn.Linear(256, 256, bias=False)), tmp_path / "peft").placements[0].structure
    rank = getattr(getattr(found, "inner", found), "rank", None)
    assert told["PEFT"].startswith("written and read, as ")
    assert (f", r = {rank}" in told["PEFT"]) == (rank is not None)
    if told["As a plain LoRA"].startswith("exactly"):
        assert f"of rank {rank}" in told["As a plain LoRA"]


def test_a_race_is_told_by_its_own_words():
    run, verdict = Run("-", "-", "-"), compare([1.0, 1.1, 1.2], [2.0, 2.1, 2.25], gain=2.0)
    rows = tuple(
        Row(name, run, False, 10, 1, 1, 1.0, 1, (1.0,), known)
        for name, known in [("dora(rank=4)", verdict), ("lora", None), ("oft", None)]
    )
    plain = Race(rows, 3.0, 2.0, (1, 2, 3), None, 0.02, "-").to_dict()["rows"]
    assert f"**{verdict.word}**" in method_pages.measured("dora", plain)
    assert f"{verdict.difference:+.1%} [{verdict.low:+.1%}, {verdict.high:+.1%}]" in method_pages.measured(
        "dora", plain
    )
    assert method_pages.measured("lora", plain).endswith(": reference.")
    assert method_pages.measured("oft", plain).endswith(": failed.")
    assert method_pages.measured("hira", plain).startswith("Not raced yet")


def test_docstrings_become_markdown():
    assert method_pages.markdown("``a * b`` * c_i of :class:`~rankwise.Recipe` <x>") == (
        r"`a * b` \* c\_i of `rankwise.Recipe` &lt;x>"
    )
