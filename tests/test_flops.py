"""FLOPs of a jaxpr against counts by hand, and against XLA where it can count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ddrl_jax.flops import Count, count, flops
from ddrl_jax.models.attention import attention
from ddrl_jax.models.convolution import convolve


def _shaped(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


X, W, V = _shaped(5, 7), _shaped(7, 11), _shaped(11, 3)
FORWARD = 2 * 5 * 7 * 11 + 2 * 5 * 11 * 3  # of _chain


def _chain(x, w, v):
    return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ v))


def test_a_dense_layer_is_2mnk():
    found = count(lambda x, w: jnp.tanh(x @ w), X, W)
    assert found == Count(2 * 5 * 7 * 11, 0, 4 * (5 * 7 + 7 * 11 + 5 * 11), 0)


def test_bytes_follow_the_dtype():
    half = _shaped(5, 7, dtype=jnp.bfloat16), _shaped(7, 11, dtype=jnp.bfloat16)
    assert count(jnp.matmul, *half).dot_bytes == 2 * (5 * 7 + 7 * 11 + 5 * 11)


def test_batched_products_count_each():
    fn = lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b)  # noqa: E731
    assert flops(fn, _shaped(2, 5, 3, 4), _shaped(2, 6, 3, 4)) == 2 * 2 * 3 * 5 * 6 * 4


@pytest.mark.parametrize("impl", ["xla", "chunked"])
def test_attention_is_two_products(impl):
    q, k = _shaped(2, 4096, 3, 8), _shaped(2, 77, 3, 8)
    found = flops(lambda q, k: attention(q, k, k, impl=impl), q, k)
    assert found == 2 * (2 * 2 * 3 * 4096 * 77 * 8)


def test_element_wise_work_is_free():
    assert count(lambda x: jnp.exp(x) * x + jax.nn.softmax(x), X) == Count()


def test_a_gradient_is_three_forwards():
    """Weights and input of each of the two layers: one product each, the size of its
    own; with respect to the weights alone the input of the first is not needed."""
    assert flops(_chain, X, W, V) == FORWARD
    assert flops(jax.grad(_chain, (0, 1, 2)), X, W, V) == 3 * FORWARD
    assert flops(jax.grad(_chain, (1, 2)), X, W, V) == 3 * FORWARD - 2 * 5 * 7 * 11


def test_remat_is_four_forwards_one_of_them_recomputed():
    found = count(jax.value_and_grad(jax.checkpoint(_chain), (0, 1, 2)), X, W, V)
    assert found.flops == 4 * FORWARD
    assert found.recomputed == FORWARD


def test_a_policy_recomputes_only_what_it_does_not_keep():
    kept = jax.checkpoint(_chain, policy=jax.checkpoint_policies.dots_saveable)
    found = count(jax.grad(kept, (0, 1, 2)), X, W, V)
    assert (found.flops, found.recomputed) == (3 * FORWARD, 0)


def test_remat_within_a_scan_is_recomputed_at_each_step():
    @jax.checkpoint
    def layer(x, w):
        return jnp.tanh(x @ w), None

    def loss(x, stack):
        return jnp.sum(jax.lax.scan(layer, x, stack)[0])

    found = count(jax.grad(loss, (0, 1)), _shaped(5, 7), _shaped(6, 7, 7))
    once = 6 * 2 * 5 * 7 * 7
    assert (found.flops, found.recomputed) == (4 * once, once)


def test_a_scan_counts_its_length_and_nests():
    def inner(x, _):
        return x @ x, None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, length=3)[0], None

    fn = lambda x: jax.lax.scan(outer, x, None, length=4)[0]  # noqa: E731
    assert flops(jax.jit(fn), _shaped(7, 7)) == 4 * 3 * 2 * 7**3


def test_a_loop_of_known_length_is_a_scan():
    fn = lambda x: jax.lax.fori_loop(0, 5, lambda _, y: y @ y, x)  # noqa: E731
    assert flops(fn, _shaped(7, 7)) == 5 * 2 * 7**3


def test_an_unknown_length_is_counted_once_and_said():
    def fn(x):
        inner = lambda y: y @ y  # noqa: E731
        return jax.lax.while_loop(lambda y: y[0, 0] < 1, inner, x)

    assert count(fn, _shaped(7, 7)) == Count(2 * 7**3, 0, 3 * 4 * 49, 1)
    with pytest.raises(ValueError, match="1 while loops"):
        flops(fn, _shaped(7, 7))
    no_products = lambda x: jax.lax.while_loop(lambda y: y < 1, lambda y: y + 1, x)  # noqa: E731
    assert count(no_products, _shaped()) == Count()


def test_a_cond_is_its_costliest_branch():
    def fn(x):
        return jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x)

    assert flops(fn, _shaped(7, 7)) == 2 * 2 * 7**3


def _no_use(wrap):
    """Two products, of which one is used, within `wrap`."""

    def fn(x):
        used, _ = wrap(lambda y: (y @ y, y @ y @ y))(x)
        return used

    return fn


@pytest.mark.parametrize(
    "wrap",
    [
        jax.jit,
        jax.checkpoint,
        lambda f: lambda x: jax.lax.cond(x[0, 0] > 0, f, f, x),
        lambda f: lambda x: jax.lax.platform_dependent(x, cpu=f, default=f),
        lambda f: lambda x: jax.lax.scan(lambda y, _: f(y), x, None, length=1),
    ],
)
def test_what_no_result_depends_on_is_left_out(wrap):
    assert flops(_no_use(wrap), _shaped(7, 7)) == 2 * 7**3
    assert flops(jax.jit(_no_use(wrap)), _shaped(7, 7)) == 2 * 7**3


def test_what_a_loop_of_unknown_length_does_not_use_is_left_out():
    def fn(x):
        body = _no_use(jax.jit)
        return jax.lax.while_loop(lambda y: y[0, 0] < 1, body, x)

    assert count(fn, _shaped(7, 7)).flops == 2 * 7**3


def test_custom_gradients_are_seen_into():
    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x + x @ g + x @ x,))
    assert flops(square, _shaped(7, 7)) == 2 * 7**3
    gradient = jax.value_and_grad(lambda x: jnp.sum(square(x)))
    assert flops(gradient, _shaped(7, 7)) == 4 * 2 * 7**3

    assert flops(jax.nn.relu, _shaped(7, 7)) == 0  # custom_jvp

    @jax.custom_jvp
    def product(x):
        return x @ x

    product.defjvp(lambda x, dx: (product(*x), dx[0] @ x[0]))
    assert flops(product, _shaped(7, 7)) == 2 * 7**3


def test_shard_map_counts_every_device():
    """Split over `a` the work is that of the whole; over `b` it is done four times."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    fn = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), check_vma=False
    )
    assert flops(fn, _shaped(6, 7), _shaped(7, 11)) == 4 * 2 * 6 * 7 * 11


