import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from ddrl_jax import curves, report
from ddrl_jax.errors import UserError
from ddrl_jax.pictures import before_after, grid, save_png
from ddrl_jax.report import write_report

ROWS = [
    {"step": 0, "heldout/retrieval/mean": 0.75, "diversity/pixel": 0.31},
    {
        "step": 1,
        "reward/mean": -1.5,
        "reward/jpeg/std": 0.2,
        "data/loss": None,
        "nonfinite": ["data/loss"],
        "samples_seen": 64,
        "policy/ratio_max_deviation": 0.0,
        "time/rollout": 2.0,
        "time/update": 5.0,
        "time/rest": 1.0,
        "grad_norm": 0.5,
        "perf/mfu_rollout": 0.25,
        "perf/mfu_update": 0.5,
        "perf/tflops": 100.0,
    },
    {
        "step": 2,
        "reward/mean": -1.25,
        "data/loss": 0.125,
        "heldout/retrieval/mean": 0.5,
        "samples_seen": 128000,
        "time/rollout": 2.0,
        "time/update": 4.0,
        "time/rest": 1.0,
        "grad_norm": 0.25,
    },
]
CONFIG = {"name": "<quick & start>", "seed": 3, "train": {"epochs": 2}}
START = {
    "date": "2030-01-01",
    "command": "python -m ddrl_jax.main --config=configs/quickstart.py",
    "cpu": "a fine processor",
    "versions": {"jax": "9.9.9"},
}


