"""Small runs to plan, and phases as if they had been compiled."""

from configs import aesthetic, video_14b
from ddrl_jax.chips import CHIPS
from ddrl_jax.flops import Count
from ddrl_jax.plan.lowered import Compiled, Phase

ONE = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}


def tiny(**mesh):
    c = video_14b.get_config("smoke")
    c.mesh.update(ONE | mesh)
    c.prompts.update(per_epoch=4, group_size=4)
    c.train.microbatch = 1
    return c


def stable_diffusion(folder, **edits):
    c = aesthetic.get_config("smoke")
    c.model.init = str(folder)
    c.mesh.data = 1
    for name, value in edits.items():
        c[name].update(value)
    return c


def made(name="update", arguments=0, flops=0, dot_bytes=0, collectives=()):
    phase = Phase(name, None, (), 1, 0)
    count = Count(flops, 0, dot_bytes, 0)
    return Compiled(phase, arguments, 0, 0, count, list(collectives), 0.0)


def with_memory(size: float):
    return CHIPS["v5p"]._replace(hbm_bytes=size)
