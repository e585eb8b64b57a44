"""Data of many records: what they take of memory, and what is read again."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from clipmapper.cli import lasting_imports

RECORDS = 200_000
IMAGES = 100

# In a process of its own. A small manifest first: what libraries take is not the records'.
READ = """
import gc, re, sys
from clipmapper.data.readers import manifest

def held():
    gc.collect()
    return sum(int(kb) for kb in re.findall(r"Rss(?:Anon|File):\\s+(\\d+)", open("/proc/self/status").read()))

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

small, large, again = sys.argv[1:]
manifest.manifest_data(small)
if again == "again":
    manifest.manifest_rows = lambda *_: sys.exit("lines are parsed")
before, before_peak = held(), peak()
data = manifest.manifest_data(large)
count = sum(map(len, data.splits.values()))
print(count, (held() - before) * 1024 / count, (peak() - before_peak) * 1024 / count, "pandas" in sys.modules)
"""


def write(file: Path, records: int) -> None:
    with file.open("w") as lines:
        for n in range(records):
            row = {
                "id": n,
                "image": f"{n % IMAGES}.png",
                "question": f"what is the thing with number {n} in this picture?",
                "answers": [("yes", "no", "red", str(n % 3000))[n % 4]],
                "family": "other",
            }
            lines.write(json.dumps(row) + "\n")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_records_take_little_memory_and_are_read_once(tmp_path):
    for n in range(IMAGES):
        Image.new("RGB", (32, 24), (n, 0, 0)).save(tmp_path / f"{n}.png")
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    write(small, 200)
    write(large, RECORDS)

    def read(again: str) -> tuple[float, float, bool]:
        done = subprocess.run(
            [sys.executable, "-c", READ, small, large, again], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        count, held, peak, pandas = done.stdout.splitlines()[-1].split()
        assert int(count) == RECORDS
        return float(held), float(peak), pandas == "True"

    held, peak, _ = read("first")
    assert held <= 300 and peak <= 600
    held, peak, pandas = read("again")
    assert held <= 300 and peak <= 300
    assert not pandas  # half a second of every start


def test_what_is_imported_for_good_is_not_looked_through(tmp_path, monkeypatch):
    (tmp_path / "imported_for_good.py").write_text("things = [[] for _ in range(1000)]")
    monkeypatch.syspath_prepend(tmp_path)
    assert gc.isenabled()
    before = gc.get_freeze_count()
    with lasting_imports():
        assert not gc.isenabled()
        import imported_for_good  # noqa: F401
    assert gc.isenabled() and gc.get_freeze_count() >= before + 1000
    before = gc.get_freeze_count()
    rings = [[] for _ in range(1000)]
    for ring in rings:
        ring.append(ring)
    with lasting_imports():  # nothing new: what others have made since may still become garbage
        pass
    assert gc.get_freeze_count() <= before
    gc.disable()
    try:
        with lasting_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
