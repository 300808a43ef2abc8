"""The KV cache that grows in place: the same keys and values as transformers' own, through all that is done to it."""

import torch
from transformers import DynamicCache, GptOssConfig, Qwen3MoeConfig
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from hybrimoe.generation.growing import (
    LEAST_ROOM,
    GrowingIndexedLayer,
    GrowingLayer,
    GrowingWindowLayer,
    copy_rows,
    growing_cache,
)
from hybrimoe.generation.prefix.states import copied


def tokens(n, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, n, 8, generator=generator), torch.randn(batch, 2, n, 4, generator=generator)


def both(steps):
    """Runs the same steps on a growing layer and on transformers'; compares after each."""
    ours, theirs = GrowingLayer(), DynamicLayer()
    for step in steps:
        returned = [step(ours), step(theirs)]
        if isinstance(returned[0], tuple):
            assert all(torch.equal(a, b) for a, b in zip(*returned, strict=True))
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()
    return ours


def append(n, seed=0, batch=1):
    return lambda layer: layer.update(*tokens(n, seed, batch))


def test_appended_tokens_are_those_of_a_concatenation():
    both([append(3), append(1, 1), append(LEAST_ROOM, 2), append(1, 3), append(2 * LEAST_ROOM, 4), append(1, 5)])


def index(n, seed=0, batch=1):
    return lambda layer: layer.update_indexer(tokens(n, seed, batch)[0][:, 0])


def test_an_index_is_that_of_a_concatenation_through_all_that_is_done_to_it():
    beams, twice = torch.tensor([1, 0]), torch.tensor([1, 1, 0])
    many = LEAST_ROOM
    steps = [
        index(3, 0, 2), append(3, 0, 2), append(1, 1, 2), index(1, 1, 2), append(many, 2, 2), index(many, 2, 2),
        lambda layer: layer.crop(-5), index(1, 3, 2), append(1, 3, 2),
        lambda layer: layer.reorder_cache(beams), index(1, 4, 2), append(1, 4, 2),
        lambda layer: layer.batch_select_indices(twice), index(2, 5, 3), append(2, 5, 3),
        lambda layer: layer.batch_repeat_interleave(2), index(1, 6, 6), append(1, 6, 6),
        lambda layer: layer.reset(), index(2, 7), append(2, 7),
    ]  # fmt: skip
    ours, theirs = GrowingIndexedLayer(), DynamicIndexedLayer()
    for step in steps:
        step(ours)
        step(theirs)
        for name in ("keys", "values", "indexer_keys"):
            found, expected = getattr(ours, name), getattr(theirs, name)
            assert found is expected is None or torch.equal(found, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
    twin = copied(ours, "cpu")
    index(1, 8)(ours)
    append(1, 8)(ours)
    assert torch.equal(twin.indexer_keys, theirs.indexer_keys)
    assert twin.indexer_keys.untyped_storage().nbytes() == theirs.indexer_keys.nbytes


def test_beams_stay_in_their_buffers():
    """Also of an index and of a window, whose buffers hold tokens that it no longer shows."""
    layers = [GrowingLayer(), GrowingIndexedLayer(), GrowingWindowLayer(4)]
    others = [DynamicLayer(), DynamicIndexedLayer(), DynamicSlidingWindowLayer(4)]
    for layer, other in zip(layers, others, strict=True):
        for each in (layer, other):
            for seed, n in enumerate((6, 1)):
                each.update(*tokens(n, seed, 3))
        if hasattr(layer, "indexer_keys"):
            index(7, 0, 3)(layer)
            index(7, 0, 3)(other)
        layer.grown(1)
        places = [part.data_ptr() for part in layer.buffers if isinstance(part, torch.Tensor)]
        for chosen in ([2, 0, 0], [1, 1, 2]):
            layer.reorder_cache(torch.tensor(chosen))
            other.reorder_cache(torch.tensor(chosen))
            for name in ("keys", "values", *(["indexer_keys"] if hasattr(layer, "indexer_keys") else [])):
                assert torch.equal(getattr(layer, name), getattr(other, name))
        layer.grown(1)
        assert [part.data_ptr() for part in layer.buffers if isinstance(part, torch.Tensor)] == places
        layer.reorder_cache(torch.tensor([1]))  # fewer: buffers of their own
        other.reorder_cache(torch.tensor([1]))
        assert torch.equal(layer.keys, other.keys)


def test_beams_of_inference_mode_are_reordered_outside_it():
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*tokens(3, 0, 2))
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.keys, tokens(3, 0, 2)[0][[1, 0]])


