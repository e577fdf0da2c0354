"""The reference of the command line is written from the commands; both say the same."""

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]


def test_the_page_is_up_to_date() -> None:
    command = [sys.executable, "scripts/cli_reference.py", "--check"]

    assert subprocess.run(command, cwd=REPOSITORY).returncode == 0, "run: python scripts/cli_reference.py"


def test_every_command_is_on_the_page_with_a_sentence() -> None:
    page = (REPOSITORY / "docs/reference/cli.md").read_text()

    sections = re.findall(r"^#{2,3} (rbee [a-z ]+)\n\n(.+)$", page, re.MULTILINE)
    assert {"rbee model download", "rbee hive check", "rbee worker logs", "rbee up"} <= {
        n for n, _ in sections
    }
    assert [name for name, sentence in sections if not sentence.endswith(".")] == []
    assert "bound method" not in page
