"""`homework grade`: cheats get no points, whoever answers gets them, and what Gradescope is given.

python -m pytest tests/tools/test_grader.py
"""

import contextlib
import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from answers import STUDENT, handout, run, solved, write

from tools.grading.submissions import FILES, POINTS

GRADE = ["-m", "tools.homework", "grade"]
SITE = Path(pytest.__file__).parents[1]

READ = """
import importlib.machinery, os, sys, torch
from pathlib import Path
def by_torch(path):
    return bytes(torch.UntypedStorage.from_file(path, False, os.stat(path).st_size).tolist()).decode()
ways = {"python": lambda path: Path(path).read_text(), "torch": by_torch,
        "import": lambda path: importlib.machinery.SourceFileLoader("other", path).get_data(path).decode()}
for path in {paths}:
    for way in {ways}:
        try:
            exec(ways[way](path), globals())
            print(path, way)
        except BaseException as e:
            print(path, way, repr(e))
"""

CHEATS = {  # what comes behind an empty lora.py
    "early exit": "import os\nos._exit(0)",
    "exit": "import sys\nsys.exit(0)",
    "all passed": "print('23 passed in 0.1s')\nimport sys\nsys.stderr.write('23 passed')",
    "patched pytest": "import _pytest.python\n_pytest.python.Function.runtest = lambda self: None",
    "no failure": "import pytest\npytest.fail = lambda *args, **kwargs: None",
    "patched reports": """
import _pytest.reports
def passes(item, call):
    return _pytest.reports.TestReport(item.nodeid, item.location, {}, "passed", None, call.when)
_pytest.reports.TestReport.from_item_and_call = passes""",
    "patched conftest": """
import sys
conftest = sys.modules["conftest"]
conftest.describe = lambda error: ""
conftest.pytest_pyfunc_call = lambda pyfuncitem: True""",
    "changed tests": """
import glob
for path in glob.glob("homework_tests/*") + glob.glob("../../*/hw/homework_tests/*") + glob.glob("*.py"):
    try:
        names = [line[4:].split("(")[0] for line in open(path) if line.startswith("def test_")]
        open(path, "w").write("".join(f"def {name}(): pass\\n" for name in names))
    except OSError as e:
        print(path, e)""",
    "exchanged functions": """
import gc, types, torch
def seed(number):
    for f in gc.get_objects():
        if isinstance(f, types.FunctionType) and f.__name__.startswith("test_"):
            f.__code__ = (lambda: None).__code__
torch.manual_seed = seed""",
    "all is close": "import torch\ntorch.allclose = torch.equal = lambda *args, **kwargs: True",
    "results written": """
import os
line = b'0000 [0, "test_init_makes_A_and_B", null]\\n'
for fd in range(200):
    try:
        os.write(fd, line * 50)
    except OSError:
        pass
for name in ("grades.csv", "grades.jsonl", "results.json", "../grades.csv", "{grades}"):
    try:
        open(name, "a").write("cheat,9,9\\n")
    except OSError as e:
        print(name, e)""",
    "forged report": """
import sys
frame = sys._getframe()
while frame:
    for name, value in list(frame.f_locals.items()):
        if name == "key":
            import hashlib, hmac, json, os
            for i, test in enumerate(["test_init_makes_A_and_B", "test_mark_chooses_A_and_B"]):
                text = json.dumps([i, test, None])
                line = hmac.digest(bytes(value), text.encode(), "sha256").hex() + " " + text + "\\n"
                for fd in range(3, 100):
                    try:
                        os.write(fd, line.encode())
                    except OSError:
                        pass
    frame = frame.f_back""",
    "parent killed": """
import os, signal, subprocess
for kill in (lambda: os.kill(os.getppid(), signal.SIGKILL), lambda: os.killpg(os.getpgid(os.getppid()), 9),
             lambda: subprocess.run(["kill", "-9", "{parent}"]), lambda: os.system("kill -9 $PPID"),
             lambda: os.fork() or os.kill({parent}, 9), lambda: os.kill(-1, signal.SIGTERM)):
    try:
        kill()
    except BaseException as e:
        print(e)""",
    "files planted": """
import os, torch
site = os.path.dirname(os.path.dirname(torch.__file__))
for path in (site + "/planted.txt", "{grades}.planted"):
    for write in (lambda: open(path, "w").close(), lambda: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)),
                  lambda: open("planted.txt", "w").close() or os.rename("planted.txt", path),
                  lambda: os.symlink("/", path)):
        try:
            write()
        except OSError as e:
            print(e)""",
    "process spawned": """
import multiprocessing, os, sys
sys.modules["__main__"] = type(sys)("__main__")
try:
    process = multiprocessing.get_context("spawn").Process(target=os.system, args=("touch '{grades}.planted'",))
    process.start()
    process.join()
except BaseException as e:
    print(e)""",
    "connected": """
import socket
try:
    socket.create_connection(("127.0.0.1", {port}), 2).send(b"hello")
except BaseException as e:
    print(e)""",
    "solution read": READ,
}


