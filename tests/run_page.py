"""Run the code blocks of a page in order, in the current folder: `python run_page.py PAGE`.

`python` blocks share one namespace. A block after "save it as `NAME.py`:" becomes that file instead. `bash` blocks run
under `bash -euo pipefail`."""

from __future__ import annotations

import linecache
import re
import subprocess
import sys
import types
from pathlib import Path

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the language and the text of each block of a page."""
    return BLOCK.findall(page.read_text())


def main(page: Path) -> None:
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module  # so that functions of the page are pickled by value
    sys.path.insert(0, str(Path.cwd()))
    whole = page.read_text()
    for number, (language, text) in enumerate(blocks(page)):
        before = whole[: whole.index(f"```{language}\n{text}```")]
        if language == "python" and (file := re.search(r"`(\w+\.py)`:\n\n$", before)):
            Path(file[1]).write_text(text)
        elif language == "python":
            name = f"<block {number} of {page.name}>"
            linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
            exec(compile(text, name, "exec"), module.__dict__)
        elif language == "bash":
            subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
