"""Sizing rules by hand, with the settings of well-known models."""

from __future__ import annotations

from shared.media.sizing.anyres import AnyresSizing
from shared.media.sizing.canvas import CanvasSizing
from shared.media.sizing.fixed import FixedSizing
from shared.media.sizing.grid import GridSizing
from shared.media.sizing.split import SplitSizing

AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"


def test_grid_keeps_the_shape() -> None:
    layout = GridSizing(patch_size=14, merge_size=2).measure(280, 560)
    assert (layout.grid_thw, layout.pieces, layout.num_tokens) == ((1, 20, 40), (200,), 200)


def test_fixed_is_always_the_same() -> None:
    assert FixedSizing(576).measure(10, 1000).pieces == (576,)
    gemma = FixedSizing(256, "\n\n<start_of_image>", "<end_of_image>\n\n").measure(1, 1)
    assert gemma.pieces == ("\n\n<start_of_image>", 256, "<end_of_image>\n\n")
    assert (gemma.num_tokens, gemma.num_tiles, gemma.grid_thw) == (256, 1, (1, 1, 1))


def test_canvas_adds_the_whole_picture_to_several_tiles() -> None:
    sizing = CanvasSizing(448, 256, 1, 12, "<img>", "</img>")
    one = sizing.measure(448, 448)
    assert (one.grid_thw, one.pieces, one.num_tiles) == ((1, 1, 1), ("<img>", 256, "</img>"), 1)
    wide = sizing.measure(448, 896)
    assert (wide.grid_thw, wide.num_tiles, wide.num_tokens) == ((1, 1, 2), 3, 768)
    # A small square is not spread over four tiles, a large one is spread over nine.
    assert sizing.measure(500, 500).grid_thw == (1, 1, 1)
    assert sizing.measure(1400, 1400).grid_thw == (1, 3, 3)


def test_split_names_every_tile() -> None:
    sizing = SplitSizing(512, 64, 1024, splits=True)
    layout = sizing.measure(300, 600)
    assert layout.pieces == (
        f"{AROUND}<row_1_col_1>",
        64,
        f"{AROUND}<row_1_col_2>",
        64,
        f"\n\n{AROUND}{WHOLE}",
        64,
        AROUND,
    )
    assert (layout.grid_thw, layout.num_tiles, layout.num_tokens) == ((1, 1, 2), 3, 192)
    tall = sizing.measure(600, 600).pieces
    assert tall[4] == f"\n{AROUND}<row_2_col_1>"
    whole = SplitSizing(512, 64, 512, splits=True).measure(600, 600)
    assert whole.pieces == (f"{AROUND}{WHOLE}", 64, AROUND)
    assert whole == SplitSizing(512, 64, 1024, splits=False).measure(300, 600)


def test_anyres_cuts_padding_and_ends_rows() -> None:
    sizing = AnyresSizing(336, 24, ((336, 672), (672, 336), (672, 672)))
    exact = sizing.measure(672, 672)
    assert exact.num_tokens == 24 * 24 + 48 * (48 + 1)
    assert (exact.grid_thw, exact.num_tiles) == ((1, 2, 2), 5)
    # 500 of 672 columns are picture: 1000 x 500 fits 672 x 336 and fills it.
    assert sizing.measure(1000, 500).grid_thw == (1, 2, 1)
    kept = sizing.kept(336, 448)  # in 336 x 672, 32 of 48 columns
    assert (kept.skip_columns, kept.rows, kept.columns) == (8, 24, 32)


def test_anyres_shrinks_what_is_too_much() -> None:
    sizing = AnyresSizing(384, 27, ((2304, 2304),), max_tiles=9)
    kept = sizing.kept(2304, 2304)
    assert (kept.rows, kept.columns) == (81, 81)
    assert sizing.measure(2304, 2304).num_tokens == 729 + 81 * 82