def test_a_pallas_kernel_counts_its_grid():
    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    def fn(a, b):
        return pl.pallas_call(
            kernel,
            grid=(4,),
            in_specs=[
                pl.BlockSpec((8, 16), lambda i: (i, 0)),
                pl.BlockSpec((16, 16), lambda i: (0, 0)),
            ],
            out_specs=pl.BlockSpec((8, 16), lambda i: (i, 0)),
            out_shape=_shaped(32, 16),
        )(a, b)

    shapes = _shaped(32, 16), _shaped(16, 16)
    assert flops(fn, *shapes) == 2 * 32 * 16 * 16
    # Operands and result as they leave the chip's memory, not each product's.
    assert count(fn, *shapes).dot_bytes == 4 * (32 * 16 + 16 * 16 + 32 * 16)


def test_a_choice_by_platform_counts_as_what_accelerators_do():
    def fn(a, b):
        twice = lambda a, b: a @ b + a @ b  # noqa: E731
        return jax.lax.platform_dependent(a, b, cpu=twice, default=jnp.matmul)

    assert flops(fn, _shaped(6, 7), _shaped(7, 11)) == 2 * 6 * 7 * 11


def _conv(x, k, stride=1, padding="SAME", **options):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, k, (stride, stride), padding, dimension_numbers=layout, **options
    )


IMAGE, KERNEL = _shaped(2, 8, 6, 4), _shaped(3, 3, 4, 5)


