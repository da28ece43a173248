"""The digest by which a GPU record is of today's sources, and what is asked of a record."""

import json
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


@pytest.fixture
def digest(record, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The digest of a tree of these files."""
    from flashomni.jit import sources

    def of(files: dict[str, str]) -> str:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(sources, "find", lambda: sources.Sources(tmp_path, tuple(sorted(files))))
        return record.digest()

    return of


def test_every_file_counts(digest) -> None:
    first = digest({"a.cu": "int x;", "b.cu": "int y;"})
    assert digest({"a.cu": "int x;  // x", "b.cu": "int y;"}) == first
    assert digest({"a.cu": "int y;", "b.cu": "int x;"}) != first
    assert digest({"a.cu": "int x;", "c.cu": "int y;"}) != first
    assert digest({"a.cu": "int x;", "b.cu": "int y;", "nvcc.options": "-O3"}) != first


def test_headers_count_that_something_includes(digest) -> None:
    unit = {"src/a.cu": '#include "src/b.cuh"\n#include "c.h"\n  # include <d.h>\n'}
    headers = {
        "src/b.cuh": '#include "src/e.cuh"\n',
        "src/c.h": "",
        "include/d.h": "",
        "src/e.cuh": "int e;\n",
    }
    first = digest(unit | headers)
    assert digest(unit | headers | {"src/dead.cuh": "int x;"}) == first
    for name in headers:
        assert digest(unit | headers | {name: headers[name] + "int x;"}) != first


def test_check_wants_tests_and_benchmarks_of_today_and_names_models_of_earlier_kernels(
    record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    today, earlier = {"sources": record.digest()}, {"sources": "0" * 64}
    tools = {tool: {"errors": 0, "problems": 9} for tool in record.TOOLS}
    whole = {"benchmarks": today, "tests": {**today, "failed": []}, "sanitizer": {**today, **tools}}

    def checked(changes: dict) -> tuple[int, str]:
        path = tmp_path / "h100.json"
        path.write_text(json.dumps(whole | changes))
        return record.check([path]), capsys.readouterr().out

    assert checked({}) == (0, "h100.json: of today's sources, complete, without faults\n")
    code, said = checked({"e2e-tiny-flux": today, "e2e-wan-14b": earlier})
    assert code == 0
    assert "of earlier kernels: e2e-wan-14b\n" in said
    code, said = checked({"benchmarks": earlier})
    assert code == 1
    assert "benchmarks of sources 000000000000" in said
    code, said = checked({"tests": {**today, "failed": ["test_attention"]}})
    assert code == 1
    assert "test test_attention failed" in said
