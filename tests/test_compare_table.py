"""What a comparison shows: its table, its figures, its mode."""

import json

import numpy as np
import pytest
from PIL import Image
from synthetic_runs import DDPO, DDRL, EPOCHS, load, two_seeds, write

from ddrl_jax import compare
from ddrl_jax.compare.figures import cut_pictures, spread_out
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
def test_a_sheet_of_pictures_is_taken_apart_as_it_was_made(count):
    random = np.random.default_rng(count)
    pictures = random.integers(0, 256, (count, 6, 6, 3), np.uint8)
    sheet = grid(pictures, min(count, 8), 2, ["."] * count)
    found, captions = cut_pictures(sheet, 12, count)
    np.testing.assert_array_equal(found, pictures.repeat(2, 1).repeat(2, 2))
    assert captions.shape[0] == count and captions.shape[2] == 12


def test_drawing_writes_curves_and_fronts(tmp_path):
    written = compare.draw(two_seeds(tmp_path), tmp_path / "out" / "c.png")
    assert [path.name for path in written] == ["c.png", "c_fronts.png"]
    for path in written:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape[1] > 1000
        packed = pixels.astype(np.int64) @ [1, 256, 65536]
        assert len(np.unique(packed)) > 50


def test_the_pictures_are_the_base_and_the_end_of_each_arm(tmp_path):
    colours = {"ddpo": (255, 0, 0), "ddrl": (0, 0, 255)}
    for arm, curve in (("ddpo", DDPO), ("ddrl", DDRL)):
        samples = write(tmp_path, arm, curve) / "samples"
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