def test_a_convolution_without_padding_is_2_out_taps_inputs():
    found = count(lambda x, k: _conv(x, k, padding="VALID"), IMAGE, KERNEL)
    assert found.flops == 2 * (2 * 6 * 4 * 5) * 9 * 4
    assert found.dot_bytes == 4 * (2 * 8 * 6 * 4 + 9 * 4 * 5 + 2 * 6 * 4 * 5)


def test_padding_is_not_multiplied():
    """Along n pixels, 3 taps meet a pixel 3 n - 2 times: one less at either end."""
    found = flops(_conv, IMAGE, KERNEL)
    assert found == 2 * 2 * 5 * 4 * (3 * 8 - 2) * (3 * 6 - 2)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_gradient_of_a_convolution_is_three_forwards(stride):
    def loss(x, k):
        return jnp.sum(jnp.tanh(_conv(x, k, stride)))

    forward = flops(loss, IMAGE, KERNEL)
    assert flops(jax.grad(loss, (0, 1)), IMAGE, KERNEL) == 3 * forward


@pytest.mark.parametrize("nested", [False, True])
def test_the_convolution_of_the_networks_is_three_forwards_two_with_a_frozen_kernel(
    nested,
):
    """Its own gradient differentiates the plain one again, whose value nobody reads.

    Of four layers in a loop the input of the first has a gradient too, as the loop does
    the same each time."""
    forward = 2 * 2 * 4 * 4 * (3 * 8 - 2) * (3 * 6 - 2)
    kernel = _shaped(3, 3, 4, 4)
    stack = _shaped(4, *kernel.shape) if nested else kernel

    def layer(x, k):
        return jnp.tanh(convolve(x, k)), None

    def loss(x, k):
        return jnp.sum(jax.lax.scan(layer, x, k)[0] if nested else layer(x, k)[0])

    layers = 4 if nested else 1
    assert flops(loss, IMAGE, stack) == layers * forward
    both = jax.jit(jax.value_and_grad(loss, (0, 1)))
    assert flops(both, IMAGE, stack) == layers * 3 * forward
    frozen = jax.jit(jax.value_and_grad(loss))
    assert flops(frozen, IMAGE, stack) == layers * 2 * forward


def test_groups_divide_the_work():
    fn = lambda x, k: _conv(x, k, padding="VALID", feature_group_count=2)  # noqa: E731
    one = 2 * (2 * 6 * 4 * 6) * 9 * 2
    assert flops(fn, IMAGE, _shaped(3, 3, 2, 6)) == one
    both = jax.grad(lambda x, k: jnp.sum(jnp.tanh(fn(x, k))), (0, 1))
    assert flops(both, IMAGE, _shaped(3, 3, 2, 6)) == 3 * one


def test_cudnn_attention_is_two_products_and_five_backward(monkeypatch):
    """The kernel is opaque; its gradient computes q k^T again, then four products."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    q = _shaped(2, 128, 4, 32, dtype=jnp.bfloat16)
    k = _shaped(2, 256, 4, 32, dtype=jnp.bfloat16)

    def attend(q, k, v):
        out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        return jnp.sum(out.astype(jnp.float32))

    product = 2 * 2 * 4 * 128 * 256 * 32
    assert flops(attend, q, k, k) == 2 * product
    found = count(jax.grad(attend, (0, 1, 2)), q, k, k)
    assert (found.flops, found.recomputed) == (7 * product, product)


@pytest.mark.parametrize(
    "fn, args",
    [
        (jnp.matmul, (X, W)),
        (_conv, (IMAGE, KERNEL)),
        (lambda x, k: _conv(x, k, 2), (IMAGE, KERNEL)),
        (
            lambda x, k: _conv(x, k, lhs_dilation=(2, 2), padding=((2, 1), (1, 2))),
            (IMAGE, KERNEL),
        ),
        (lambda x, k: _conv(x, k, rhs_dilation=(2, 1)), (IMAGE, KERNEL)),
    ],
)
def test_xla_counts_the_same(fn, args):
    """Of a single product XLA's cost analysis is right, and another implementation."""
    analysis = jax.jit(fn).lower(*args).cost_analysis()
    assert analysis["flops"] == flops(fn, *args)
