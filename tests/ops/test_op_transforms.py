"""Every op under torch.compile, activation checkpointing and repeated differentiation."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint


@pytest.fixture(autouse=True)
def no_compiled_code():
    torch.compiler.reset()


def assert_equal(got, expected):
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def results(use, out):
    return out.detach(), *use.gradients(out)


def test_compiled_is_eager(use_of):
    use = use_of()
    compiled = torch.compile(use.function, fullgraph=True, backend="aot_eager")
    assert_equal(results(use, compiled(*use.leaves, *use.rest)), results(use, use()))


def test_one_graph_serves_every_batch_size(use_of):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(use_of().function, fullgraph=True, dynamic=True, backend=counter)
    compiled_so_far = []
    # No size of anything else: torch takes equal sizes for one and the same.
    for batch in (11, 13, 17):
        use = use_of(batch)
        for tensor in (*use.leaves, *use.rest):
            if len(tensor) == batch:
                # Makes it an error to tie the graph to this batch size.
                torch._dynamo.mark_dynamic(tensor, 0)
        assert_equal(results(use, compiled(*use.leaves, *use.rest)), results(use, use()))
        compiled_so_far.append(counter.frame_count)
    assert compiled_so_far[0] == compiled_so_far[-1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(use_of, reentrant):
    use = use_of()
    expected = results(use, use())
    leaves = [leaf.detach().requires_grad_() for leaf in use.leaves]
    # Not leaves themselves, as inside a model.
    out = checkpoint(use, *(2 * leaf / 2 for leaf in leaves), use_reentrant=reentrant)
    generator = torch.Generator().manual_seed(9)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    assert_equal((out.detach(), *(leaf.grad for leaf in leaves)), expected)


def test_the_backward_pass_can_run_twice(use_of):
    use = use_of()
    out = use()
    first = use.gradients(out, retain_graph=True)
    assert_equal(use.gradients(out), first)


def test_a_single_gradient(use_of):
    """What is not asked for is None, and what is asked for is what it was among all."""
    use = use_of()
    every = use.gradients(use())
    generator = torch.Generator().manual_seed(9)
    for place, gradient in enumerate(every):
        leaves = [leaf.detach().requires_grad_(n == place) for n, leaf in enumerate(use.leaves)]
        out = use(*leaves)
        generator.manual_seed(9)
        out.backward(torch.randn(out.shape, generator=generator))
        assert_equal([leaves[place].grad], [gradient])
        assert [leaf.grad is None for leaf in leaves] == [n != place for n in range(len(leaves))]


def test_double_backward_is_an_error_that_names_the_op(use_of):
    use = use_of()

    def gradient_of_a_gradient():
        gradient = torch.autograd.grad(use().square().sum(), use.leaves[-1], create_graph=True)[0]
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError, match=f"^{use.name} cannot be differentiated twice"):
        gradient_of_a_gradient()


def test_inference_keeps_nothing(use_of):
    use = use_of()
    with torch.no_grad():
        out = use()
    assert not out.requires_grad
    with torch.inference_mode():
        assert torch.equal(use(), out)


def test_tensors_without_data(use_of):
    """On the device "meta", as a model too large for this machine is looked at."""
    use = use_of()
    leaves = [leaf.detach().to("meta").requires_grad_() for leaf in use.leaves]
    out = use.function(*leaves, *(one.to("meta") for one in use.rest))
    assert (out.shape, out.dtype, out.device.type) == (use().shape, use().dtype, "meta")
    out.sum().backward()
    assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]
