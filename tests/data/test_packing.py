"""Packing: every token, position, target and weight of small sequences, written out."""

import dataclasses

import numpy as np
import pytest

from imagegpt_jax.data.packing import IMAGE, IMAGE_TO_TEXT, NONE, TEXT, Layout, TokenSpace
from imagegpt_jax.errors import UserError

SPACE = TokenSpace(text_vocab=20, num_classes=3, num_codes=30)
LAYOUT = Layout(space=SPACE, text_length=4, grid=(2, 3), text_weight=0.5)
PAD, BOI, EOI, EOT = 20, 21, 22, 23
CODES = np.arange(6)[None]
IMAGE_IDS = [27, 28, 29, 30, 31, 32]


def test_token_space_is_contiguous_and_disjoint():
    assert (SPACE.pad, SPACE.boi, SPACE.eoi, SPACE.eot) == (PAD, BOI, EOI, EOT)
    assert (SPACE.class_start, SPACE.image_start, SPACE.vocab_size) == (24, 27, 57)
    assert LAYOUT.text_ids == (0, 27)
    assert LAYOUT.image_ids == (27, 30)


def test_text_to_image():
    packed = LAYOUT.pack([[5, 6]], None, CODES)
    assert packed["tokens"][0].tolist() == [5, 6, PAD, PAD, BOI, *IMAGE_IDS, EOI]
    assert packed["segments"][0].tolist() == [1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    image = [[3, 3, 3], [3, 3, 4], [3, 3, 5], [3, 4, 3], [3, 4, 4], [3, 4, 5]]
    assert packed["positions"][0].tolist() == [[0] * 3, [1] * 3, [0] * 3, [0] * 3, [2] * 3, *image, [6] * 3]
    assert packed["targets"][0].tolist() == [6, BOI, PAD, PAD, *IMAGE_IDS, EOI, PAD]
    assert packed["kind"][0].tolist() == [TEXT, TEXT, NONE, NONE, *[IMAGE] * 6, NONE, NONE]
    assert packed["weights"][0].tolist() == [0.5, 0.5, 0, 0, *[1.0] * 6, 0, 0]
    assert packed["condition"].tolist() == [PAD]


def test_codes_in_any_order():
    """Each keeps the position of its place; the token before it is told where it will stand."""
    layout = dataclasses.replace(LAYOUT, target_positions=True)
    order = np.array([[5, 0, 3, 1, 4, 2]])
    packed, raster = layout.pack([[5, 6]], None, CODES, None, None, order), layout.pack([[5, 6]], None, CODES)
    assert packed["tokens"][0, 5:-1].tolist() == [IMAGE_IDS[i] for i in order[0]]
    assert packed["targets"][0, 4:-2].tolist() == [IMAGE_IDS[i] for i in order[0]]
    np.testing.assert_array_equal(packed["positions"][0, 5:-1], raster["positions"][0, 5:-1][order[0]])
    np.testing.assert_array_equal(packed["target_positions"][0, 4:-2], packed["positions"][0, 5:-1])
    for name in ("segments", "kind", "weights", "condition"):
        np.testing.assert_array_equal(packed[name], raster[name])
    reverse = layout.pack([[5, 6]], None, CODES, [IMAGE_TO_TEXT], None, order)
    assert reverse["tokens"][0, 1:7].tolist() == IMAGE_IDS
    with pytest.raises(UserError, match="target_positions"):
        LAYOUT.pack([[5, 6]], None, CODES, None, None, order)


def test_image_to_text():
    packed = LAYOUT.pack([[5, 6]], None, CODES, [IMAGE_TO_TEXT])
    assert packed["tokens"][0].tolist() == [BOI, *IMAGE_IDS, EOI, 5, 6, PAD, PAD]
    assert packed["segments"][0].tolist() == [1] * 10 + [0, 0]
    image = [[1, 1, 1], [1, 1, 2], [1, 1, 3], [1, 2, 1], [1, 2, 2], [1, 2, 3]]
    assert packed["positions"][0].tolist() == [[0] * 3, *image, [4] * 3, [5] * 3, [6] * 3, [0] * 3, [0] * 3]
    assert packed["targets"][0].tolist() == [*IMAGE_IDS, EOI, 5, 6, EOT, PAD, PAD]
    assert packed["kind"][0].tolist() == [*[IMAGE] * 6, NONE, TEXT, TEXT, TEXT, NONE, NONE]


def test_class_to_image():
    packed = LAYOUT.pack(None, [2], CODES)
    assert packed["tokens"][0, :5].tolist() == [26, PAD, PAD, PAD, BOI]
    assert packed["positions"][0, 4].tolist() == [1, 1, 1]
    assert packed["kind"][0, :4].tolist() == [NONE] * 4, "what follows a class alone is certain: no loss"
    assert packed["condition"].tolist() == [26]


def test_class_comes_before_text():
    packed = LAYOUT.pack([[5, 6]], [1], CODES)
    assert packed["tokens"][0, :5].tolist() == [25, 5, 6, PAD, BOI]
    assert packed["kind"][0, :4].tolist() == [TEXT, TEXT, TEXT, NONE]


def test_dropping_is_an_empty_text_region():
    dropped = LAYOUT.pack([[5, 6], [7]], [1, -1], np.repeat(CODES, 2, 0), None, [True, False])
    empty = LAYOUT.pack([[], [7]], [-1, -1], np.repeat(CODES, 2, 0))
    for name in empty:
        np.testing.assert_array_equal(dropped[name], empty[name])
    assert dropped["positions"][0, 4].tolist() == [0, 0, 0]
    assert dropped["tokens"][1, 0] == 7


def test_long_captions_are_cut():
    packed = LAYOUT.pack([list(range(9))] * 2, None, np.repeat(CODES, 2, 0), [0, IMAGE_TO_TEXT])
    assert packed["tokens"][0, :5].tolist() == [0, 1, 2, 3, BOI]
    assert packed["tokens"][1, 7:].tolist() == [EOI, 0, 1, 2, 3]
    assert packed["targets"][1, -1] == EOT


def test_max_position_is_a_bound_that_is_reached():
    full = LAYOUT.pack([list(range(4))] * 2, None, np.repeat(CODES, 2, 0), [0, IMAGE_TO_TEXT])
    assert full["positions"].max() == LAYOUT.max_position


@pytest.mark.parametrize("target_positions", [False, True])
def test_prompts_are_the_left_part_of_packed_sequences(target_positions):
    layout = dataclasses.replace(LAYOUT, target_positions=target_positions)
    texts, labels, codes = [[5, 6], [], [1, 2, 3, 4, 5]], [-1, 2, 1], np.random.default_rng(0).integers(0, 30, (3, 6))
    for drops in (None, [True, False, True]):
        packed, prompt = layout.pack(texts, labels, codes, None, drops), layout.prompt(texts, labels, drops)
        assert ("target_positions" in prompt) == target_positions
        for name, value in prompt.items():
            left = packed[name] if name == "condition" else packed[name][:, : layout.prompt_length]
            np.testing.assert_array_equal(value, left)
        # The codes go on where the prompt ends.
        image = packed["positions"][:, layout.prompt_length : -1]
        np.testing.assert_array_equal(image, prompt["positions"][:, -1:] + 1 + layout.image_offsets())
    packed, prompt = layout.pack(texts, labels, codes, [IMAGE_TO_TEXT] * 3), layout.caption_prompt(codes)
    for name, value in prompt.items():
        if name != "condition":
            np.testing.assert_array_equal(value, packed[name][:, : layout.num_codes + 2])


def test_target_positions_are_those_of_the_targets():
    layout = dataclasses.replace(LAYOUT, target_positions=True)
    packed = layout.pack([[5, 6], [7]], None, np.repeat(CODES, 2, 0), [0, IMAGE_TO_TEXT])
    for b in range(2):
        where = {
            tuple(p): t
            for p, t, s in zip(*(packed[k][b] for k in ("positions", "tokens", "segments")), strict=True)
            if s
        }
        for position, target, kind in zip(
            *(packed[k][b] for k in ("target_positions", "targets", "kind")), strict=True
        ):
            if kind != NONE and target != EOT:
                assert where[tuple(position)] == target


def test_every_target_is_the_next_token_of_its_segment():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 20, n).tolist() for n in (0, 1, 2, 3, 4)] * 2
    packed = LAYOUT.pack(texts, None, rng.integers(0, 30, (10, 6)), [0] * 5 + [IMAGE_TO_TEXT] * 5)
    for tokens, targets, segments, kind in zip(
        *(packed[k] for k in ("tokens", "targets", "segments", "kind")), strict=True
    ):
        (real,) = np.nonzero(segments)
        np.testing.assert_array_equal(targets[real[:-1]], tokens[real[1:]])
        assert (kind[segments == 0] == NONE).all()
        assert (targets[kind == IMAGE] >= SPACE.image_start).all()
        assert (targets[kind == TEXT] < SPACE.image_start).all()
        assert (kind == IMAGE).sum() == 6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LAYOUT.pack([[25]], None, CODES), "text id 25"),
        (lambda: LAYOUT.pack([[-1]], None, CODES), "outside"),
        (lambda: LAYOUT.pack(None, [3], CODES), "class 3"),
        (lambda: LAYOUT.pack(None, None, CODES + 25), "codebook of 30"),
        (lambda: LAYOUT.pack(None, None, CODES[:, :5]), "grid"),
        (lambda: LAYOUT.pack([[1], [2]], None, CODES), "2 texts"),
        (lambda: LAYOUT.prompt(None, None), "needs texts or labels"),
        (lambda: Layout(space=SPACE, text_length=0, grid=(2, 2)), "text_length"),
        (lambda: Layout(space=SPACE, text_length=4, grid=(0, 2)), "grid"),
        (lambda: dataclasses.replace(LAYOUT, text_weight=0.0, image_weight=0.0), "positive"),
        (lambda: TokenSpace(text_vocab=1, num_classes=0, num_codes=0), "num_codes"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_codes_may_come_as_a_grid():
    a, b = LAYOUT.pack(None, None, CODES), LAYOUT.pack(None, None, CODES.reshape(1, 2, 3))
    np.testing.assert_array_equal(a["tokens"], b["tokens"])
