"""Layouts lose no token, keep to their budget, and depend on the probes alone."""

import dataclasses

import pytest
import torch

from tiny import tiny_tokenizer
from trl_dynamics import ProbeSet
from trl_dynamics.probing.encode import EncodedProbes, LengthLimits, encode
from trl_dynamics.probing.layouts import PaddedLayout, SharedPrefixLayout
from trl_dynamics.probing.schema import Probe


def many() -> EncodedProbes:
    """Rows of many lengths, some without an end of turn."""
    text = "the quick brown fox jumps over a lazy dog"
    probes = tuple(
        Probe(str(i), text[: 1 + 3 * i], {"chosen": " " + text[i : 4 * i + 1], "rejected": " " + text[-1 - i :]})
        for i in range(8)
    )
    return encode(ProbeSet(probes), tiny_tokenizer(), LengthLimits(max_prompt_length=15, max_length=38))


def expected_positions(encoded: EncodedProbes) -> dict[int, list[tuple[int, int, bool]]]:
    """Per item, what must be scored: (tokens before it, the token, whether it is the end of turn), in order."""
    expected = {}
    for index, item in enumerate(encoded.items):
        start = len(item.prompt_ids)
        expected[index] = [(start + k, target, False) for k, target in enumerate(item.response_ids)]
        if item.eos_id is not None:
            expected[index].append((start + len(item.response_ids), item.eos_id, True))
    return expected


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 3, 5, 16, 1000])
def test_every_response_token_is_scored_exactly_once(batch_size, side):
    encoded = many()
    assert {item.eos_id is None for item in encoded.items} == {True, False}
    seen = {index: [] for index in range(len(encoded.items))}
    for batch in PaddedLayout(batch_size, pad_id=9, padding_side=side).batches(encoded):
        assert len(batch.input_ids) <= batch_size
        positions = zip(batch.rows_N, batch.cols_N, batch.target_N, batch.item_N, batch.is_eos_mask_N, strict=True)
        for row, col, target, index, is_eos in positions:
            ids, mask = batch.input_ids[row], batch.attention_mask[row]
            assert ids[col + 1] == target and mask[col] == 1 and mask[col + 1] == 1
            assert tuple(ids[mask == 1].tolist()) == encoded.items[index].input_ids
            before = int(mask[: col + 1].sum())
            seen[int(index)].append((before, int(target), bool(is_eos)))
    assert seen == expected_positions(encoded)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(side):
    encoded = many()
    (batch,) = PaddedLayout(1000, pad_id=9, padding_side=side).batches(encoded)
    lengths = [len(item.input_ids) for item in encoded.items]
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(lengths), max(lengths))
    assert batch.attention_mask.sum(1).tolist() == sorted(lengths)
    assert torch.all(batch.input_ids[batch.attention_mask == 0] == 9)
    order = batch.attention_mask.diff(dim=1)
    assert torch.all(order <= 0) if side == "right" else torch.all(order >= 0)


def test_positions_restart_after_left_padding():
    encoded = many()
    (batch,) = PaddedLayout(1000, padding_side="left").batches(encoded)
    for positions, mask in zip(batch.position_ids, batch.attention_mask, strict=True):
        assert positions[mask == 1].tolist() == list(range(int(mask.sum())))
        assert torch.all(positions[mask == 0] == 0)
    assert all(batch.position_ids is None for batch in PaddedLayout(3).batches(encoded))


def test_rows_of_like_length_share_a_batch():
    encoded = many()
    widths = [batch.input_ids.shape[1] for batch in PaddedLayout(4).batches(encoded)]
    assert widths == sorted(widths) and len(set(widths)) > 1


def test_order_depends_on_the_content_alone():
    torch.manual_seed(0)
    first = PaddedLayout(3).batches(many())
    torch.manual_seed(1)
    second = PaddedLayout(3).batches(many())
    for one_batch, other in zip(first, second, strict=True):
        for field in dataclasses.fields(one_batch):
            left, right = getattr(one_batch, field.name), getattr(other, field.name)
            assert left is right is None or torch.equal(left, right)


def test_layout_draws_no_random_number():
    state = torch.get_rng_state()
    PaddedLayout(3, padding_side="left").batches(many())
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="batch_size is 0, expected at least 1"):
        PaddedLayout(0)


