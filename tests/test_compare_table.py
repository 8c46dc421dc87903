"""What a comparison shows: its table, its figures, its mode."""

import json

import numpy as np
import pytest
from PIL import Image
from synthetic_runs import DDPO, DDRL, EPOCHS, load, two_seeds, write

from ddrl_jax import compare
from ddrl_jax.compare.figures import cell_of, cut_pictures, spread_out
from ddrl_jax.pictures import grid

# ---- the table


def test_the_table_has_the_numbers_by_hand(tmp_path):
    runs = two_seeds(tmp_path)
    path = tmp_path / "out" / "table.md"
    text = compare.write_table(runs, path, {"command": "`x`"}).read_text()
    lines = text.splitlines()
    assert "- command: `x`" in lines
    assert "- seeds: 0, 1; 4 runs" in lines
    # 4 runs of 3 evaluated epochs of half an hour
    assert any("all epochs" in line and line.endswith(": 6.00") for line in lines)
    assert "## After 576 reward calls, and at the end of longer arms" in lines
    assert sum(line.startswith("| DDPO | 2 | 576 |") for line in lines) == 2
    diversity = "| 0.200 | 0.700 |"
    assert (
        "| DDRL 0.01 | 2 | 1,728 | 4.60 (4.40 to 4.80) | 38.0% (30.0% to 46.0%) "
        f"{diversity} 0.230 |"
    ) in lines
    assert (
        f"| base | 2 | 0 | 6.00 | 55.0% (50.0% to 60.0%) {diversity} 0.200 |" in lines
    )
    # at 4.8 all of them have an evaluation
    assert "| -20% | 22.0% (20.0% to 24.0%) | 43.0% (40.0% to 46.0%) |" in lines
    # 4.5 is a sixth of the way from 4.8 to 3.0, and three quarters from 4.8 to 4.4
    assert "| -25% | 19.7% (18.3% to 21.0%) | 32.5%, 1 of 2 |" in lines
    # the ends are 5.0 and 4.8; DDPO has 0.30 and 0.20 there
    assert (
        "| DDRL 0.01 | 1,728 of 1,728 | never | +20% | **met** | 18.3% | 45.0% "
        "| 25.0% | 1.80 | 2 of 2 | **met** |"
    ) in lines
    assert "| arm | data_term.weight | train.epochs |" in lines
    assert "| DDRL 0.01 | 0.01 | 27 |" in lines


def test_every_evaluation_of_every_seed_is_beside_the_table(tmp_path):
    table = compare.write_table(two_seeds(tmp_path), tmp_path / "table.md")
    assert "- every run's evaluations: `table.csv`" in table.read_text()
    lines = (tmp_path / "table.csv").read_text().splitlines()
    head = "arm,seed,epochs,calls,kilobytes,retrieval,within_prompt,across_prompts"
    assert lines[0] == f"{head},data_loss"
    assert len(lines) == 1 + 4 * 4  # four runs of four evaluations
    assert lines[1] == "ddpo,0,0,0,6,0.6,0.2,0.7,0.2"
    assert "ddrl,1,27,1728,4.4,0.3,0.2,0.7,0.23" in lines
    assert "ddpo,1,9,576,3,0.1,0.2,0.7,0.5" in lines


def test_an_unfinished_run_is_said_to_be_so(tmp_path):
    write(tmp_path, "ddpo", DDPO, train={"epochs": 21})
    text = compare.write_table(load(tmp_path, ["ddpo"]), tmp_path / "t.md").read_text()
    assert "**not finished**: ddpo, seed 0: 12 epochs are left" in text


@pytest.mark.parametrize(("limit", "prompts"), [(64, "64"), (0, "all")])
def test_the_prompts_of_the_evaluation_are_counted_or_all(tmp_path, limit, prompts):
    write(tmp_path, "ddpo", DDPO, prompts={"limit": limit})
    text = compare.write_table(load(tmp_path, ["ddpo"]), tmp_path / "t.md").read_text()
    assert f"evaluation: 128 samples of {prompts} prompts in their order" in text


def test_machine_versions_and_dates_are_those_of_training(tmp_path):
    path = write(tmp_path, "ddpo", DDPO)
    trained = {"cpu": "a processor", "cores": 2, "devices": "1 x cpu"}
    trained |= {"versions": {"jax": "9.9.9"}, "date": "2030-01-02 03:04:05 UTC"}
    starts = [
        trained,  # before a start said in which mode
        trained | {"mode": "train", "date": "2030-01-05"},
        {"mode": "sample", "cpu": "another", "versions": {}, "date": "2031-01-01"},
    ]
    (path / "starts.jsonl").write_text("\n".join(map(json.dumps, starts)))
    table = compare.write_table(load(tmp_path, ["ddpo"]), tmp_path / "t.md")
    lines = table.read_text().splitlines()
    assert "- machine: a processor, 2 cores, 1 x cpu" in lines
    assert "- versions: jax 9.9.9" in lines
    assert "- dates: 2030-01-02 to 2030-01-05" in lines