SHUT_IN, HOOKED = "as this system can", "hook alone"
OUTSIDE = ("solution read", "results written", "parent killed", "files planted", "process spawned", "connected")


def grade_cheats(way, folder):
    """(rows of the csv, lines of the details, what reached the outside) of all cheats and an honest submission."""
    installed = folder / "installed"
    (installed / "plumbing").mkdir(parents=True)
    shutil.copy(STUDENT, installed / "lora.py")
    honest = write(folder / "subs" / "honest", {})
    empty = {file: (handout() / file).read_text("utf-8") for file in FILES}
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        paths = [str(installed / "lora.py"), str(STUDENT), str(honest / "lora.py")]
        # torch reads a file without telling Python, and only namespaces hold against that.
        ways = ["python", "import"] if way == HOOKED else ["python", "import", "torch"]
        words = {
            "{paths}": str(paths),
            "{ways}": str(ways),
            "{port}": str(server.getsockname()[1]),
            "{parent}": str(os.getpid()),
        }
        words["{grades}"] = str(folder / "grades.csv")
        for name in CHEATS if way == SHUT_IN else OUTSIDE:
            code = CHEATS[name]
            for word, value in words.items():
                code = code.replace(word, value)
            write(folder / "subs" / name, empty | {"lora.py": f"{empty['lora.py']}\n{code}\n"})
        link = write(folder / "subs" / "link", empty)
        (link / "lora.py").unlink()
        (link / "lora.py").symlink_to(STUDENT)
        beside = write(folder / "subs" / "files beside", empty)
        shutil.copytree(handout() / "homework_tests", beside / "homework_tests")
        (beside / "homework_tests" / "test_1_lora.py").write_text("def test_init_makes_A_and_B(): pass\n")
        (beside / "conftest.py").write_text("import os\nos._exit(0)\n")
        (beside / "pytest.ini").write_text("[pytest]\naddopts = --collect-only\n")
        (beside / "configurator.py").write_text("raise SystemExit(0)\n")
        program = "import sys; from tools import homework; from tools.grading import submissions\n"
        if way == HOOKED:
            program += "submissions.way_to_shut_in = lambda *arguments: ''\n"
        subs = sorted((folder / "subs").iterdir())
        flags = [f"--out={folder / 'grades.csv'}", "--parts=1"]
        done = run(
            ["-c", f"{program}homework.main(sys.argv[1:])", "grade", *subs],
            *flags,
            PYTHONPATH=str(installed),
        )
        assert done.returncode == 0, done.stderr
        planted = [path for path in (folder / "grades.csv.planted", SITE / "planted.txt") if os.path.lexists(path)]
        for path in planted:
            path.unlink()
        connections = []
        with contextlib.suppress(TimeoutError):
            connections.append(server.accept())
    with open(folder / "grades.csv") as table:
        rows = {row["submission"]: row for row in csv.DictReader(table)}
    details = map(json.loads, (folder / "grades.jsonl").read_text().splitlines())
    return rows, {line["submission"]: line["tests"] for line in details}, [*connections, *planted]


@pytest.mark.parametrize("way", [SHUT_IN, HOOKED])
def test_cheats_get_no_points(way, tmp_path):
    """Lost if it fails: who cheats passes, or takes points from another, or reaches what is the teacher's."""
    rows, details, outside = grade_cheats(way, tmp_path)
    honest = rows.pop("honest")
    assert float(honest["total"]) == float(honest["of"]) == POINTS["lora.py"]
    assert honest["look at"] == "" and "kill" in rows["parent killed"]["look at"]
    for name, row in rows.items():
        assert float(row["total"]) == 0 and all(details[name]["lora.py"].values()), (name, details[name])
    assert len(rows) == (len(CHEATS) if way == SHUT_IN else len(OUTSIDE)) + 2
    assert not outside


def test_an_endless_loop_ends(tmp_path):
    """Lost if it fails: one submission holds up the grades of all; or, with an environment that is a link, as here,
    no submission is run at all, and each has no points."""
    (tmp_path / "environment").symlink_to(sys.prefix)
    write(tmp_path / "loop", {"lora.py": solved()["lora.py"] + "\nwhile True:\n    pass\n"})
    done = run(
        ["-m", "tools.homework", "grade", tmp_path / "loop", f"--out={tmp_path}/g.csv"],
        "--parts=1",
        "--limit=1",
        python=tmp_path / "environment" / "bin" / Path(sys.executable).name,
    )
    assert done.returncode == 0 and done.stdout == "loop: 0 of 9\n"
    assert "not done after 1 seconds" in (tmp_path / "g.jsonl").read_text()