@pytest.mark.parametrize("tokens", [1, 30, 90, 100_000])
def test_padded_batches_keep_to_the_token_budget(tokens):
    batches = PaddedLayout(tokens_per_batch=tokens).batches(many())
    assert sum(len(batch.input_ids) for batch in batches) == len(many().items)
    assert all(batch.input_ids.numel() <= tokens or len(batch.input_ids) == 1 for batch in batches)
    # No two neighbours would have fitted together.
    for batch, following in zip(batches, batches[1:], strict=False):
        assert (len(batch.input_ids) + 1) * following.attention_mask[0].sum() > tokens


def families() -> EncodedProbes:
    """Five prompts, one of a single token, with three or four responses each; some responses are cut."""
    text = "the quick brown fox jumps over a lazy dog"
    probes = []
    for i in range(5):
        responses = {name: " " + text[k : 5 + (3 + i) * k] for k, name in enumerate(("chosen", "rejected", "a"))}
        probes.append(Probe(str(i), text[: 1 + 4 * i], responses | ({"b": " x"} if i % 2 else {})))
    return encode(ProbeSet(tuple(probes)), tiny_tokenizer(), LengthLimits(max_prompt_length=12, max_length=30))


@pytest.mark.parametrize("tokens", [1, 40, 120, 100_000])
def test_shared_prefix_scores_every_response_token_exactly_once(tokens):
    encoded = families()
    assert {item.eos_id is None for item in encoded.items} == {True, False}
    seen = {index: [] for index in range(len(encoded.items))}
    for group in SharedPrefixLayout(tokens, pad_id=9).groups(encoded):
        for batch in group.batches:
            width = group.prompts.input_ids.shape[1]
            assert batch.attention_mask.shape == (len(batch.input_ids), width + batch.input_ids.shape[1])
            positions = zip(batch.rows_N, batch.cols_N, batch.target_N, batch.item_N, batch.is_eos_mask_N, strict=True)
            for row, col, target, index, is_eos in positions:
                # What the prediction sees: the prompt's keys and the row up to this column.
                mask = batch.attention_mask[row, : width + col + 1].bool()
                ids = torch.cat([group.prompts.input_ids[batch.prompt_B[row]], batch.input_ids[row, : col + 1]])
                before = tuple(ids[mask].tolist())
                item = encoded.items[index]
                assert before == item.input_ids[: len(before)] and item.input_ids[len(before)] == target
                assert batch.position_ids[row, col] == len(before) - 1
                seen[int(index)].append((len(before), int(target), bool(is_eos)))
    assert seen == expected_positions(encoded)


def test_each_prompt_runs_once_and_without_its_last_token():
    encoded = families()
    groups = SharedPrefixLayout(120, pad_id=9).groups(encoded)
    ran = [
        tuple(ids[mask == 1].tolist())
        for group in groups
        for ids, mask in zip(group.prompts.input_ids, group.prompts.attention_mask, strict=True)
    ]
    assert sorted(ran) == sorted({item.prompt_ids[:-1] for item in encoded.items})
    for group in groups:
        assert torch.all(group.prompts.attention_mask.diff(dim=1) >= 0), "prompts are padded on the left"
        assert torch.all(group.prompts.input_ids[group.prompts.attention_mask == 0] == 9)


@pytest.mark.parametrize("tokens", [1, 40, 120, 100_000])
def test_shared_prefix_keeps_to_the_token_budget(tokens):
    encoded = families()
    groups = SharedPrefixLayout(tokens).groups(encoded)
    for group in groups:
        for batch in group.batches:
            assert batch.input_ids.numel() <= tokens or len(batch.input_ids) == 1
        own = sum(int(batch.attention_mask[:, group.prompts.input_ids.shape[1] :].sum()) for batch in group.batches)
        assert own + group.prompts.input_ids.numel() <= tokens or len(group.prompts.input_ids) == 1
    assert len(groups) == {1: 5, 100_000: 1}.get(tokens, len(groups)) and (tokens != 120 or 1 < len(groups) < 5)


def test_positions_stay_within_the_context():
    encoded = families()
    longest = max(len(item.input_ids) for item in encoded.items)
    for group in SharedPrefixLayout(100_000).groups(encoded):
        assert max(int(batch.position_ids.max()) for batch in group.batches) == longest - 2


def test_layouts_of_other_settings_share_no_name():
    assert (PaddedLayout().name, SharedPrefixLayout().name) == ("padded", "shared_prefix")
    for layout in (PaddedLayout, SharedPrefixLayout):
        with pytest.raises(ValueError, match="probe_tokens_per_batch is 0, expected at least 1"):
            layout(tokens_per_batch=0)
