"""The digest by which a GPU record is of today's sources."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CODE = '#include <a.h>\n#define TWO 2\nint f(int a, int b) { return a / b; }\nconst char* url = "http://x";\n'


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import gpu_record

    yield gpu_record
    sys.modules.pop("gpu_record", None)


@pytest.mark.parametrize(
    "other",
    [
        "// A file.\n#include <a.h>  // for b\n#define TWO \\\n  2\n\n"
        "int f(int a,\n      int b) {\n  return a / b;\n}\n"
        'const char* url = "http://x";',
        CODE.replace("return", "/* a\n comment */ return"),
    ],
)
def test_layout_and_comments_do_not_count(record, other: str) -> None:
    assert record.code_of(other) == record.code_of(CODE)


@pytest.mark.parametrize(
    "old, new", [("a / b", "a * b"), ("http://x", "http://y"), ("TWO 2\n", "TWO 2 "), ("a.h", "b.h")]
)
def test_code_does(record, old: str, new: str) -> None:
    assert old in CODE
    assert record.code_of(CODE.replace(old, new)) != record.code_of(CODE)


def test_every_file_counts(record, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from flashomni.jit import sources

    def digest(**files: str) -> str:
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(sources, "find", lambda: sources.Sources(tmp_path, tuple(sorted(files))))
        return record.digest()

    first = digest(a="int x;", b="int y;")
    assert digest(a="int x;  // x", b="int y;") == first
    assert digest(a="int y;", b="int x;") != first
    assert digest(a="int x;", c="int y;") != first