@pytest.fixture
def run(tmp_path):
    """A finished run of two epochs."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "metrics.jsonl").write_text(lines)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "starts.jsonl").write_text(json.dumps(START) + "\n")
    for step in (0, 1, 2):
        picture = np.full((8, 8, 3), 40 * step, np.uint8)
        save_png(tmp_path / "samples" / f"evaluation_{step:06d}.png", picture)
    return tmp_path


class Page(html.parser.HTMLParser):
    """What a browser would find: tags in balance, pictures, text, addresses."""

    def __init__(self, path):
        super().__init__()
        self.open, self.images, self.addresses, self.text = [], [], [], ""
        self.content = path.read_text()
        self.feed(self.content)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [found[key] for key in ("src", "href") if key in found]
        if tag == "img":
            self.images.append((found["alt"], decode(found["src"])))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data + "\n"


def decode(uri: str) -> np.ndarray:
    content = base64.b64decode(
        uri.removeprefix("data:image/png;base64,"), validate=True
    )
    return np.asarray(Image.open(io.BytesIO(content)))


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 2, 3), value, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_the_page_needs_no_network_and_no_other_file(run):
    page = Page(write_report(run))
    assert page.addresses
    assert all(address.startswith("data:image/png") for address in page.addresses)
    assert not re.search(r"https?:|<script|<link|@import|url\(", page.content)


def test_first_and_last_pictures_stand_side_by_side(run):
    pictures = dict(Page(write_report(run)).images)
    assert (pictures["evaluation, epoch 0"] == 0).all()
    assert (pictures["evaluation, epoch 2"] == 80).all()
    assert "evaluation, epoch 1" not in pictures


def test_words_below_pictures_and_titles_of_curves_are_their_own(run, monkeypatch):
    found = [(name, png(value)) for name, value in (("one", 10), ("two", 20))]
    monkeypatch.setattr(report, "curves", lambda rows: (found, ["a third"]))
    page = Page(write_report(run))
    pictures = dict(page.images)
    assert (pictures["one"] == 10).all() and (pictures["two"] == 20).all()
    assert "Not in metrics.jsonl: a third." in page.text
    shown = re.findall(
        r"<figcaption>(.*?)</figcaption>\s*<img.*?alt=\"(.*?)\"", page.content
    )
    assert shown == [
        ("before: epoch 0", "evaluation, epoch 0"),
        ("after: epoch 2", "evaluation, epoch 2"),
    ]


def test_it_shows_config_command_versions_and_values(run):
    page = Page(write_report(run))
    for part in ("<quick & start>", START["command"], "9.9.9", "a fine processor"):
        assert part in page.text
    assert "2 of 2 epochs, 128000 samples" in page.text
    assert "not finished" not in page.text
    words = page.text.split()
    at = words.index("reward/mean")
    assert words[at + 1 : at + 3] == ["-1.5", "-1.25"]
    at = words.index("samples_seen")
    assert words[at + 1 : at + 3] == ["64", "128000"]
    at = words.index("data/loss")
    assert words[at + 1 : at + 3] == ["0.125", "0.125"]
    at = words.index("heldout/retrieval/mean")  # of the epochs that have it
    assert words[at + 1 : at + 6] == ["0.75", "0.5", "0", "to", "2"]
    assert "Not finite at some epoch: data/loss." in page.text


def test_every_kind_of_curve_that_has_values_is_drawn(run):
    drawn = {alt for alt, _ in Page(write_report(run)).images}
    assert drawn >= {
        "Reward (trained)",
        "Held-out judge (never trained on)",
        "Data loss",
        "Diversity",
        "Ratio deviation",
        "Gradient norm",
        "Share of the peak FLOP/s (MFU)",
        "TFLOP/s of a device",
        "where the time goes",
    }


def test_curves_of_one_panel_have_one_unit(monkeypatch):
    wanted = {
        "Reward (trained)": {"reward/mean", "reward/vlm/mean"},
        "Trained reward (evaluated)": {"evaluation/vlm/mean"},
        "Held-out judge (never trained on)": {"heldout/retrieval/mean"},
        "Share of samples with a score": {
            *("reward/valid", "evaluation/vlm/valid", "heldout/retrieval/valid")
        },
        "Samples without a score": {"reward/not_finite", "reward/vlm/missing"},
        "Clipped share of the policy term": {"policy/clip_fraction"},
        "KL to the policy of the rollout": {"policy/approx_kl"},
    }
    keys = {*set().union(*wanted.values()), "reward/vlm/retries"}  # a counter: no curve
    found = {}

    def note(curve, series):
        found[curve.title] = set(series)
        return b""

    monkeypatch.setattr(curves, "_draw_curve", note)
    curves.curves([{"step": 1} | dict.fromkeys(keys, 0.5)])
    assert found == wanted


def test_what_a_run_lacks_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"train": {"epochs": 30}}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 2}\n{"st')
    text = Page(write_report(tmp_path)).text
    assert "the run is not finished: epoch 1 of 30" in text
    assert "metrics.jsonl: 1 unreadable lines" in text
    assert "starts.jsonl: no such file yet" in text
    assert "samples/: no pictures yet" in text
    assert "data loss, diversity, ratio deviation" in text


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        '{"train": 5}',
        '{"train": {"epochs": "3"}}',
        "{",
        pytest.param("[" * 10**5, id="nested"),
        None,
    ],
)
def test_a_broken_configuration_is_a_missing_one(content, run):
    (run / "config.json").unlink()
    if content is None:
        (run / "config.json").mkdir()
    else:
        (run / "config.json").write_text(content)
    page = Page(write_report(run))
    assert "\nconfig.json: " in page.text
    assert "No readable config.json." in page.text and "2 of ? epochs" in page.text


def test_a_folder_in_the_place_of_a_file_is_named(run):
    for name in ("metrics.jsonl", "starts.jsonl", "samples/evaluation_000002.png"):
        (run / name).unlink()
        (run / name).mkdir()
    (run / "metrics.discarded.jsonl").mkdir()
    page = Page(write_report(run))
    for name in ("metrics", "starts"):
        assert re.search(rf"\n{name}.jsonl: .*Is a directory", page.text)
    assert {alt for alt, _ in page.images} == {
        "evaluation, epoch 0",
        "evaluation, epoch 1",
    }


@pytest.mark.parametrize(
    ("line", "broken"),
    [
        ({"nonfinite": None}, 0),
        ({"nonfinite": [["a"], "b"]}, 0),
        ({"nonfinite": 5}, 1),
        ({"step": "two"}, 1),
        ({"step": None, "time/update": 2.0}, 1),
        ([["step", 3]], 1),
    ],
)
def test_a_line_that_no_run_writes_still_gives_a_page(line, broken, run):
    for name in ("metrics.jsonl", "starts.jsonl"):
        with (run / name).open("a") as file:
            file.write(json.dumps(line) + "\n")
    text = Page(write_report(run)).text
    assert text.count("jsonl: 1 unreadable lines") == 2 * broken


def test_machine_and_command_are_those_of_training(run):
    trained = START | {"mode": "train", "command": "python -m ddrl_jax.main again"}
    sampled = {"mode": "sample", "cpu": "another", "versions": {"jax": "0.0.1"}}
    with (run / "starts.jsonl").open("a") as file:
        print(json.dumps(trained), file=file)
        print(json.dumps(sampled | {"command": "--mode=sample"}), file=file)
    text = Page(write_report(run)).text
    for part in (trained["command"], "9.9.9", "a fine processor"):
        assert part in text
    for part in (START["command"], "--mode=sample", "another", "0.0.1", "\nmode\n"):
        assert part not in text


def test_versions_that_are_none_still_give_a_page(run):
    (run / "starts.jsonl").write_text('{"versions": null}\n{"versions": 5}\n')
    text = Page(write_report(run)).text
    assert "starts.jsonl: 1 unreadable lines" in text


def test_metrics_of_epochs_run_again_are_mentioned(run):
    (run / "metrics.discarded.jsonl").write_text("{}\n{}\n")
    assert (
        "2 lines of metrics.discarded.jsonl: epochs run again"
        in Page(write_report(run)).text
    )


@pytest.mark.parametrize("content", ["", "not json", '{"step": 1, "note": "text"}\n'])
def test_metrics_without_numbers_still_give_a_page(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    assert "No numbers in metrics.jsonl." in Page(write_report(tmp_path)).text


def test_a_folder_that_is_no_workdir_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a workdir"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- Pictures


def tiles(count: int, size: int = 3) -> np.ndarray:
    """Pictures of one colour each: 10, 20, 30, ..."""
    values = 10 * np.arange(1, count + 1, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, size, size, 3)).copy()


def test_a_grid_holds_the_pictures_row_by_row():
    sheet = grid(tiles(5), columns=3, upscale=2)
    # Pictures of 6 pixels, gaps and a frame of 4: rows at 4, 14, columns at 4, 14, 24.
    assert sheet.shape == (24, 34, 3) and sheet.dtype == np.uint8
    for i, (top, left) in enumerate([(4, 4), (4, 14), (4, 24), (14, 4), (14, 14)]):
        assert (sheet[top : top + 6, left : left + 6] == 10 * (i + 1)).all()
    frame = sheet.copy()
    for top, left in [(4, 4), (4, 14), (4, 24), (14, 4), (14, 14)]:
        frame[top : top + 6, left : left + 6] = 255
    assert (frame == 255).all()


def test_upscaling_repeats_pixels():
    picture = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    sheet = grid(picture, columns=1, upscale=3)[4:10, 4:10]
    np.testing.assert_array_equal(sheet, np.kron(picture[0], np.ones((3, 3, 1))))


def test_captions_lie_under_their_pictures_and_inside_their_width():
    images = np.full((2, 40, 40, 3), 255, np.uint8)
    sheet = grid(images, columns=2, captions=["", "a caption much too long for it"])
    assert sheet.shape == (4 + 40 + 4 + 12, 4 + 2 * 44, 3)
    ink = np.argwhere((sheet < 200).all(-1))
    assert len(ink) > 20
    assert ink[:, 0].min() >= 44 and ink[:, 1].min() >= 48 and ink[:, 1].max() < 88


def test_before_and_after_are_one_above_the_other():
    sheet = before_after(tiles(2), tiles(2) + 5, columns=2)
    # Two pictures of 3 pixels with one pixel between them.
    for i, left in enumerate((4, 11)):
        assert (sheet[4:7, left : left + 3] == 10 * (i + 1)).all()
        assert (sheet[7, left : left + 3] == 255).all()
        assert (sheet[8:11, left : left + 3] == 10 * (i + 1) + 5).all()


def test_a_grey_picture_is_saved_in_colour(tmp_path):
    path = save_png(tmp_path / "new" / "a.png", np.full((2, 3, 1), 7, np.uint8))
    found = np.asarray(Image.open(path))
    assert found.shape == (2, 3, 3) and (found == 7).all()
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
