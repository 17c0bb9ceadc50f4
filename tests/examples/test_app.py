"""examples/app.py: the real page in a real browser (Debian's chromium, without a window).

python -m pytest tests/examples/test_app.py        skipped without gradio, selenium or chromium:
pip install gradio selenium; apt-get install chromium chromium-driver
"""

import csv
import json
import re
import shutil
import signal
import socket
import time
import urllib.request
from dataclasses import replace

import pytest
from conftest import finish, flags, here, start, write_reviews

import generate
from configurator import configure
from generate import ModelSampler

pytest.importorskip("gradio")
webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium, or no chromedriver")


@pytest.fixture(scope="module")
def run(place):
    """The folder of a scored run: it labels by one word of a text."""
    here(flags(place, "run", max_iters=80, warmup_iters=10, lr=1e-2, label_names="negative,positive"))
    generate.main(configure(["--init_from=resume", f"--out_dir={place / 'run'}"], trains=False))
    return place / "run"


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    """(address of the page, folder of its temporary files). It ends by SIGTERM, and then nothing is left of it."""
    files = tmp_path_factory.mktemp("files")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = start("examples/app.py", run, fresh=True, GRADIO_SERVER_PORT=str(port), TMPDIR=str(files))
    address = f"http://127.0.0.1:{port}"
    assert address in process.stdout.readline(), process.communicate()
    yield address, files
    process.send_signal(signal.SIGTERM)
    finish(process, 143)
    assert not list(files.iterdir())


@pytest.fixture
def browser(server):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,1600"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    browser.get(server[0])
    wait(lambda: "Ask the model" in page(browser))
    yield browser
    assert outside(browser, server[0]) == []
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
    browser.quit()


def wait(is_done, seconds=60):
    end = time.time() + seconds
    while not (value := is_done()):
        assert time.time() < end, "the page did not answer"
        time.sleep(0.05)
    return value


def page(browser):
    return browser.find_element(By.TAG_NAME, "body").text


def outside(browser, address):
    """Addresses of other servers that the page has asked."""
    messages = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in asked if not url.startswith((address, "data:", "blob:"))]


def ask(browser, text, done="left out"):
    """Types a text, asks, and returns what the page then says. (Keys would take a minute for 10,000 words.)"""
    before = browser.find_elements(By.CSS_SELECTOR, "span[style]")
    box = browser.find_element(By.TAG_NAME, "textarea")
    put = "arguments[0].value = arguments[1].replace('HALF', '\\ud83d');"
    put += "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
    browser.execute_script(put, box, text)
    next(b for b in browser.find_elements(By.TAG_NAME, "button") if b.text == "Ask the model").click()
    wait(lambda: done in page(browser) and browser.find_elements(By.CSS_SELECTOR, "span[style]") != before)
    return page(browser)


def points(browser):
    """[(piece, its points)]; 0 where none stand there."""
    spans = browser.find_elements(By.CSS_SELECTOR, "span[style*=background]")
    found = [re.fullmatch(r"(.*?)([+-]\d+)?", span.text, re.DOTALL).groups() for span in spans]
    return [(piece, int(gain or 0)) for piece, gain in found]


def shares(browser):
    """The percentages that the page shows, in its order: before tuning, and after it."""
    return [int(number) for number in re.findall(r"^(\d+)%$", page(browser), re.MULTILINE)]


# --- a text ----------------------------------------------------------------------------------------


def test_a_text_is_answered_before_and_after_tuning(browser, run):
    """Lost if it fails: the page shows other numbers than the model gives, or marks the wrong word."""
    text = "the plot was wonderful"
    said = ask(browser, text)
    before, after = ModelSampler(config=untuned(run)), ModelSampler(str(run))
    for title, sampler, shown in (("before", before, shares(browser)[:2]), ("after", after, shares(browser)[2:])):
        (answer,) = sampler.predict([text])
        assert f"“{' '.join(answer['generated'].split())}” {title} tuning" in said
        if answer["predicted"]:
            assert round(100 * answer["share"]) in shown and sum(shown) == 100
    assert answer["predicted"] == "positive"
    words = text.split()
    rest = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    whole, *without = [of_positive(answer) for answer in after.predict([text, *rest])]
    assert [piece.strip() for piece, _ in points(browser)] == words
    for (_, shown), share in zip(points(browser), without):
        assert shown == pytest.approx(100 * (whole - share), abs=0.6)


def of_positive(answer):
    return answer["share"] if answer["predicted"] == "positive" else 1 - answer["share"]


def untuned(run):
    config = ModelSampler(str(run)).config
    return replace(config, facts=None)