def test_a_zip_file_and_folders_within(tmp_path):
    """Lost if it fails: what a course's website hands to the teacher has to be unpacked by hand."""
    for name in ("ann", "ben"):
        write(tmp_path / name / "hw3", {"lora.py": (handout() / "lora.py").read_text()} if name == "ben" else {})
    (tmp_path / "ann" / "__MACOSX").mkdir()
    (tmp_path / "ann" / "__MACOSX" / "lora.py").write_text("raise SystemExit")
    shutil.make_archive(tmp_path / "zipped", "zip", tmp_path / "ann")
    grades = tmp_path / "grades.csv"
    submissions = [tmp_path / "ben", tmp_path / "zipped.zip"]
    done = run(GRADE, *submissions, f"--out={grades}", "--parts=1,3")
    assert done.returncode == 0, done.stderr
    with open(grades) as table:
        rows = {row["submission"]: row for row in csv.DictReader(table)}
    full = {"lora.py": "9.0", "dataloader.py": "4.0", "total": "13.0", "of": "13", "look at": ""}
    assert rows["zipped"] == {"submission": "zipped"} | full
    assert rows["ben"] == {"submission": "ben"} | full | {"lora.py": "0.0", "total": "4.0"}


def test_a_file_that_grows_when_it_is_unpacked_is_one_line(tmp_path):
    """Lost if it fails: a small zip file takes all the memory of the teacher's machine."""
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("lora.py", b"#" * (64 << 20))
    done = run(GRADE, tmp_path / "bomb.zip", f"--out={tmp_path}/g.csv", "--parts=1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "bomb.zip: lora.py" in done.stderr


def test_a_damaged_zip_file_is_one_line(tmp_path):
    """Lost if it fails: one upload that was cut or changed on its way ends the grading of all in a traceback."""
    path = tmp_path / "cut.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("lora.py", "x = 1\n" * 1000)
    content = bytearray(path.read_bytes())
    content[40:60] = bytes(20)  # within the packed file
    path.write_bytes(content)
    done = run(GRADE, path, f"--out={tmp_path}/g.csv", "--parts=1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cut.zip: " in done.stderr


def test_gradescope(tmp_path):
    """Lost if it fails: what is uploaded to Gradescope gives no grades, or has the solution in it."""
    archive = tmp_path / "autograder.zip"
    assert run(["-m", "tools.homework", "gradescope"], archive, python=sys.executable).returncode == 0
    root = tmp_path / "autograder"
    for name in ("source", "submission", "results"):
        (root / name).mkdir(parents=True)
    with zipfile.ZipFile(archive) as files:
        files.extractall(root / "source")
        assert all(files.getinfo(name).external_attr >> 16 & 0o111 for name in ("setup.sh", "run_autograder"))
    assert not any(
        "kaiming_uniform_(" in path.read_text("utf-8") for path in root.rglob("*.py") if "tests" not in str(path)
    )
    assert subprocess.run(["bash", "-n", root / "source" / "setup.sh"]).returncode == 0
    shutil.copy(root / "source" / "run_autograder", root / "run_autograder")
    os.chmod(root / "run_autograder", 0o755)
    write(root / "submission" / "hw", {"train.py": (handout() / "train.py").read_text()})
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([root / "run_autograder"], cwd=root, env=env, check=True, timeout=600)
    results = json.loads((root / "results" / "results.json").read_text())
    assert results.keys() == {"tests", "execution_time", "stdout_visibility"}
    for test in results["tests"]:
        assert test.keys() == {"name", "score", "max_score", "status", "output", "visibility"}
        is_wrong = test["name"].startswith("train.py: build model trains the adapters")
        assert test["score"] == (0 if is_wrong else test["max_score"]), test
        assert ("still empty: build_model" in test["output"]) == is_wrong and test["visibility"] == "visible"
    assert sum(test["max_score"] for test in results["tests"]) == pytest.approx(23)


def test_mistakes_of_the_teachers(tmp_path):
    """Lost if it fails: a teacher meets a traceback, or loses grades that are written."""
    done = run(["-m", "tools.homework"], tmp_path / "hw", python=sys.executable)
    assert done.returncode == 0 and (tmp_path / "hw" / "homework_tests" / "test_1_lora.py").exists()
    (tmp_path / "grades.csv").write_text("ann,25\n")
    (tmp_path / "a.zip").write_text("no zip file")
    out = f"--out={tmp_path / 'new.csv'}"
    for arguments in (
        [tmp_path / "hw"],
        [],
        ["a", "b"],
        ["--help"],
        [tmp_path / "no" / "parent"],
        ["grade", out],
        ["grade", tmp_path / "nobody", out],
        ["grade", tmp_path / "a.zip", out],
        ["grade", tmp_path / "hw"],
        ["grade", tmp_path / "hw", f"--out={tmp_path / 'grades.csv'}"],
        ["grade", tmp_path / "hw", out, "--parts=7"],
        ["grade", tmp_path / "hw", out, "--jobs=many"],
        ["grade", tmp_path / "hw", out, "--limits=3"],
        ["grade", tmp_path / "hw", tmp_path / "x" / ".." / "hw", out],
        ["gradescope", tmp_path / "a.zip"],
    ):
        done = run(["-m", "tools.homework"], *arguments, python=sys.executable)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "grades.csv", "hw"]
    assert (tmp_path / "grades.csv").read_text() == "ann,25\n"
