"""A weight without axes stays one on its way through the format."""

import numpy as np

from ddrl_jax.models.convert import to_torch_names
from ddrl_jax.models.folder import read_tensors, write_tensors


def test_a_scalar_keeps_its_shape(tmp_path):
    tensors = to_torch_names("clip", {"logit_scale": np.float32(2.5)})
    assert tensors["logit_scale"].shape == ()
    write_tensors(tmp_path / "model.safetensors", tensors)
    found = read_tensors(tmp_path)["logit_scale"]
    assert found.shape == () and found == 2.5


def test_a_transposed_view_is_written_as_it_reads(tmp_path):
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_tensors(tmp_path / "model.safetensors", {"a.weight": matrix})
    np.testing.assert_array_equal(read_tensors(tmp_path)["a.weight"], matrix)
