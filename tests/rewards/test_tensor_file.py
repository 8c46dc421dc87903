"""torch.save's files against torch itself, and against files made to do harm."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from ddrl_jax.errors import UserError
from ddrl_jax.rewards.tensor_file import read_tensor_file

torch = pytest.importorskip("torch")


def saved(tmp_path, content, **options):
    path = tmp_path / "file.pth"
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"],
)
def test_every_kind_of_number(tmp_path, dtype):
    tensor = (torch.arange(12).reshape(3, 4) % 5 - 2).to(getattr(torch, dtype))
    found = read_tensor_file(saved(tmp_path, {"x": tensor}))["x"]
    wanted = tensor.float() if dtype == "bfloat16" else tensor
    assert found.dtype == wanted.numpy().dtype
    np.testing.assert_array_equal(found, wanted.numpy())


def test_state_dicts_views_and_what_lies_around_them(tmp_path):
    base = torch.randn(6, 5)
    content = {
        "state_dict": torch.nn.Linear(3, 2).state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "views": [base, base.T, base[2:5, 1::2], base[3, 2], torch.zeros(0, 4)],
        "epoch": 3,
        "about": ("text", None, 0.5, True),
    }
    found = read_tensor_file(saved(tmp_path, content))
    linear = content["state_dict"]
    assert found["state_dict"].keys() == linear.keys()
    for name in linear:
        np.testing.assert_array_equal(found["state_dict"][name], linear[name].numpy())
    for ours, theirs in zip(found["views"], content["views"], strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
    np.testing.assert_array_equal(found["parameter"], [1.0, 1.0])
    assert found["epoch"] == 3 and found["about"] == content["about"]


def test_safetensors(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.arange(3.0)}, tmp_path / "x.safetensors")
    found = read_tensor_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(found["x"], np.arange(3.0))


class _Harm:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def archive(tmp_path, content, compression=zipfile.ZIP_STORED):
    """A file as torch.save lays it out, with any pickle in it."""
    path = tmp_path / "harm.pth"
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/data/0", np.arange(4.0, dtype=np.float32).tobytes())
        file.writestr("archive/byteorder", "little")
    return path


def test_no_code_of_a_pickle_runs(tmp_path):
    target = tmp_path / "written"
    harm = pickle.dumps({"x": _Harm(os.mkdir, str(target))})
    pickle.loads(harm)  # it would do it
    assert target.is_dir()
    target.rmdir()
    with pytest.raises(UserError, match="mkdir") as error:
        read_tensor_file(archive(tmp_path, harm))
    assert not target.exists() and "no code is run" in str(error.value)


@pytest.mark.parametrize("function", [eval, getattr, pickle.loads, io.open])
def test_builtins_are_not_known_either(tmp_path, function):
    with pytest.raises(UserError, match="holds more than tensors"):
        read_tensor_file(archive(tmp_path, pickle.dumps(_Harm(function, "1"))))


def plan(tmp_path, offset, shape, stride, key="0"):
    """A file with one tensor that claims to lie like this in a storage of 4 floats."""
    buffer, storage = io.BytesIO(), object()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            kind = torch.FloatStorage
            return ("storage", kind, key, "cpu", 4) if obj is storage else None

    rebuild = torch._utils._rebuild_tensor_v2
    tensor = _Harm(rebuild, storage, offset, shape, stride, False, {})
    Pickler(buffer, protocol=2).dump({"x": tensor})
    return archive(tmp_path, buffer.getvalue())


def test_a_tensor_reads_its_own_storage_only(tmp_path):
    found = read_tensor_file(plan(tmp_path, 1, (3,), (1,)))["x"]
    np.testing.assert_array_equal(found, [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (1, (4,), (1,)),
        (4, (1,), (1,)),
        (-1, (1,), (1,)),
        (0, (2, 2), (1, 3)),
        (3, (3,), (-1,)),
        (0, (1 << 40,), (0,)),
        (0, (2,), (1, 1)),
        (0, (True,), (1,)),
        ("0", (1,), (1,)),
    ],
)
def test_strides_that_point_elsewhere(tmp_path, offset, shape, stride):
    with pytest.raises(UserError, match="can not be read"):
        read_tensor_file(plan(tmp_path, offset, shape, stride))


def test_a_storage_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="can not be read"):
        read_tensor_file(plan(tmp_path, 0, (1,), (1,), key="../../secret"))


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def _flipped(path):
    content = bytearray(path.read_bytes())
    place = content.find(np.full(3, 0.25, np.float32).tobytes())
    content[place] ^= 1
    path.write_bytes(content)


def _text(path):
    path.write_text("<html>404</html>")


@pytest.mark.parametrize("damage", [_truncated, _flipped, _text])
def test_damage_is_one_message(tmp_path, damage):
    path = saved(tmp_path, {"x": torch.full((300,), 0.25)})
    damage(path)
    with pytest.raises(UserError, match="can not be read"):
        read_tensor_file(path)


def test_other_files_are_one_message_too(tmp_path):
    paths = [
        tmp_path / "missing.pth",
        tmp_path / "missing.safetensors",
        tmp_path,
        saved(tmp_path, {"x": torch.ones(2)}, _use_new_zipfile_serialization=False),
    ]
    for path in paths:
        with pytest.raises(UserError, match="can not be read"):
            read_tensor_file(path)
    with pytest.raises(UserError, match="no dict"):
        read_tensor_file(archive(tmp_path, pickle.dumps([1, 2])))


def test_nothing_may_swell(tmp_path):
    packed = archive(tmp_path, pickle.dumps({}), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        read_tensor_file(packed)
