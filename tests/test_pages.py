"""Pages that show files show them as they are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHOWN = [
    (page, name, text)
    for page in sorted((ROOT / "docs").glob("*.md"))
    for name, text in re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.mark.parametrize(("page", "name", "text"), SHOWN, ids=[name for _, name, _ in SHOWN])
def test_a_file_on_a_page_is_the_file(page: Path, name: str, text: str) -> None:
    assert text == (ROOT / name).read_text(encoding="utf-8"), f"copy {name} into {page.name}"


def test_there_is_one() -> None:
    assert any(page.name == "add-a-policy.md" for page, _, _ in SHOWN)
