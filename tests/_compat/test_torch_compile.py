"""torch.compile's private names exist, and do what we rely on."""

import inspect

import torch

from gdtrain._compat.torch_compile import (
    compiler_errors,
    decompositions,
    inductor,
    while_loop,
    with_strides,
)


def test_a_loop_turns_as_often_as_it_is_told():
    found = while_loop(
        lambda i, x: i < 5, lambda i, x: (i + 1, 2 * x), (torch.tensor(0), torch.ones(2))
    )
    assert found[1].tolist() == [32.0, 32.0]


def test_decompositions_are_a_table_of_ones_own():
    table = decompositions()
    aten = torch.ops.aten
    assert {aten.mm.default, aten.addmm.default} <= table.keys()
    del table[aten.mm.default]
    assert aten.mm.default in decompositions()


def test_the_backend_takes_options_and_decompositions():  # tests/engines compile with it
    table = decompositions()
    backend = inductor({"cpp.threads": 1}, table)
    taken = inspect.signature(backend.func).bind(None, [], **backend.keywords).arguments
    assert taken["config_patches"] == {"cpp.threads": 1}
    assert taken["decompositions"] is table


def test_strides_are_as_told():
    assert with_strides()(torch.ones(2, 3), (1, 2)).stride() == (1, 2)


def test_errors_are_of_their_kinds():
    backend, traced, limit = compiler_errors()
    assert all(issubclass(kind, RuntimeError) for kind in (backend, traced))
    assert issubclass(limit, Exception)
