"""docs/scaling.md says what bench/scaling.py computes."""

from __future__ import annotations

import subprocess
import sys

from common.config import PROJECT_ROOT

PAGE = PROJECT_ROOT / "docs" / "scaling.md"


def test_the_page_holds_the_tables_that_the_script_makes() -> None:
    command = [sys.executable, "bench/scaling.py"]
    made = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True).stdout
    page = PAGE.read_text()
    held = page.partition("<!-- bench/scaling.py -->\n")[2].partition("<!-- end -->")[0]
    assert held == made, "run: python bench/scaling.py, and put its tables between the page's two marks"
