"""State dicts of open_clip under the names that transformers gives the same tensors."""

import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Shaped

from ddrl_jax.errors import UserError

LISTED = 10  # names shown of a longer list
# (name in open_clip, name in transformers), tried in order; {tower} is filled in
TOP = (
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (
        r"visual\.positional_embedding",
        "vision_model.embeddings.position_embedding.weight",
    ),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.ln_pre\.(weight|bias)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.ln_post\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.(weight|bias)", r"text_model.final_layer_norm.\1"),
    (r"logit_scale", "logit_scale"),
)
TRANSPOSED = {  # open_clip multiplies by these from the right
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
PARTS = (
    (r"ln_([12])\.(weight|bias)", r"layer_norm\1.\2"),
    (r"attn\.out_proj\.(weight|bias)", r"self_attn.out_proj.\1"),
    (r"mlp\.c_fc\.(weight|bias)", r"mlp.fc1.\1"),
    (r"mlp\.c_proj\.(weight|bias)", r"mlp.fc2.\1"),
)
JOINED = re.compile(r"attn\.in_proj_(weight|bias)")
IGNORED = ("attn_mask",)  # a buffer that older versions saved


def from_open_clip(
    tensors: Mapping[str, np.ndarray], name: str
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Renames the tensors of a two-tower open_clip model.

    The query, key and value maps that open_clip keeps in one matrix are cut apart, and
    its two projections are transposed.

    Args:
      tensors: open_clip name -> array.
      name: of the file, for messages.

    Returns:
      transformers name -> array of the same numbers.

    Raises:
      UserError: names that such a model does not have.
    """
    found: dict[str, np.ndarray] = {}
    unknown = []
    for old, tensor in tensors.items():
        old = old.removeprefix("module.")  # of training on several devices
        if old in IGNORED:
            continue
        renamed = _renamed(old, tensor)
        if not renamed:
            unknown.append(old)
        found.update(renamed)
    if unknown:
        more = ", ..." if len(unknown) > LISTED else ""
        raise UserError(
            f"{name} is not a CLIP of open_clip",
            got=f"{len(unknown)} other names: {', '.join(unknown[:LISTED])}{more}",
            wanted="visual.*, transformer.*, token_embedding, positional_embedding,"
            " ln_final, text_projection, logit_scale",
            way_out="name the state dict of an open_clip ViT",
        )
    return found


def _renamed(old: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
    if old in TRANSPOSED:
        return {TRANSPOSED[old]: tensor.T}
    for pattern, new in TOP:
        if re.fullmatch(pattern, old):
            return {re.sub(pattern, new, old): tensor}
    if not (block := BLOCK.fullmatch(old)):
        return {}
    tower = "vision_model" if block[1] else "text_model"
    prefix, rest = f"{tower}.encoder.layers.{block[2]}", block[3]
    if joined := JOINED.fullmatch(rest):
        parts = zip("qkv", np.split(tensor, 3), strict=True)
        return {f"{prefix}.self_attn.{c}_proj.{joined[1]}": part for c, part in parts}
    for pattern, new in PARTS:
        if re.fullmatch(pattern, rest):
            return {f"{prefix}.{re.sub(pattern, new, rest)}": tensor}
    return {}