def test_a_token_is_written_into_the_room_of_an_index():
    layer = GrowingIndexedLayer()
    index(10)(layer)
    place = layer.indexer_keys.data_ptr()
    for seed in range(LEAST_ROOM):
        index(1, seed)(layer)
    assert layer.indexer_keys.data_ptr() == place
    index(1)(layer)
    assert layer.indexer_keys.data_ptr() != place


def test_a_token_is_written_into_the_room_there_is():
    layer = both([append(10), append(1, 1)])
    place = layer.keys.data_ptr()
    for seed in range(LEAST_ROOM - 1):
        layer.update(*tokens(1, seed))
    assert layer.keys.data_ptr() == place
    layer.update(*tokens(1))
    assert layer.keys.data_ptr() != place


def test_room_is_a_share_of_what_is_held():
    layer = GrowingLayer()
    layer.update(*tokens(80 * LEAST_ROOM))
    held = layer.keys.untyped_storage().nbytes() / layer.keys.element_size() / (2 * 8)
    assert held == 80 * LEAST_ROOM * 9 // 8


def test_parts_come_into_one_buffer_that_has_room_for_all():
    """A new layer, too: it made a buffer for each part, and copied what came before into it."""
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        layer, parts = GrowingLayer(), [tuple(half.to(dtype) for half in tokens(40, seed)) for seed in range(9)]
        layer.append(iter(parts[:2]), 9 * 40 + 5)
        place = layer.buffers.keys.data_ptr()
        for threads, some in ((1, parts[2:3]), (2, parts[3:]), (None, [])):
            layer.append(some, 9 * 40 + 5, threads)
        assert layer.buffers.keys.data_ptr() == place
        assert torch.equal(layer.keys, torch.cat([keys for keys, _ in parts], -2))
        assert torch.equal(layer.values, torch.cat([values for _, values in parts], -2))


def test_parts_of_another_dtype_or_with_other_strides_are_converted():
    layer = GrowingLayer()
    layer.append([tokens(3)], 20)
    keys, values = tokens(5, 1)
    layer.append([(keys.bfloat16(), values.mT.contiguous().mT), (keys[..., ::2, :], values[..., :3, :])], 20)
    expected = torch.cat([tokens(3)[0], keys.bfloat16().float(), keys[..., ::2, :]], -2)
    assert torch.equal(layer.keys, expected)
    assert torch.equal(layer.values, torch.cat([tokens(3)[1], values, values[..., :3, :]], -2))


def test_rows_are_copied_between_any_memory():
    for source in (torch.randn(2, 3, 5), torch.randn(2, 5, 3).mT, torch.randn(2, 3, 0), torch.ones(2, 3, 5).half()):
        target = torch.zeros(
            2, 7, source.shape[-1], dtype=torch.float32 if source.dtype == torch.half else source.dtype
        )
        copy_rows(target[:, 2:5], source)
        assert torch.equal(target[:, 2:5], source.to(target.dtype))
        assert not target[:, :2].any()


def test_cropped_chosen_repeated_and_reordered_rows():
    both([append(20), lambda layer: layer.crop(-7), append(3, 1), append(1, 2)])
    both([append(9, batch=3), lambda layer: layer.batch_select_indices(torch.tensor([2, 0])), append(2, 1, batch=2)])
    both([append(9), lambda layer: layer.batch_repeat_interleave(3), append(2, 1, batch=3)])
    both([append(9, batch=2), lambda layer: layer.reorder_cache(torch.tensor([1, 0])), append(2, 1, batch=2)])


def test_a_choice_of_rows_leaves_other_holders_alone():
    layer = GrowingLayer()
    layer.update(*tokens(5, batch=2))
    before = layer.keys
    copy = before.clone()
    layer.batch_select_indices(torch.tensor([0]))
    layer.update(*tokens(1))
    assert torch.equal(before, copy)


def test_after_a_reset_it_begins_anew():
    layer = GrowingLayer()
    layer.update(*tokens(5))
    layer.reset()
    assert layer.get_seq_length() == 0
    keys, _ = layer.update(*tokens(3, 1))
    assert torch.equal(keys, tokens(3, 1)[0])


def test_only_plain_layers_are_replaced():
    plain = growing_cache(Qwen3MoeConfig(num_hidden_layers=3))
    assert [type(layer) for layer in plain.layers] == [GrowingLayer] * 3
    config = GptOssConfig(num_hidden_layers=4, sliding_window=16)
    kinds = [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    mixed = [type(layer).__name__ for layer in growing_cache(config).layers]
    assert "DynamicSlidingWindowLayer" in kinds
    assert mixed == [{"DynamicLayer": "GrowingLayer"}.get(kind, kind) for kind in kinds]