def test_no_text_is_one_line(browser):
    """Lost if it fails: who presses the button too early sees an old answer, or none."""
    ask(browser, "a story seemed dreadful")
    ask(browser, " \n ", done="Type a text first.")
    assert shares(browser) == []


def test_ten_thousand_words_are_cut_and_said_to_be(browser):
    """Lost if it fails: a long text stops the server, or is answered as if it were read to its end."""
    said = ask(browser, "it seemed dreadful " * 3334)
    n = int(re.search(r"Only the first ([\d,]+) characters", said).group(1).replace(",", ""))
    assert n < 1000
    assert 8 <= len(points(browser)) <= 64


def test_a_long_text_is_weighed_by_sentences(browser):
    """Lost if it fails: of a page of text, single words are left out, and none of them matters."""
    sentences = ["It was dreadful."] * 19 + ["A story!", "It is as it is, so be it."]  # 67 words
    ask(browser, " ".join(sentences))
    assert [piece.strip() for piece, _ in points(browser)] == sentences


def test_a_text_is_shown_as_text(browser):
    """Lost if it fails: a text that somebody pastes runs as a program there, or half an emoji (HALF) stops it."""
    text = "<script>window.ran=1</script><img src=x onerror=window.ran=1> ${window.ran=1} {{window.ran=1}} HALF"
    ask(browser, text)
    assert [piece.strip() for piece, _ in points(browser)] == text.replace("HALF", "?").split()
    assert browser.execute_script("return window.ran") is None


def test_an_example_answers_when_it_is_clicked(browser):
    """Lost if it fails: the first thing that a visitor clicks does nothing."""
    labels = [b for b in browser.find_elements(By.TAG_NAME, "button") if b.text.startswith("positive: ")]
    assert labels and "Right answers" in page(browser)
    labels[0].click()
    wait(lambda: "left out" in page(browser))
    assert browser.find_element(By.TAG_NAME, "textarea").get_property("value").startswith(labels[0].text[10:30])


def test_a_telephone_shows_all(browser):
    """Lost if it fails: on 400 pixels a part of the page lies beside the screen."""
    size = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    ask(browser, "this-film-seemed-" * 20 + " dreadful")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400


# --- a file ----------------------------------------------------------------------------------------


def give_file(browser, path):
    """Opens the part for files and gives it one; its lines on the page."""
    if not browser.find_elements(By.CSS_SELECTOR, "input[type=file]"):
        next(b for b in browser.find_elements(By.TAG_NAME, "button") if "A file of texts" in b.text).click()
    wait(lambda: browser.find_elements(By.CSS_SELECTOR, "input[type=file]"))[0].send_keys(str(path))


def test_a_file_comes_back_as_from_predict(browser, server, run, tmp_path):
    """Lost if it fails: the page and the command line label a file in two ways, or the page keeps it."""
    write_reviews(tmp_path / "new.csv", 70)
    give_file(browser, tmp_path / "new.csv")
    link = wait(lambda: browser.find_elements(By.CSS_SELECTOR, "a[download='new-predicted.csv']"))[0]
    with urllib.request.urlopen(link.get_attribute("href")) as f:
        answered = f.read()
    generate.main(
        configure(["--init_from=resume", f"--out_dir={run}", f"--predict={tmp_path / 'new.csv'}"], trains=False)
    )
    assert answered == (run / "new-predicted.csv").read_bytes()
    rows = list(csv.DictReader(answered.decode().splitlines()))
    assert len(rows) == 70 and list(rows[0]) == ["text", "label", "predicted", "generated", "share"]
    assert not list(server[1].rglob("new.csv"))


def test_what_cannot_be_read_is_one_line(browser, server, tmp_path):
    """Lost if it fails: a wrong file is a page that stands still, or a line with the server's own folders in it."""
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    give_file(browser, tmp_path / "photo.jpg")
    wait(lambda: "photo.jpg: only csv, tsv" in page(browser))
    (tmp_path / "other.csv").write_text("review,stars\na joy,5\n")
    give_file(browser, tmp_path / "other.csv")
    wait(lambda: "no such column in other.csv" in page(browser))
    assert str(server[1]) not in page(browser)
    assert not [path for path in server[1].rglob("*") if path.name in ("photo.jpg", "other.csv")]


# --- the command -----------------------------------------------------------------------------------


def test_no_run_is_one_line(tmp_path):
    """Lost if it fails: a mistyped folder is a traceback."""
    _, err = finish(start("examples/app.py", tmp_path), 2)
    assert err.startswith("error:") and err.count("\n") == 1