def test_what_was_not_measured_is_not_made_up(tmp_path):
    path = write(tmp_path, "ddpo", DDPO)
    rows = [json.loads(x) for x in (path / "metrics.jsonl").read_text().split("\n")[:5]]
    for row in rows:
        row.pop("data/heldout_loss", None)
    rows[2]["heldout/retrieval/mean"] = None
    (path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    runs = load(tmp_path, ["ddpo"])
    text = compare.write_table(runs, tmp_path / "t.md").read_text()
    assert "not known" in text and "nan" not in text
    assert (tmp_path / "t.csv").read_text().splitlines()[1].endswith(",0.2,0.7,")
    assert compare.first_collapse(runs["ddpo"][0]) == 576
    compare.draw(runs, tmp_path / "t.png")


# ---- figures


def test_labels_move_apart_and_keep_their_order():
    assert spread_out([1.0, 3.0], 1.0) == [1.0, 3.0]
    assert spread_out([2.0, 2.0], 1.0) == [1.5, 2.5]
    # the first two take 0.45 and 1.45; the third then joins them around their mean
    np.testing.assert_allclose(spread_out([1.0, 0.9, 2.0], 1.0), [1.3, 0.3, 2.3])
    assert spread_out([], 1.0) == []


@pytest.mark.parametrize("count", [1, 3, 8, 16, 19])
@pytest.mark.parametrize(("side", "upscale"), [(6, 2), (32, 4), (129, 1)])
def test_a_sheet_of_pictures_is_taken_apart_as_it_was_made(count, side, upscale):
    random = np.random.default_rng(count)
    pictures = random.integers(0, 256, (count, side, side, 3), np.uint8)
    sheet = grid(pictures, 8, upscale, ["."] * count)
    size = side * upscale
    assert cell_of(sheet.shape, count) == size
    found, captions = cut_pictures(sheet, size, count)
    shown = pictures.repeat(upscale, 1).repeat(upscale, 2)
    np.testing.assert_array_equal(found, shown)
    assert captions.shape[0] == count and captions.shape[2] == size


@pytest.mark.parametrize(
    ("pictures", "captions", "count"),
    [
        ((8, 12, 12, 3), True, 0),
        ((8, 12, 12, 3), True, 9),  # a row more
        ((8, 12, 12, 3), True, 7),  # a column less
        ((8, 12, 12, 3), False, 8),
        ((8, 12, 16, 3), True, 8),
    ],
)
def test_a_sheet_of_another_geometry_has_no_cell(pictures, captions, count):
    sheet = grid(np.zeros(pictures, np.uint8), 8, 1, [""] * 8 if captions else None)
    assert cell_of(sheet.shape, count) is None


def test_drawing_writes_curves_and_fronts(tmp_path):
    written = compare.draw(two_seeds(tmp_path), tmp_path / "out" / "c.png")
    assert [path.name for path in written] == ["c.png", "c_fronts.png"]
    for path in written:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape[1] > 1000
        packed = pixels.astype(np.int64) @ [1, 256, 65536]
        assert len(np.unique(packed)) > 50


MODELS_OWN = {"model": {"image_size": 0}}  # the size is that of the checkpoint
FEW = {"evaluate": {"pictures": 16, "samples": 3, "steps": 10}}


@pytest.mark.parametrize("edits", [{}, MODELS_OWN | FEW], ids=["32", "own"])
def test_the_pictures_are_the_base_and_the_end_of_each_arm(tmp_path, edits):
    colours = {"ddpo": (255, 0, 0), "ddrl": (0, 0, 255)}
    for arm, curve in (("ddpo", DDPO), ("ddrl", DDRL)):
        samples = write(tmp_path, arm, curve, **edits) / "samples"
        samples.mkdir()
        last = curve.get("epochs", EPOCHS)[-1]
        for step, colour in ((0, (0, 255, 0)), (3, (9, 9, 9)), (last, colours[arm])):
            pictures = np.broadcast_to(np.uint8(colour), (3, 32, 32, 3))
            sheet = grid(pictures, 3, 4, ["a", "b", "c"])
            Image.fromarray(sheet).save(samples / f"evaluation_{step:06d}.png")
    runs = load(tmp_path, ("ddrl", "ddpo"))
    path = compare.draw(runs, tmp_path / "c.png")[-1]
    assert path.name == "c_pictures.png"
    column = np.asarray(Image.open(path).convert("RGB"))[:, 125 + 10]
    seen = [tuple(int(v) for v in pixel) for pixel in column]
    order = [c for c in dict.fromkeys(seen) if max(c) - min(c) == 255]
    assert order == [(0, 255, 0), (255, 0, 0), (0, 0, 255)]


def test_the_mode_compares_a_folder_of_arms(tmp_path, capsys):
    write(tmp_path, "ddpo", DDPO)
    write(tmp_path, "ddrl", DDRL)
    compare.compare_mode(None, str(tmp_path))
    assert capsys.readouterr().out.strip() == str(tmp_path / "compare.md")
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    endings = ("compare.md", "compare.csv", "compare.png", "compare_fronts.png")
    assert names == {*endings}
    assert (
        "![compare_fronts](compare_fronts.png)" in (tmp_path / "compare.md").read_text()
    )
