"""The same grading as an autograder of Gradescope's, https://gradescope-autograders.readthedocs.io/en/latest/specs/.

Its zip file has the handout, the tests and the grader, not the solution. So part 6, which the solution scores, is not
in it.
"""

import json
import sys
import time
import zipfile
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1]
SETUP = """#!/usr/bin/env bash
# Gradescope runs this once, as root, on Ubuntu. torch first, without the gigabytes for GPUs.
set -e
cd "$(dirname "$0")"
apt-get update && apt-get install -y python3 python3-pip
export PIP_BREAK_SYSTEM_PACKAGES=1
python3 -m pip install -c handout/constraints.txt --index-url https://download.pytorch.org/whl/cpu torch ||
    echo "no torch for CPUs alone: the next line installs the whole of it"
python3 -m pip install -c handout/constraints.txt -r handout/requirements.txt pytest
"""
RUN = """#!/usr/bin/env bash
# Gradescope copies this into /autograder and runs it there, as root, for each submission.
root=$(cd "$(dirname "$0")" && pwd)
chmod 700 "$root/source" "$root/submission" "$root/results"
cd "$root/source" && exec python3 -m tools.grading.gradescope "$root/submission" "$root/results/results.json"
"""


def write_autograder(out: str, copy: Path) -> None:
    """Writes the zip file `out` of the handout `copy`."""
    with zipfile.ZipFile(out, "x", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, text in (("setup.sh", SETUP), ("run_autograder", RUN)):
            info = zipfile.ZipInfo(name, time.localtime()[:6])
            info.external_attr = 0o100755 << 16  # an executable file
            archive.writestr(info, text)
        for path in copy.rglob("*"):
            archive.write(path, "handout" / path.relative_to(copy))
        for path in (TOOLS / "__init__.py", *TOOLS.glob("grading/*.py")):
            archive.write(path, "tools" / path.relative_to(TOOLS))


def grade(submission: Path, results: Path) -> None:
    """results.json: a test of Gradescope's for each test, with its share of the part's points."""
    from tools.grading.submissions import PARTS, POINTS, grade_all

    began = time.monotonic()
    submissions = {"submission": submission}
    ((_, graded, _),) = grade_all(submissions, TOOLS.parent / "handout", range(1, 6), jobs=2, limit=120)
    tests = []
    for part, messages in sorted(graded.items()):
        name = PARTS[part - 1]
        points = POINTS[name] / len(messages)
        for test, message in messages.items():
            row = {"name": f"{name}: {test.removeprefix('test_').replace('_', ' ')}", "max_score": points}
            row |= {"score": 0.0 if message else points, "status": "failed" if message else "passed"}
            tests.append(row | {"output": message or "right", "visibility": "visible"})
    table = {"tests": tests, "execution_time": round(time.monotonic() - began), "stdout_visibility": "hidden"}
    results.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    grade(Path(sys.argv[1]), Path(sys.argv[2]))
